"""The text in chunks of 256 documents, tokenized chunk by chunk, and each chunk in batches.

The division into chunks depends on the text alone. Several processes share the text by chunks: the process of rank i
of n reads chunks i, i + n, i + 2n, … (the option `--shard i/n`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mechedit.moments.config import MomentsConfig
from mechedit.prompt_tokens import encode_documents
from mechedit.shards import SINGLE_PROCESS, Rank

CHUNK_SIZE = 256
"""Texts per chunk. The texts of a chunk are sorted by length, so that its batches hold little padding."""


class TextPosition(NamedTuple):
    """How far into the text a sum has come: all earlier chunks, and the first sequences of this one."""

    chunk: int = 0
    """Index of the chunk."""
    sequence: int = 0
    """Sequences of the chunk that are summed already."""
    tokens_before: int = 0
    """Tokens of the budget that earlier chunks took, including chunks that other processes read."""


START = TextPosition()
"""The beginning of the text."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """The token ids of up to `CHUNK_SIZE` consecutive texts."""

    index: int
    """Index of the chunk in the text."""
    sequences: list[list[int]]
    """Token ids per text, longest first; texts without tokens have none."""
    tokens_before: int
    """Tokens of the budget that earlier chunks took."""


def n_chunks(texts: Sequence[str]) -> int:
    """Number of chunks in a text."""
    return -(-len(texts) // CHUNK_SIZE)


def read_chunks(
    tokenizer: Any,
    texts: Sequence[str],
    config: MomentsConfig,
    max_length: int,
    rank: Rank = SINGLE_PROCESS,
    start: TextPosition = START,
) -> Iterator[Chunk]:
    """Yield the chunks that a process reads, each tokenized once, until the budget of tokens is spent.

    Args:
        tokenizer: the model's.
        texts: all of the text.
        config: its `tokens` is the budget.
        max_length: tokens read per text.
        rank: whose chunks; others are tokenized only where their tokens must be counted for the budget.
        start: chunk to begin with, and the tokens before it.
    """
    special_ids, tokens_before = set(tokenizer.all_special_ids), start.tokens_before
    for index in range(start.chunk, n_chunks(texts)):
        budget = None if config.tokens is None else config.tokens - tokens_before
        if budget == 0:
            return
        if not rank.reads(index) and budget is None:
            continue
        documents = [text for text in texts[index * CHUNK_SIZE : (index + 1) * CHUNK_SIZE] if text.strip()]
        encoded = [ids for ids in encode_documents(tokenizer, documents, max_length) if ids]
        sequences, n_tokens = _within_budget(budget, encoded, special_ids)
        if rank.reads(index):
            yield Chunk(index=index, sequences=sorted(sequences, key=len, reverse=True), tokens_before=tokens_before)
        tokens_before += n_tokens


def batches(chunk: Chunk, batch_tokens: int, first: int, stops: Collection[int]) -> Iterator[slice]:
    """Yield the sequences from `first` on in batches of up to `batch_tokens` (at least one sequence each).

    A batch ends at every sequence in `stops`: positions that single layers have reached. So no layer has a part of a
    batch summed already.
    """
    while first < len(chunk.sequences):
        end, n_tokens = first, 0
        while end < len(chunk.sequences) and (end == first or n_tokens + len(chunk.sequences[end]) <= batch_tokens):
            n_tokens, end = n_tokens + len(chunk.sequences[end]), end + 1
            if end in stops:
                break
        yield slice(first, end)
        first = end


def _within_budget(
    budget: int | None, sequences: list[list[int]], special_ids: set[int]
) -> tuple[list[list[int]], int]:
    """The sequences that hold the first `budget` tokens, the last one cut, and the number of their tokens.

    Special tokens are not counted.
    """
    within: list[list[int]] = []
    n_tokens = 0
    for ids in sequences:
        counted = [index for index, token in enumerate(ids) if token not in special_ids]
        if budget is not None and n_tokens + len(counted) >= budget:
            return [*within, ids[: counted[budget - n_tokens - 1] + 1]], budget
        within.append(ids)
        n_tokens += len(counted)
    return within, n_tokens
