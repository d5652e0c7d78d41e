"""A twin of a model: modules of its own on shared parameters, which may compute something else for a while."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers.activations import GELUTanh, NewGELUActivation

from mechedit.models.fast_gelu import InPlaceGelu

Forwards = dict[nn.Module, Callable[..., Any]]
"""What modules compute in place of their own forward."""
_ABSENT = object()


def share_parameters(hf: Any) -> Any:
    """Copy a model's module tree, but not its parameters and buffers: those are the same objects."""
    tensors = [*hf.parameters(), *hf.buffers()]
    return copy.deepcopy(hf, {id(tensor): tensor for tensor in tensors}).eval()


def fused(model: Any) -> Any:
    """Give a twin's MLPs the quicker activation; what enters one is their own product, which nobody else sees."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation | GELUTanh):
                setattr(module, name, InPlaceGelu())
    return model


@contextlib.contextmanager
def replaced(forwards: Forwards) -> Iterator[None]:
    """Let modules compute something else, and give them their own forward back at the end.

    Replacing the forward keeps the model's list of blocks whole, because some models look up masks and layer
    types by a block's index.
    """
    # A backend may have put a forward of its own on the instance, so it is put back and not just removed.
    saved = {module: module.__dict__.get("forward", _ABSENT) for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in saved.items():
            if forward is _ABSENT:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward
