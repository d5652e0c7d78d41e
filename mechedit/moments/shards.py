"""The text in shards of 256 documents, a split that no other setting changes, and each shard in batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mechedit.errors import InputError
from mechedit.moments.config import MomentsConfig

SHARD = 256
"""Texts of a shard. They are sorted by length together, so that batches hold little padding."""


class Place(NamedTuple):
    """How far one layer's sum has come: earlier shards, and the first rows of this one."""

    shard: int = 0
    row: int = 0
    before: int = 0
    """Tokens of the budget that earlier shards took, also those that other processes read."""


class Share(NamedTuple):
    """Shards `index`, `index` + `count`, … are one process's share."""

    index: int = 0
    count: int = 1

    @staticmethod
    def of(index: int, count: int) -> Share:
        """A share that exists.

        Raises:
            InputError: there is no such one.
        """
        if not 0 <= index < count:
            raise InputError(f"the shard is {index}/{count}, expected one of 0/{count} … {max(count, 1) - 1}/{count}")
        return Share(index, count)


START, WHOLE = Place(), Share()
"""Nothing summed yet; all of the text."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """The token ids of some consecutive texts."""

    index: int
    rows: list[list[int]]
    """Longest first; texts without tokens have none."""
    before: int
    """Tokens of the budget that earlier shards took."""
    texts: int
    """Texts that were read."""


def read_shards(
    tokenizer: Any,
    texts: Sequence[str],
    config: MomentsConfig,
    limit: int,
    share: Share = WHOLE,
    start: Place = START,
) -> Iterator[Shard]:
    """The shards of `share` from `start` on, each tokenized once, until the budget is spent.

    Args:
        tokenizer: the model's.
        texts: all of the text.
        config: holds the budget.
        limit: tokens of a text that are read.
        share: which shards; others are tokenized only where they must be counted for the budget.
        start: the shard to begin with, and what went before it.
    """
    special, gone = set(tokenizer.all_special_ids), start.before
    for index in range(start.shard, -(-len(texts) // SHARD)):
        left = None if config.tokens is None else config.tokens - gone
        own = index % share.count == share.index
        if left == 0:
            return
        if not own and left is None:
            continue
        chosen = [text for text in texts[index * SHARD : (index + 1) * SHARD] if text.strip()]
        rows, taken = _within(left, _encoded(tokenizer, chosen, limit), special)
        if own:
            yield Shard(index=index, rows=sorted(rows, key=len, reverse=True), before=gone, texts=len(chosen))
        gone += taken


def batches(shard: Shard, batch_tokens: int, first: int, stops: Collection[int]) -> Iterator[slice]:
    """The rows from `first` on, as many together as `batch_tokens` allows (at least one).

    A batch ends at a row in `stops`, so that no sum that has come so far counts a row twice.
    """
    while first < len(shard.rows):
        end, held = first, 0
        while end < len(shard.rows) and (end == first or held + len(shard.rows[end]) <= batch_tokens):
            held, end = held + len(shard.rows[end]), end + 1
            if end in stops:
                break
        yield slice(first, end)
        first = end


def _encoded(tokenizer: Any, texts: list[str], limit: int) -> list[list[int]]:
    if not texts:
        return []
    found = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
    return [list(ids) for ids in found if ids]


def _within(budget: int | None, rows: list[list[int]], special: set[int]) -> tuple[list[list[int]], int]:
    """The rows until `budget` tokens that are not special have gone by, the last one cut, and how many have."""
    kept: list[list[int]] = []
    taken = 0
    for ids in rows:
        places = [place for place, token in enumerate(ids) if token not in special]
        if budget is not None and taken + len(places) >= budget:
            return [*kept, ids[: places[budget - taken - 1] + 1]], budget
        kept.append(ids)
        taken += len(places)
    return kept, taken
