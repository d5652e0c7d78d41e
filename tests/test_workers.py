"""Passes that run at once give what passes in turn give, and leave no trace of their threads."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import mechedit as me
from mechedit.batching import block_parameters
from mechedit.models import Tokens, load_model
from mechedit.models.engine_check import SWITCH
from mechedit.targets.objective import LossTerms, prepare_objective
from mechedit.targets.subject_groups import subject_groups
from mechedit.trace import Approximation
from mechedit.trace.cells import _split, trace_group
from mechedit.trace.restore import Cell
from mechedit.trace.traced_fact import tokenize_fact
from mechedit.workers import MOST, n_workers, run_batches

PATIENCE = 20.0
"""Seconds after which a thread that waits for another gives up."""


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> me.Model:
    model = me.load_model("tiny", device="cpu")
    assert model.runs_at_once
    return model


def test_two_passes_run_at_once_in_one_thread_each(model: me.Model) -> None:
    both = threading.Barrier(2)

    def run(batch: list[int]) -> tuple[list[int], int]:
        both.wait(PATIENCE)  # breaks unless another batch waits as well
        return [item + 1 for item in batch], torch.get_num_threads()

    assert list(run_batches(model, [[1], [2, 3], [4], [5]], run)) == [([2], 1), ([3, 4], 1), ([5], 1), ([6], 1)]
    assert torch.get_num_threads() == 2


def test_passes_of_one_thread_run_in_turn(model: me.Model) -> None:
    torch.set_num_threads(1)
    threads = list(run_batches(model, [[1], [2]], lambda batch: threading.current_thread()))
    assert threads == [threading.current_thread()] * 2


def test_there_are_no_more_workers_than_threads_and_most(model: me.Model) -> None:
    assert n_workers(model) == 2
    torch.set_num_threads(MOST + 1)
    assert n_workers(model) == MOST


def test_all_cores_compute_one_pass_of_large_blocks(model: me.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechedit.workers.LARGE_BLOCK", block_parameters(model))
    assert n_workers(model) == 1
    monkeypatch.setattr("mechedit.workers.LARGE_BLOCK", block_parameters(model) + 1)
    assert n_workers(model) == 2


def test_batches_of_cells_come_in_a_multiple_of_the_workers() -> None:
    cells = [Cell("state", "nothing", layer, 0, 3, layer, layer + 1) for layer in range(23)]
    for most, workers, expected in ((23, 2, 2), (23, 1, 1), (12, 2, 2), (8, 2, 4), (8, 1, 3), (1, 2, 23), (9, 4, 4)):
        batches = list(_split(cells, lambda cell: 30, most, 10**6, workers))
        assert len(batches) == expected
        assert sorted(cell for batch in batches for cell in batch) == cells
        sizes = [len(batch) for batch in batches]
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= 1


def test_batches_of_cells_have_equally_many_tokens() -> None:
    """Cells of 230 to 10 tokens: fewer of them in a batch where they have more, and never more than allowed."""
    cells = [Cell("state", "nothing", layer, 0, layer, layer, layer + 1) for layer in range(23)]

    def split(*limits: int, tokens: int = 10) -> tuple[list[int], list[int]]:
        batches = list(_split(cells, lambda cell: tokens * (23 - cell.position), *limits))
        assert sorted(cell for batch in batches for cell in batch) == cells
        return [len(batch) for batch in batches], [sum(23 - cell.position for cell in batch) for batch in batches]

    for most_tokens, workers in ((700, 1), (700, 2), (300, 2)):
        sizes, tokens = split(23, most_tokens, workers)
        assert len(sizes) % workers == 0
        assert max(tokens) <= most_tokens / 10 + 23
        # Two cells more in a round, one more of them for a worker.
        assert max(tokens) - min(tokens) <= 1.5 * 23
        assert sizes[0] < sizes[-1]
    sizes, _ = split(4, 10_000, 2)
    assert max(sizes) <= 4
    assert len(split(23, 10_000, 2)[0]) == 2
    assert len(split(23, 10_000, 2, tokens=1)[0]) == 1, "few tokens are not worth two passes"


def test_a_model_whose_modules_are_replaced_runs_in_turn(
    monkeypatch: pytest.MonkeyPatch, make_hf: Any, tokenizer: Any
) -> None:
    monkeypatch.setenv(SWITCH, "modules")
    model: Any = load_model(make_hf("gpt2"), tokenizer=tokenizer, backend="nnsight")
    assert model.fast_engine.way == "modules"
    assert not model.runs_at_once
    assert n_workers(model) == 1
    assert model.fast_engine.prepare("operations")
    assert n_workers(model) == 2, "its operations run at once"


@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize("is_grad", [False, True])
def test_a_pass_runs_in_the_modes_of_its_caller(model: me.Model, is_inference: bool, is_grad: bool) -> None:
    with torch.inference_mode(is_inference), torch.set_grad_enabled(is_grad):
        modes = run_batches(
            model, [[1], [2]], lambda batch: (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        )
        assert set(modes) == {(is_inference, is_grad)}


def test_batches_are_run_in_halves_where_they_do_not_fit(model: me.Model) -> None:
    def run(batch: list[int]) -> list[int]:
        if len(batch) > 1:
            raise torch.OutOfMemoryError
        return batch

    assert list(run_batches(model, [[1, 2], [3]], run)) == [[1], [2], [3]]


def test_an_error_ends_all(model: me.Model) -> None:
    begun: list[int] = []

    def run(batch: list[int]) -> None:
        begun.extend(batch)
        raise me.InputError(f"batch {batch} is refused")

    with pytest.raises(me.InputError, match=r"\[0\]"):
        list(run_batches(model, [[number] for number in range(50)], run))
    assert len(begun) < 50, "what has not begun never does"
    assert torch.get_num_threads() == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mechedit")]


def test_results_that_nobody_takes_leave_the_threads_as_they_were(model: me.Model) -> None:
    results = run_batches(model, [[1], [2], [3]], lambda batch: batch)
    assert next(results) == [1]
    assert torch.get_num_threads() == 1
    results.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.get_num_threads() == 2


def test_a_search_gives_the_same_z_by_two_workers(model: me.Model) -> None:
    requests, config = me.load_requests("tiny")[:16], me.TargetConfig(steps=4)
    prefixes = ["{}", "So, it is said. {}", "Also, {}"]
    groups = subject_groups(model.tokenizer, requests, config)
    delta = torch.randn(len(groups), 1, model.d_model, generator=torch.Generator().manual_seed(0))

    def searched(threads: int) -> tuple[int, LossTerms, torch.Tensor]:
        torch.set_num_threads(threads)
        objective = prepare_objective(model, groups, 4, prefixes, config)
        terms = objective.loss_terms(delta, gradient=True)
        targets = me.find_targets(model, requests, 4, prefixes, config)
        return len(objective.batches), terms, targets.z - targets.initial

    (count, expected, expected_delta), (more, terms, moved) = searched(1), searched(2)
    assert count < more
    torch.testing.assert_close(terms.values, expected.values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms.gradient, expected.gradient, atol=1e-6, rtol=1e-5)
    # Adam divides small gradients by their size, rounding included.
    assert (moved - expected_delta).norm() < 1e-5 * expected_delta.norm()
    for _ in range(2):
        assert torch.equal(searched(2)[2], moved), "whichever of the workers is first"


def test_a_trace_gives_the_same_numbers_by_two_workers(model: me.Model) -> None:
    facts = me.load_facts("known")[:2]
    config = me.TraceConfig(
        samples=2, kinds=("state", "mlp"), sever=("nothing", "attn"), roles=("subject_last", "last")
    )

    def scores(threads: int) -> np.ndarray:
        torch.set_num_threads(threads)
        return me.trace_facts(model, facts, config)["score"].to_numpy()

    expected = scores(1)
    assert np.ptp(expected) > 0.1, "cells differ"
    np.testing.assert_allclose(scores(2), expected, atol=2e-6)


def ways_to_the_workers(model: me.Model) -> dict[str, Callable[[], object]]:
    """All that runs batches at once, called by itself."""
    facts, requests, prefixes = (
        me.load_facts("known")[:1],
        me.load_requests("tiny")[:16],
        ["{}", "So, it is said. {}", "Also, {}"],
    )
    traced, cells = [tokenize_fact(model, facts[0])], me.TraceConfig(samples=2, batch_rows=8, kinds=("state",))
    approximated = dataclasses.replace(cells, approximation=Approximation(least_correlation=0.0))
    return {
        "a traced group": lambda: trace_group(model, traced, 0.1, cells),
        "an approximated group": lambda: me.trace_facts(model, facts, approximated),
        "a search": lambda: me.find_targets(model, requests, 4, prefixes, me.TargetConfig(steps=2)),
        "moments": lambda: me.collect_moments(model, list(me.load_texts("tiny"))[:100], [4]),
    }


WAYS = ("a traced group", "an approximated group", "a search", "moments")


@pytest.mark.parametrize("way", WAYS)
def test_batches_run_the_model_at_once_whoever_begins(model: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in no region is alone with the model; so whatever has batches must hold it around them."""
    both, running, changed, plain = threading.Event(), set(), threading.Lock(), model.fast_engine.run

    def run(plan: Any) -> Any:
        thread = threading.current_thread()
        if not thread.name.startswith("mechedit"):
            return plain(plan)
        with changed:
            running.add(thread.name)
            if len(running) == 2:
                both.set()
        assert both.wait(PATIENCE), "no other thread runs the model"
        try:
            return plain(plan)
        finally:
            with changed:
                running.discard(thread.name)

    make = ways_to_the_workers(model)[way]
    monkeypatch.setattr(model.fast_engine, "run", run)
    make()
    assert both.is_set()


def test_what_is_recorded_of_a_batch_is_recorded_once_by_many_threads(model: Any) -> None:
    """Runs on new batches replace forwards while others run; none sees another's."""
    encoded = [model.tokenizer("The capital of France is Paris, and so on.")["input_ids"][: 3 + n] for n in range(6)]
    batches = [torch.tensor([ids]) for ids in encoded]

    def logits(batch: torch.Tensor) -> torch.Tensor:
        return model.run(Tokens(batch, torch.ones_like(batch))).logits

    torch.set_num_threads(1)
    expected = [logits(batch) for batch in batches]
    torch.set_num_threads(4)
    for _ in range(5):
        model.fast_engine._arguments.clear()
        for result, right in zip(run_batches(model, batches, logits), expected, strict=True):
            torch.testing.assert_close(result, right, atol=1e-5, rtol=1e-5)
