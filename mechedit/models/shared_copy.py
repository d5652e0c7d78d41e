"""Copies of a model's module tree on the same parameters, so that an edit in place is seen by the model and its copies.

The backends change a copy's modules and never the user's model.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers.activations import GELUTanh, NewGELUActivation

from mechedit.models.fast_gelu import InPlaceGelu


def share_parameters(hf: Any) -> Any:
    """Copy a model's module tree, but not its parameters and buffers: those are the same objects."""
    tensors = [*hf.parameters(), *hf.buffers()]
    return copy.deepcopy(hf, {id(tensor): tensor for tensor in tensors}).eval()


def with_fast_gelu(model: Any) -> Any:
    """Replace the tanh GELU in a copy's MLPs by the faster one, in place, and return the copy.

    The faster one may overwrite its input, which is the MLP's own product and is used nowhere else.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation | GELUTanh):
                setattr(module, name, InPlaceGelu())
    return model
