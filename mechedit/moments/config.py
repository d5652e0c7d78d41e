"""Settings of `collect_moments`: how the text is read, and within which limits of memory."""

from __future__ import annotations

from dataclasses import dataclass

from mechedit.bounds import check_numbers
from mechedit.errors import check_at_least, check_positive
from mechedit.models import Model, ModelShapes


@dataclass(frozen=True, kw_only=True)
class MomentsConfig:
    """How to read the text.

    Only `max_length`, `tokens`, `documents` and, where documents are drawn, `seed` change the result by more than
    rounding. The papers' code reads 100,000 documents, drawn at random, each up to the model's context (2,048 tokens
    for GPT-J): `documents=100_000, max_length=2048`.

    The model's own limit of tokens per text holds if it is lower than `max_length`. With a limit of `memory` (which is
    compared with an estimate), batches shrink and layers are collected in several passes over the text. Checkpoints are
    less frequent than `checkpoint_seconds` where writing them would take over 2 % of the time.
    """

    max_length: int = 1024
    """Tokens read per text; the rest of a longer text is dropped."""
    tokens: int | None = None
    """Tokens read in all, without special tokens; by default all texts are read."""
    documents: int | None = None
    """Documents drawn at random without repetition, and read in the order in which they are drawn; by default all are
    read, in their order."""
    seed: int = 0
    """Seed of that draw."""
    batch_tokens: int = 8192
    """Tokens per batch and per forward pass; fewer need less memory."""
    memory: float | int | None = None
    """GiB of memory to use at most, beside the weights and the finished matrices; no limit by default."""
    checkpoint_seconds: float | int = 60
    """Seconds between two checkpoints, at least."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_at_least("max_length", self.max_length, 1)
        check_at_least("tokens", self.tokens, 1, optional=True)
        check_at_least("documents", self.documents, 1, optional=True)
        check_at_least("batch_tokens", self.batch_tokens, 1)
        check_positive("memory", self.memory, "choose a number of GiB", optional=True)
        check_at_least("checkpoint_seconds", self.checkpoint_seconds, 0)

    def text_length(self, model: Model | ModelShapes) -> int:
        """Tokens read per text: `max_length`, or the model's own limit if that is lower."""
        return min(self.max_length, model.max_positions)
