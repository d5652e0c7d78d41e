"""How to read the text, and within what bounds."""

from __future__ import annotations

from dataclasses import dataclass

from mechedit.errors import check_at_least, check_positive


@dataclass(frozen=True, kw_only=True)
class MomentsConfig:
    """How to read the text. Beyond rounding, none of it but the first two changes the result."""

    max_length: int = 1024
    """Tokens of a text that are read; the rest is dropped. The model's own limit holds if it is less."""
    tokens: int | None = None
    """Stop after this many tokens (special ones not counted); None reads all texts."""
    batch_tokens: int = 8192
    """Tokens whose keys are held together, and most in one forward pass; less needs less memory."""
    memory: float | int | None = None
    """Most GiB that collecting may take beside the weights and the finished matrices (an estimate): with less,
    batches shrink and the layers are collected in several passes."""
    checkpoint_seconds: float | int = 60
    """Least time between checkpoints; they are fewer where writing them would take over 2 % of the time."""

    def __post_init__(self) -> None:
        check_at_least("max_length", self.max_length, 1)
        check_at_least("tokens", self.tokens, 1, optional=True)
        check_at_least("batch_tokens", self.batch_tokens, 1)
        check_positive("memory", self.memory, "choose a number of GiB", optional=True)
        check_at_least("checkpoint_seconds", self.checkpoint_seconds, 0)
