"""The matrices through which attention and MLPs add to the residual stream, which edits are written into."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mechedit.errors import InputError
from mechedit.models.family import Family
from mechedit.models.sites import Module
from mechedit.models.unsupported import UnsupportedModelError

_MATRIX_NAMES = {"mlp": "down-projection", "attn": "output projection of attention"}
_EDITABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@runtime_checkable
class _Named(Protocol):
    """What is needed of a model."""

    hf: Any
    name: str
    family: Family
    n_layers: int


def projection_matrix(model: _Named, layer: int, module: Module) -> Float[Tensor, "d_key d_model"]:
    """A live view of the matrix through which a module adds to the residual stream; of a split one, a split view.

    Raises:
        ValueError: there is no such layer.
        InputError: the module has no such matrix, or one of another kind than a floating-point Linear or Conv1D.
    """
    blocks = model.hf.get_submodule(model.family.blocks)
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer {layer} is outside the model: expected 0 to {len(blocks) - 1}")
    path = model.family.parts(layer).projection(module)
    if path is None:
        raise unwritable(model, layer, module)
    projection = blocks[layer].get_submodule(path)
    weight = getattr(projection, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in _EDITABLE:
        if isinstance(projection, Conv1D):
            return weight.detach()
        if isinstance(projection, nn.Linear):
            return weight.detach().T
    raise InputError(
        f"the {_MATRIX_NAMES[module]} of layer {layer} is a {type(projection).__name__} of "
        f"{getattr(weight, 'dtype', 'no weight')}, expected Linear or Conv1D in floating point: load the "
        f"model unquantized and merge its adapters"
    )


def unwritable(model: _Named, layer: int, module: Module) -> UnsupportedModelError:
    """The error for writing into a module that has no matrix to write into."""
    reason = model.family.parts(layer).unwritable.get(module, "built otherwise")
    layers = [i for i in range(model.n_layers) if model.family.parts(i).projection(module) is not None]
    remedy = f"choose among layers {layers}" if layers else "trace it, or choose another model to edit"
    return UnsupportedModelError(
        "mixture of experts" if "experts" in reason else "no matrix of its own",
        f"the {_MATRIX_NAMES[module]} of layer {layer} of {model.name!r} ({model.family.name}) cannot be written: it "
        f"is {reason}; expected one matrix that all tokens pass: {remedy}",
    )
