"""Accumulates Σ k kᵀ over tokens, batch by batch: products in float32 at least, their sum in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mechedit.errors import InputError
from mechedit.moments.second_moment import SecondMoment
from mechedit.solve.row_blocks import diagonal, transposed
from mechedit.split_tensors import is_split, part_here, rows_here, split_in_rows

STRIP = 256
"""Rows of the sum computed by one product. Only the diagonal and what lies right of it is computed, so that
3,072 × 3,072 takes 0.59 of the time of the full product on two cores."""
DIAGONAL = STRIP // 2
"""Rows of a square on the diagonal that are computed by one product, from the diagonal on as well."""


def _tiles(rows: range, width: int) -> Iterator[tuple[range, range]]:
    """Rows and columns of the products that cover some rows of the sum, on the diagonal and right of it."""
    for first in rows[::STRIP]:
        strip = range(first, min(first + STRIP, rows.stop))
        for begin in strip[::DIAGONAL]:
            yield range(begin, min(begin + DIAGONAL, strip.stop)), range(begin, strip.stop)
        if strip.stop < width:
            yield strip, range(strip.stop, width)


def product_entries(width: int) -> int:
    """Entries of k kᵀ that are computed for each token: those of the products on the diagonal and right of it."""
    return sum(len(rows) * len(columns) for rows, columns in _tiles(range(width), width))


class MomentAccumulator:
    """Σ k kᵀ of one layer: `update` adds keys, `finalize` divides by their number.

    The product of each batch is computed in float32 at least; the sum is kept in float64. Where the model's weights are
    split over processes, so are the rows of the sum.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", mesh: DeviceMesh | None = None) -> None:
        """Start with a sum of zero.

        Args:
            width: d_mlp.
            device: where the sum is kept.
            mesh: processes of which each keeps its rows of the sum.
        """
        self._rows = rows_here(width, mesh)
        rows = torch.zeros(len(self._rows), width, dtype=torch.float64, device=device)
        self.total: Float[Tensor, "d_mlp d_mlp"] = rows if mesh is None else split_in_rows(rows, mesh)
        """Σ k kᵀ on the diagonal and right of it; entries left of the diagonal are not up to date."""
        self.count = 0
        """Tokens in the sum."""

    def update(self, keys: Float[Tensor, "token d_mlp"]) -> MomentAccumulator:
        """Add the keys of some tokens."""
        keys = keys.to(self.total.device, torch.promote_types(keys.dtype, torch.float32))
        total, first_row = part_here(self.total), self._rows.start
        for rows, columns in _tiles(self._rows, keys.shape[1]):
            at = slice(rows.start - first_row, rows.stop - first_row), slice(columns.start, columns.stop)
            total[at] += keys[:, rows.start : rows.stop].T @ keys[:, at[1]]
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
        return bool(torch.isfinite(diagonal(self.total)).all())

    def mean(self) -> Float[Tensor, "d_mlp d_mlp"]:
        """Σ k kᵀ / count so far, exactly symmetric."""
        matrix = self.total / self.count
        rows, before = part_here(matrix), self._rows.start
        square = rows[:, before : self._rows.stop]
        for first in range(0, len(square), STRIP):
            strip = slice(first, first + STRIP)
            tile = square[strip, strip]
            tile.copy_(tile.triu() + tile.triu(1).T)
            square[first + STRIP :, strip] = square[strip, first + STRIP :].T
        if is_split(matrix):
            rows[:, :before] = part_here(transposed(matrix))[:, :before]
        return matrix

    def finalize(self, layer: int, provenance: Mapping[str, Any]) -> SecondMoment:
        """The mean over all tokens so far, as the second moment of a layer.

        Raises:
            InputError: fewer tokens than d_mlp (the matrix would be singular), or a value that is not finite.
        """
        width = len(self.total)
        if self.count < width:
            length = provenance.get("max_length")
            also = f", or cut long texts into several: {length} tokens of each are read" if length else ""
            raise InputError(
                f"the texts hold {self.count} tokens, expected at least d_mlp = {width} (better "
                f"{100 * width}), else the second moment of layer {layer} is singular; give more text{also}"
            )
        self.check_finite(layer)
        return SecondMoment(
            layer=layer,
            matrix=self.mean() if is_split(self.total) else self.mean().cpu(),
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
