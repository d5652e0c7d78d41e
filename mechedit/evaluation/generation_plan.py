"""How texts are written together, and what that takes, told before it starts.

All rows of a batch begin with as many tokens as its shortest prompt has. The longer prompts then read their own next
tokens while the shorter ones write, so nothing is padded and no position shifts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from mechedit.models import Model

ANNOUNCED = 1e11
"""Multiply-adds from which a plan is announced; about ten seconds on one core."""


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """Batches of prompts of about the same length, and the runs of the model that writing takes."""

    lengths: tuple[int, ...]
    """Tokens of each prompt."""
    tokens: int
    """Most new tokens per text."""
    batches: tuple[tuple[int, ...], ...]
    """Indices of the prompts written together, the shortest first."""

    @property
    def runs(self) -> int:
        """Most forward passes: one per new token of a batch, and one per token by which its prompts differ."""
        return sum(self.tokens + self._spread(batch) for batch in self.batches)

    @property
    def tokens_run(self) -> int:
        """Most tokens that go through the model, those of the prompts included."""
        return sum(len(batch) * (self.lengths[batch[-1]] + self.tokens) for batch in self.batches)

    def __str__(self) -> str:
        batches = "one batch" if len(self.batches) == 1 else f"{len(self.batches)} batches"
        return (
            f"{len(self.lengths)} texts of up to {self.tokens} new tokens in {batches}: at most {self.runs} forward "
            f"passes"
        )

    def announce(self, model: Model) -> None:
        """Say on the standard error what the plan takes, with a measured estimate, if it takes long."""
        if self.batches and self.tokens_run * _parameters(model) >= ANNOUNCED:
            line = f"writing {self}, at most about {_duration(self.seconds(model))}"
            tqdm.write(f"{line}\n", file=sys.stderr, end="")

    def seconds(self, model: Model) -> float:
        """Most seconds that writing takes, from one pass of each batch size that is timed."""
        sizes = [len(batch) for batch in self.batches]
        by_size = {size: _seconds_per_run(model, size) for size in {min(sizes), max(sizes)}}
        nearest = [min(by_size, key=lambda size, rows=rows: abs(size - rows)) for rows in sizes]
        return sum(
            by_size[size] * (self.tokens + self._spread(batch))
            for size, batch in zip(nearest, self.batches, strict=True)
        )

    def _spread(self, batch: Sequence[int]) -> int:
        return self.lengths[batch[-1]] - self.lengths[batch[0]]


def plan_generation(lengths: Sequence[int], tokens: int, batch_size: int) -> GenerationPlan:
    """Put prompts into batches.

    Two batches in place of one save the passes in which the shorter prompts wait for the longer ones, and cost `tokens`
    more. So prompts are together that differ by at most half as many tokens.

    Args:
        lengths: tokens of each prompt.
        tokens: most new tokens per text.
        batch_size: most texts in a batch.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        last = batches[-1] if batches else None
        if last is None or len(last) == batch_size or 2 * (lengths[index] - lengths[last[0]]) > tokens:
            batches.append(last := [])
        last.append(index)
    return GenerationPlan(lengths=tuple(lengths), tokens=tokens, batches=tuple(map(tuple, batches)))


def _parameters(model: Model) -> int:
    return sum(parameter.numel() for _, parameter in model.named_parameters())


def _seconds_per_run(model: Model, rows: int) -> float:
    """Seconds of one pass with one new token in each of some rows."""
    ids = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
    _, cache = model.next_logits(ids, torch.ones_like(ids))
    begin = time.perf_counter()
    logits, _ = model.next_logits(ids, torch.ones_like(ids).repeat(1, 2), cache)
    logits.argmax(-1).tolist()  # an accelerator answers once it has finished
    return time.perf_counter() - begin


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
