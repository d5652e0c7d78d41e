"""Whether a goal is reached, and that results are stored with where they come from."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from benchmarks.measurement import Measurement, summary
from benchmarks.page import PAGE, page
from benchmarks.results import RESULTS, add_results, read_results

LINE = Measurement(
    shape="llama", about="a model", step="targets", what="12 facts", unit="s", published=80.0, mechedit=10.0,
    difference=1e-6, tolerance=1e-4, quotient=4.0, rate=0.5, memory=(1.0, 0.5), device="cpu", dtype="float32",
    threads=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reached"),
    [
        ({}, True),
        ({"published": 79.0}, False),
        ({"device": "cuda"}, False),
        ({"device": "cuda", "published": 300.0}, True),
        ({"step": "keys", "published": 50.0}, True),
        ({"step": "keys", "published": 49.0}, False),
        ({"step": "trace", "published": 60.0}, True),
        ({"step": "trace", "published": 59.0}, False),
        ({"step": "trace", "published": 59.0, "rate": 0.8}, True),
        ({"step": "severed trio", "published": 20.0, "rate": 0.79}, False),
        ({"step": "targets", "published": 59.0, "rate": 0.9}, False),
        ({"step": "moments", "published": 36.0, "rate": 0.7}, True),
        ({"step": "moments", "published": 36.0, "rate": 0.6}, False),
        ({"step": "moments", "published": 35.0, "rate": 0.7}, False),
        ({"step": "late moments", "published": 35.0, "quotient": 3.8, "rate": 0.7}, True),
        ({"step": "moments", "quotient": None}, None),
        ({"step": "solve"}, None),
    ],
)
def test_a_goal_is_reached_by_ratio_rate_or_quotient(changes: dict[str, object], reached: bool | None) -> None:
    assert dataclasses.replace(LINE, **changes).reached is reached


def test_the_rate_for_a_goal_is_that_at_which_it_is_reached() -> None:
    missed = dataclasses.replace(LINE, published=40.0)
    assert missed.reached is False
    assert missed.rate_for_goal == pytest.approx(1.0)
    faster = dataclasses.replace(missed, mechedit=missed.mechedit / 2, rate=missed.rate_for_goal)
    assert faster.ratio == 8.0
    assert faster.reached
    assert dataclasses.replace(LINE, step="solve").rate_for_goal is None
    assert dataclasses.replace(LINE, step="moments", rate=0.5).rate_for_goal == pytest.approx(2 / 3)


@pytest.mark.parametrize("difference", [1e-3, math.nan, math.inf])
def test_no_goal_is_reached_with_other_numbers(difference: float) -> None:
    line = dataclasses.replace(LINE, difference=difference)
    assert not line.equal
    assert line.reached is False
    assert "NOT EQUAL" in summary([line])


def test_numbers_may_be_as_far_from_float64_as_the_published_ones() -> None:
    rounded = dataclasses.replace(LINE, difference=1e-3, rounding=2e-3)
    assert rounded.reached is True
    assert dataclasses.replace(rounded, rounding=9e-4).reached is False


def test_the_summary_counts_goals() -> None:
    missed = dataclasses.replace(LINE, step="keys", published=20.0)
    lines = summary([LINE, missed, dataclasses.replace(LINE, step="solve")]).splitlines()
    assert lines[-1] == "1 of 2 goals reached"
    assert [line.split()[0] for line in lines[:-1]] == ["reached", "MISSED"]


def test_a_new_result_takes_the_place_of_the_old(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    add_results([LINE, dataclasses.replace(LINE, step="keys")], path)
    newer = dataclasses.replace(LINE, published=90.0)
    on_gpu = dataclasses.replace(LINE, device="cuda")
    add_results([newer, on_gpu], path)
    results = read_results(path)
    assert [result.measurement for result in results] == [newer, dataclasses.replace(LINE, step="keys"), on_gpu]
    assert all(result.commit and result.command and result.machine for result in results)


def test_the_page_is_made_from_the_results() -> None:
    results = read_results()
    assert results, f"{RESULTS} holds the results"
    assert PAGE.read_text(encoding="utf-8") == page(results)
    # Control: a number that changes is seen on the page.
    line = dataclasses.replace(results[0].measurement, published=12345.0)
    assert page([dataclasses.replace(results[0], measurement=line), *results[1:]]) != page(results)
