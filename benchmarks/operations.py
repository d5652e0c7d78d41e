"""Multiply-adds of collecting second moments, counted from shapes: of the published schedule and of what is necessary.

Counted are matrix products: each token with a block's matrices (a gated MLP has three), queries with keys and weights
with values at the positions that are seen, and k kᵀ. Norms, activations, the softmax and padding are not. Each
is two operations of `machine.matrix_rate`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import mechedit as me
from mechedit.planning import Operations


@dataclass(frozen=True, kw_only=True)
class MomentOperations:
    """Multiply-adds of second moments of some layers over some texts."""

    published: int
    """One pass over the text per layer, which ends at that layer's keys, and the full product kᵀ k."""
    necessary: int
    """One pass that ends at the last layer's keys, and the entries of k kᵀ on the diagonal and right of it."""

    @property
    def quotient(self) -> float:
        """How many times fewer multiply-adds the one pass needs."""
        return self.published / self.necessary

    def seconds(self, rate: float) -> float:
        """Seconds that the necessary products take at a rate in operations per second."""
        return 2 * self.necessary / rate


def moment_operations(model: me.Model, lengths: Sequence[int], layers: Collection[int]) -> MomentOperations:
    """Count the multiply-adds of both schedules.

    Args:
        model: its shapes and attention windows count.
        lengths: tokens of each text.
        layers: whose second moments are collected.
    """
    tokens, width = sum(lengths), model.d_key
    operations = Operations.of(model)
    full, triangle = tokens * width**2, tokens * width * (width + 1) // 2
    return MomentOperations(
        published=sum(operations.text_pass(lengths, layer) // 2 + full for layer in layers),
        necessary=operations.text_pass(lengths, max(layers)) // 2 + len(layers) * triangle,
    )
