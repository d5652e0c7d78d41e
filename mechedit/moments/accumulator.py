"""Σ k kᵀ over tokens, gathered a batch at a time: products in float32 at least, their sum in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import InputError
from mechedit.moments.second_moment import SecondMoment

STRIP = 256
"""Rows of the sum that one product makes: only what lies on the diagonal and right of it is computed, so that
3,072 × 3,072 takes 0.59 of the time of the whole product on two cores."""


class MomentAccumulator:
    """Gathers Σ k kᵀ: products of a batch in float32 at least, their sum in float64; `result` divides."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        """Start with nothing gathered.

        Args:
            width: d_mlp.
            device: where to keep the sum.
        """
        self.total: Float[Tensor, "d_mlp d_mlp"] = torch.zeros(width, width, dtype=torch.float64, device=device)
        """Right of the diagonal; what is left of it is not kept up."""
        self.count = 0

    def update(self, keys: Float[Tensor, "token d_mlp"]) -> MomentAccumulator:
        """Add the keys of some tokens."""
        wide = keys.to(self.total.device, torch.promote_types(keys.dtype, torch.float32))
        for first in range(0, len(self.total), STRIP):
            self.total[first : first + STRIP, first:] += wide[:, first : first + STRIP].T @ wide[:, first:]
        self.count += len(keys)
        return self

    def add(self, total: Float[Tensor, "d_mlp d_mlp"], count: int) -> MomentAccumulator:
        """Add what another has gathered."""
        self.total += total.to(self.total.device)
        self.count += count
        return self

    @property
    def finite(self) -> bool:
        """Whether no key has overflowed so far: one that has shows on the diagonal, Σ k²."""
        return bool(torch.isfinite(self.total.diagonal()).all())

    def mean(self) -> Float[Tensor, "d_mlp d_mlp"]:
        """Σ k kᵀ / count so far, symmetric to the bit."""
        matrix = self.total / self.count
        for first in range(0, len(matrix), STRIP):
            strip = slice(first, first + STRIP)
            square = matrix[strip, strip]
            square.copy_(square.triu() + square.triu(1).T)
            matrix[first + STRIP :, strip] = matrix[strip, first + STRIP :].T
        return matrix

    def result(self, layer: int, provenance: Mapping[str, Any]) -> SecondMoment:
        """The mean over all tokens so far.

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
