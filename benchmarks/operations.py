"""Multiply-adds of collecting second moments, counted from shapes: of the published schedule and of what is necessary.

Counted are matrix products: each token with a block's matrices (a gated MLP has three), queries with keys and weights
with values at the positions that are seen, and k kᵀ. Norms, activations, the softmax and padding are not. Each
is two operations of `machine.matrix_rate`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import mechedit as me


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
    full, triangle = tokens * width**2, tokens * width * (width + 1) // 2
    return MomentOperations(
        published=sum(pass_multiply_adds(model, lengths, layer) + full for layer in layers),
        necessary=pass_multiply_adds(model, lengths, max(layers)) + len(layers) * triangle,
    )


def pass_multiply_adds(model: me.Model, lengths: Sequence[int], last: int) -> int:
    """Multiply-adds of a pass over texts of some lengths that ends at the keys of layer `last`."""
    blocks = sum(
        sum(lengths) * block_multiply_adds(model, layer) + attention_multiply_adds(model, lengths, layer)
        for layer in range(last + 1)
    )
    return blocks - sum(lengths) * model.down_projection(last).numel()


def block_multiply_adds(model: me.Model, layer: int) -> int:
    """Multiply-adds of one token with all matrices of a block."""
    block = model.hf.get_submodule(f"{model.family.blocks}.{layer}")
    return sum(parameter.numel() for parameter in block.parameters() if parameter.ndim == 2)


def attention_multiply_adds(model: me.Model, lengths: Sequence[int], layer: int) -> int:
    """Multiply-adds of queries with keys and of weights with values, at the positions that each token sees."""
    window = model.window(layer)
    return 2 * _head_width(model, layer) * sum(_seen_pairs(length, window) for length in lengths)


def _head_width(model: me.Model, layer: int) -> int:
    """Query heads times d_head: the width of what attention's output projection takes."""
    return len(model.writing("attn").projection(layer))


def _seen_pairs(length: int, window: int | None) -> int:
    """Pairs of a token and a position that it sees, itself included."""
    width = length if window is None else min(window, length)
    return width * (width + 1) // 2 + (length - width) * width
