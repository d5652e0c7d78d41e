"""Batches keep every item, in order, and waste little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechedit.batching import batches_of, group_by_shape, length_batches, pad, run_in_halves


def test_batches_are_padded_at_the_right(tokenizer: Any) -> None:
    tokens = pad([[5, 6, 7], [8]], tokenizer)
    assert tokens.ids.tolist() == [[5, 6, 7], [8, tokenizer.pad_token_id, tokenizer.pad_token_id]]
    assert tokens.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert tokens.lengths.tolist() == [3, 1]


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=20), spare=st.integers(0, 40), most=st.integers(1, 100))
def test_length_batches_hold_little_padding(sizes: list[int], spare: int, most: int) -> None:
    rows = [[index] * size for index, size in enumerate(sorted(sizes, reverse=True))]
    batches = list(length_batches(rows, spare, most))
    assert [row for batch in batches for row in batch] == rows
    for batch, after in zip(batches, [*batches[1:], None], strict=True):
        width = len(batch[0])
        padding = [width * count - sum(len(row) for row in batch[:count]) for count in range(1, len(batch) + 1)]
        assert len(batch) == 1 or (padding[-1] <= spare and width * len(batch) <= most)
        if after:
            more = width * (len(batch) + 1)
            assert padding[-1] + width - len(after[0]) > spare or more > most, "it ends only where it must"


def test_items_are_grouped_by_shape_in_order_of_the_first() -> None:
    matrices = [torch.zeros(size) for size in (3, 5, 3, 5, 3, 3)]
    groups = [[id(matrix) for matrix in group] for group in group_by_shape(matrices, 2, len)]
    assert groups == [[id(matrices[i]) for i in batch] for batch in ((0, 2), (4, 5), (1, 3))]


def test_batches_of_a_size_end_with_a_smaller_one() -> None:
    assert list(batches_of("abcdefg", 3)) == ["abc", "def", "g"]
    assert list(batches_of((), 4)) == []


@pytest.mark.parametrize("capacity", [1, 2, 3, 8])
def test_a_batch_that_does_not_fit_is_run_in_halves(capacity: int) -> None:
    attempts = []

    def run(batch: list[int]) -> list[int]:
        attempts.append(len(batch))
        if len(batch) > capacity:
            raise torch.OutOfMemoryError
        return [10 * item for item in batch]

    batches = [list(range(7)), [7]]
    assert [item for result in run_in_halves(batches, run) for item in result] == [10 * item for item in range(8)]
    assert (len(attempts) == 2) == (capacity >= 7), "a batch that fits is run once"


def test_a_run_that_returns_nothing_is_not_repeated() -> None:
    runs: list[list[int]] = []
    assert list(run_in_halves([[1, 2], [3]], runs.append)) == [None, None]
    assert runs == [[1, 2], [3]]


def test_one_item_that_does_not_fit_is_an_error() -> None:
    def run(batch: list[int]) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        list(run_in_halves([[1, 2]], run))
