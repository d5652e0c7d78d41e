"""Operations of passes through a model's blocks and its unembedding, counted from the shapes of its matrices.

A multiply-add (`operations.py`) is two operations, as in `machine.matrix_rate`. A matrix costs two operations per
parameter and token; attention costs four per key, query and channel of its heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mechedit as me
from benchmarks.operations import block_multiply_adds


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

    model: me.Model

    @cached_property
    def blocks(self) -> tuple[BlockOperations, ...]:
        """One entry a block."""
        config, entries = self.model.hf.config.get_text_config(), []
        for layer in range(self.model.n_layers):
            heads_width = len(self.model.writing("attn").projection(layer))
            kv_heads = getattr(config, "num_key_value_heads", None) or self.model.n_heads
            entries.append(
                BlockOperations(
                    matrices=2 * block_multiply_adds(self.model, layer),
                    keys_values=2 * 2 * self.model.d_model * heads_width * kv_heads // self.model.n_heads,
                    per_key=4 * heads_width,
                )
            )
        return tuple(entries)

    @cached_property
    def head(self) -> int:
        """Of one position's logits."""
        return 2 * self.model.hf.get_output_embeddings().weight.numel()

    def through(self, layers: range, tokens: int, *, before: int = 0) -> int:
        """Consecutive tokens of one row through some blocks.

        Args:
            layers: the blocks.
            tokens: how many.
            before: positions before them, whose keys and values are there.
        """
        keys = sum(range(before + 1, before + tokens + 1))
        return sum(tokens * self.blocks[layer].matrices + keys * self.blocks[layer].per_key for layer in layers)

    def last_block(self, tokens: int, read: int, *, before: int = 0) -> int:
        """Consecutive tokens through the last block when only some of them go on to the logits."""
        block = self.blocks[-1]
        rest = block.matrices - block.keys_values + block.per_key * (before + tokens)
        return tokens * block.keys_values + read * (rest + self.head)
