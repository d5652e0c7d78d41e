"""Rotary position embeddings in three passes over memory, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class RotaryTables:
    """Cosines and sines of the angles by which pairs of channels are turned, once for all blocks of a run."""

    cos: Float[Tensor, "row pos 1 pair"]
    sin: Float[Tensor, "row pos 1 pair"]
    interleaved: bool
    """Whether a pair's channels are neighbors (GPT-J); else they lie half of the rotated width apart."""

    def rotate(self, states: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        """Turn each pair; channels beyond the pairs stay."""
        return _Rotate.apply(states, self.cos, self.sin, self.interleaved)  # pyright: ignore[reportReturnType]

    def at(self, positions: Int[Tensor, "*batch kept"]) -> RotaryTables:
        """The tables of chosen positions, the same ones of each row or each row's own."""
        if positions.ndim == 1:
            cos, sin = (table.index_select(1, positions) for table in (self.cos, self.sin))
        else:
            index = positions[..., None, None]
            cos, sin = (table.expand(len(index), -1, -1, -1).take_along_dim(index, 1) for table in (self.cos, self.sin))
        return RotaryTables(cos, sin, self.interleaved)


def tables_of_halves(cos: Float[Tensor, "row pos channel"], sin: Float[Tensor, "row pos channel"]) -> RotaryTables:
    """Of cosines and sines for all channels, as most transformers models make them."""
    half = cos.shape[-1] // 2
    return RotaryTables(cos[:, :, None, :half], sin[:, :, None, :half], False)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """(a, b) → (a·cos − b·sin, b·cos + a·sin) for each pair of channels."""
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turned(states, cos, sin, interleaved, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The turn by the opposite angle."""
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, ctx.interleaved, 1), None, None, None


def _turned(states: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int) -> Tensor:
    out = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    width = 2 * cos.shape[-1]
    if width < states.shape[-1]:
        out[..., width:] = states[..., width:]
    (a, b), (turned_a, turned_b) = (_pairs(tensor[..., :width], interleaved) for tensor in (states, out))
    torch.mul(a, cos, out=turned_a)
    torch.mul(b, cos, out=turned_b)
    turned_a.addcmul_(b, sin, value=sign)
    turned_b.addcmul_(a, sin, value=-sign)
    return out


def _pairs(states: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second channels of the pairs."""
    if interleaved:
        return states[..., ::2], states[..., 1::2]
    half = states.shape[-1] // 2
    return states[..., :half], states[..., half:]
