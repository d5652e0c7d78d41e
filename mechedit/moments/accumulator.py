"""Accumulates Σ k kᵀ over tokens, batch by batch: products in float32 at least, their sum in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import InputError
from mechedit.moments.second_moment import SecondMoment

STRIP = 256
"""Rows of the sum computed by one product. Only the diagonal and what lies right of it is computed, so that
3,072 × 3,072 takes 0.59 of the time of the full product on two cores."""


def product_entries(width: int) -> int:
    """Entries of k kᵀ that are computed for each token: those of the strips on the diagonal and right of it."""
    return sum(min(STRIP, width - first) * (width - first) for first in range(0, width, STRIP))


class MomentAccumulator:
    """Σ k kᵀ of one layer: `update` adds keys, `finalize` divides by their number.

    The product of each batch is computed in float32 at least; the sum is kept in float64.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        """Start with a sum of zero.

        Args:
            width: d_mlp.
            device: where the sum is kept.
        """
        self.total: Float[Tensor, "d_mlp d_mlp"] = torch.zeros(width, width, dtype=torch.float64, device=device)
        """Σ k kᵀ on the diagonal and right of it; entries left of the diagonal are not up to date."""
        self.count = 0
        """Tokens in the sum."""

    def update(self, keys: Float[Tensor, "token d_mlp"]) -> MomentAccumulator:
        """Add the keys of some tokens."""
        keys = keys.to(self.total.device, torch.promote_types(keys.dtype, torch.float32))
        for first in range(0, len(self.total), STRIP):
            self.total[first : first + STRIP, first:] += keys[:, first : first + STRIP].T @ keys[:, first:]
        self.count += len(keys)
        return self

    def add(self, total: Float[Tensor, "d_mlp d_mlp"], count: int) -> MomentAccumulator:
        """Add the sum of another accumulator, over `count` tokens."""
        self.total += total.to(self.total.device)
        self.count += count
        return self

    @property
    def finite(self) -> bool:
        """Whether no key has overflowed so far; an overflow shows on the diagonal, Σ k²."""
        return bool(torch.isfinite(self.total.diagonal()).all())

    def mean(self) -> Float[Tensor, "d_mlp d_mlp"]:
        """Σ k kᵀ / count so far, exactly symmetric."""
        matrix = self.total / self.count
        for first in range(0, len(matrix), STRIP):
            strip = slice(first, first + STRIP)
            square = matrix[strip, strip]
            square.copy_(square.triu() + square.triu(1).T)
            matrix[first + STRIP :, strip] = matrix[strip, first + STRIP :].T
        return matrix

    def finalize(self, layer: int, provenance: Mapping[str, Any]) -> SecondMoment:
        """The mean over all tokens so far, as the second moment of a layer.

        Raises:
            InputError: fewer tokens than d_mlp (the matrix would be singular), or a value that is not finite.
        """
        width = len(self.total)
        if self.count < width:
            raise InputError(
                f"the texts hold {self.count} tokens, expected at least d_mlp = {width} (better "
                f"{100 * width}), else the second moment of layer {layer} is singular; give more text"
            )
        self.check_finite(layer)
        return SecondMoment(
            layer=layer,
            matrix=self.mean().cpu(),
            count=self.count,
            provenance={**provenance, "layer": layer, "count": self.count},
        )

    def check_finite(self, layer: int) -> None:
        """Raise InputError when a key has overflowed."""
        if not self.finite:
            raise InputError(
                f"the second moment of layer {layer} is not finite: some key overflows; load the model in "
                f"float32 or bfloat16"
            )
