"""Operations of passes through a model's blocks and its unembedding, counted from the shapes of its matrices.

A multiply-add is two operations. A matrix costs two operations per parameter and token; attention costs four per key,
query and channel of its heads, at the positions that a token sees. Norms, activations, the softmax and padding are not
counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mechedit.models import Model, ModelShapes


@dataclass(frozen=True, kw_only=True)
class BlockOperations:
    """One block's, per token."""

    matrices: int
    """Of all its matrices."""
    keys_values: int
    """Of the matrices that make attention's keys and values, which are among them."""
    per_key: int
    """Of attention, per key that the token attends to."""


@dataclass(frozen=True)
class Operations:
    """Those of a model's passes."""

    shapes: ModelShapes

    @staticmethod
    def of(model: Model) -> Operations:
        """Those of a loaded model."""
        return Operations(ModelShapes.of(model))

    @cached_property
    def blocks(self) -> tuple[BlockOperations, ...]:
        """One entry a block."""
        return tuple(
            BlockOperations(
                matrices=2 * block.matrices, keys_values=2 * block.keys_values, per_key=4 * block.heads_width
            )
            for block in self.shapes.blocks
        )

    @property
    def head(self) -> int:
        """Of one position's logits."""
        return 2 * self.shapes.head

    @property
    def of_blocks(self) -> Operations:
        """Those of the same model without its unembedding."""
        return Operations(replace(self.shapes, head=0))

    def through(self, layers: range, tokens: int, *, before: int = 0) -> int:
        """Consecutive tokens of one row through some blocks.

        Args:
            layers: the blocks.
            tokens: how many.
            before: positions before them, whose keys and values are there.
        """
        keys = tokens * before + tokens * (tokens + 1) // 2
        return sum(tokens * self.blocks[layer].matrices + keys * self.blocks[layer].per_key for layer in layers)

    def last_block(self, tokens: int, read: int, *, before: int = 0) -> int:
        """Consecutive tokens through the last block when only some of them go on to the logits."""
        block = self.blocks[-1]
        rest = block.matrices - block.keys_values + block.per_key * (before + tokens)
        return tokens * block.keys_values + read * (rest + self.head)

    def changed(self, layer: int, tokens: int, subject: int, read: int) -> int:
        """One row's evaluation of what depends on a change of one token after a block.

        Args:
            layer: the block after which the state changes.
            tokens: of the row.
            subject: position of the token that changes.
            read: positions whose logits are computed.
        """
        last, reach, total = self.shapes.n_layers - 1, 1, 0
        for block in range(layer + 1, last):
            # With local attention, a change reaches window − 1 positions further in each block.
            reach = min(tokens - subject, reach + (self.shapes.blocks[block].window or tokens) - 1)
            total += self.through(range(block, block + 1), reach, before=subject)
        if layer == last:
            return total + read * self.head
        return total + self.last_block(min(tokens - subject, reach), read, before=subject)

    def text_pass(self, lengths: Sequence[int], last: int) -> int:
        """A pass over texts of some lengths that ends at the keys of the MLP of block `last`."""
        tokens, total = sum(lengths), 0
        for layer in range(last + 1):
            operations, window = self.blocks[layer], self.shapes.blocks[layer].window
            total += tokens * operations.matrices
            total += operations.per_key * sum(_seen_pairs(length, window) for length in lengths)
        return total - 2 * tokens * self.shapes.blocks[last].down


def _seen_pairs(length: int, window: int | None) -> int:
    """Pairs of a token and a position that it sees, itself included."""
    width = length if window is None else min(window, length)
    return width * (width + 1) // 2 + (length - width) * width
