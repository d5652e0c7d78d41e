"""A padded batch without its padding: the real tokens of all rows one after another, where each is computed by itself.

Products with weights, norms and activations take a token at a time. Attention alone needs to know which tokens stand
in one row, so that only its inputs are laid out in rows again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mechedit.models.run_plan import Write

LEAST_PADDING = 0.04
"""Share of padding in a batch from which on leaving it out takes less time than moving tokens."""


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each real token of a batch stands: in its row, and among all of them."""

    token_of: Int[Tensor, " token"]
    """Index of each real token in the batch, whose rows follow one another."""
    index: Int[Tensor, "batch pos"]
    """Index of each position among the real tokens; 0 for padding."""
    padding: Int[Tensor, " padding"]
    """Index of each padding token in the batch, whose rows follow one another."""

    @staticmethod
    def of(mask: Int[Tensor, "batch pos"]) -> Packing | None:
        """The packing of a batch with this mask; None where there is too little padding, or nothing else."""
        is_real = mask.flatten().bool()
        token_of, padding = is_real.nonzero()[:, 0], (~is_real).nonzero()[:, 0]
        if len(padding) < LEAST_PADDING * len(is_real) or not len(token_of):
            return None
        index = torch.zeros(len(is_real), dtype=torch.long, device=mask.device)
        index[token_of] = torch.arange(len(token_of), device=mask.device)
        return Packing(token_of, index.view(mask.shape), padding)

    def pack(self, states: Float[Tensor, "batch pos width"]) -> Float[Tensor, "1 token width"]:
        """The states of the real tokens, as one row."""
        return _Pack.apply(states, self)  # pyright: ignore[reportReturnType]

    def unpack(self, states: Float[Tensor, "1 token width"]) -> Float[Tensor, "batch pos width"]:
        """The states in rows; those of padding mean nothing, and nothing may depend on them."""
        return _Unpack.apply(states, self)  # pyright: ignore[reportReturnType]

    def select(
        self, states: Float[Tensor, "1 token width"], positions: Int[Tensor, "*batch kept"]
    ) -> Float[Tensor, "batch kept width"]:
        """The states at some positions, the same ones of each row or each row's own."""
        index = self.index[:, positions] if positions.ndim == 1 else self.index.gather(1, positions)
        return states[0].index_select(0, index.flatten()).unflatten(0, index.shape)

    def count(self, positions: Int[Tensor, "*batch kept"]) -> int:
        """How many states are selected at some positions: padding counts, too."""
        return positions.numel() if positions.ndim == 2 else len(self.index) * len(positions)

    def write(self, write: Write) -> Write:
        """A write into the one row of real tokens; what is written at padding is left out."""
        rows, columns = write.rows.to(self.index.device), write.columns.to(self.index.device)
        is_real: Bool[Tensor, " entry"] = torch.ones_like(self.index, dtype=torch.bool)
        is_real.view(-1)[self.padding] = False
        inside = is_real[rows, columns]
        index = self.index[rows, columns][inside]
        return Write(torch.zeros_like(index), index, write.value[inside.to(write.value.device)], write.add)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, packing: Packing) -> Tensor:
        """The rows of real tokens."""
        ctx.packing = packing
        return states.flatten(0, 1).index_select(0, packing.token_of)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient in rows; that of padding is 0."""
        packing = ctx.packing
        rows = grad[0].index_select(0, packing.index.flatten()).index_fill_(0, packing.padding, 0)
        return rows.unflatten(0, packing.index.shape), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, packing: Packing) -> Tensor:
        """Each real token in its place, and the first one in place of padding."""
        ctx.packing = packing
        return states[0].index_select(0, packing.index.flatten()).unflatten(0, packing.index.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient of the real tokens."""
        return grad.flatten(0, 1).index_select(0, ctx.packing.token_of)[None], None
