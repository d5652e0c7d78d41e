"""Tuning on the tiny model: better than a bad default, no worse than a good one, resumed to the letter."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.models import SENTENCES

import mechedit.sweep.sweep
from mechedit import (
    EditRequest,
    InputError,
    MemitConfig,
    Neighbor,
    TuneConfig,
    collect_moments,
    edited,
    evaluate,
    load_model,
    load_requests,
    load_texts,
    memit,
    recommended,
    tune,
)
from mechedit.evaluation import QUICK
from mechedit.files import plain_copy
from mechedit.methods.tuned_settings import record_hash
from mechedit.sweep import Window, sweep_windows
from mechedit.tuning import tuned_windows, tuning_facts
from mechedit.tuning.trial import Trial, central, preferred
from mechedit.tuning.tried_windows import halfway_ends, widths_of

TUNED_WITH = ("plant", "colour", "stone", "instrument")
"""Relations of the facts that are tuned with; facts of the others, about other subjects, judge the result."""
UNTUNED_LAYERS = [1, 2, 3, 4]
"""The layers that the trace of the tiny model selects."""
BAD = MemitConfig(relative_covariance_weight=1000.0, clamp=2.0, kl_prompt="{}", steps=15, generated_prefixes=0)
"""Settings with which nothing is written: λ is too large."""
GOOD_BUDGET = TuneConfig(edits=12, facts=6, windows=(Window(1, 4), Window(5, 6)))
SENTENCE = "The mother tongue of {} is"
NAMES = ("Danielle Darrieux", "Leon Blum", "Toko Yasuda", "Miles Davis", "LeBron James")
REQUESTS = [
    EditRequest(
        id=name, subject=name, prompt=SENTENCE, target_new="Korean", target_true="French",
        neighbors=(Neighbor(prompt="The mother tongue of Edwin is", object="French"),),
    )
    for name in NAMES
]  # fmt: skip
"""For a random model, on which all mechanics can be seen."""
SMALL = MemitConfig(steps=3, relative_lr=1.0, clamp=4.0, generated_prefixes=1)
BUDGET = TuneConfig(edits=30, windows=(Window(0, 0), Window(0, 1)))


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_model("tiny")


@pytest.fixture(scope="module")
def moments(tiny: Any) -> Mapping[int, Any]:
    return collect_moments(tiny, list(load_texts("tiny"))[:250], [1, 2, 3, 4, 5, 6])


@pytest.fixture(scope="module")
def facts() -> tuple[list[EditRequest], list[EditRequest]]:
    """Facts to tune with, and 10 others of other relations about other subjects; few prompts each."""
    requests = [
        dataclasses.replace(request, paraphrases=request.paraphrases[:1], neighbors=request.neighbors[:2])
        for request in load_requests("tiny")
    ]
    tuned_with = [request for request in requests if request.relation in TUNED_WITH]
    subjects = {request.subject for request in tuned_with}
    others = [request for request in requests if request.relation not in TUNED_WITH and request.subject not in subjects]
    return tuned_with, others[:10]


def score(model: Any, requests: Sequence[EditRequest], layers: Sequence[int], moments: Any, config: Any) -> float:
    with edited(model, memit(model, requests, list(layers), moments, config=config)):
        return evaluate(model, requests, QUICK).summary()["S"]["mean"]


def test_a_bad_default_is_improved_on_facts_and_relations_that_were_not_used(
    tiny: Any, moments: Any, facts: Any
) -> None:
    tuned = tune(tiny, facts[0], moments, config=BAD, tuning=GOOD_BUDGET)
    others = facts[1]
    assert not {request.relation for request in others} & {request.relation for request in facts[0]}
    assert score(tiny, others, UNTUNED_LAYERS, moments, BAD) < 20, "the control: with these settings nothing is written"
    assert score(tiny, others, tuned.layers, moments, tuned.config) > 80
    assert tuned.config.relative_covariance_weight <= 1
    assert tuned.layers == (1, 2, 3, 4), "the MLPs of layers 5 and 6 hold nothing"


def test_tuned_settings_are_no_worse_than_good_ones_on_facts_and_relations_that_were_not_used(
    tiny: Any, moments: Any, facts: Any
) -> None:
    good = dataclasses.replace(recommended("memit", tiny), steps=15, generated_prefixes=0)
    before = tiny.weights_hash()
    tuned = tune(tiny, facts[0], moments, config=good, tuning=GOOD_BUDGET)
    assert tiny.weights_hash() == before
    untuned = score(tiny, facts[1], UNTUNED_LAYERS, moments, good)
    assert untuned > 80, "the control: the default is a good one"
    assert score(tiny, facts[1], tuned.layers, moments, tuned.config) >= untuned - 1


@pytest.fixture(scope="module")
def small(make_model: Any) -> Any:
    """A random model with larger weights, in which edits do something."""
    return make_model("gpt2", initializer_range=0.05)


@pytest.fixture(scope="module")
def small_moments(small: Any) -> Mapping[int, Any]:
    return collect_moments(small, SENTENCES, [0, 1])


@pytest.fixture(scope="module")
def searched(small: Any, small_moments: Any) -> tuple[Any, list[str]]:
    """What a search that nothing interrupts finds, and the lines that it says."""
    lines: list[str] = []
    return tune(small, REQUESTS, small_moments, config=SMALL, tuning=BUDGET, notify=lines.append), lines


def test_an_interrupted_search_goes_on_and_gives_the_same(
    small: Any, small_moments: Any, searched: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = {"config": SMALL, "tuning": BUDGET}
    at_once, lines = searched
    assert "end layers with" in lines[0]
    assert at_once.record["edits"] <= BUDGET.edits, "the budget holds"
    assert at_once.record["edits"] == sum(trial["edits"] for trial in at_once.record["trials"])
    calls: list[int] = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) in (3, 7):
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    monkeypatch.setattr(mechedit.sweep.sweep, "evaluate", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tune(small, REQUESTS, small_moments, **arguments, folder=tmp_path)
    resumed = tune(small, REQUESTS, small_moments, **arguments, folder=tmp_path)
    n_resumed = len(calls)
    assert record_hash(plain_copy(resumed.record)) == record_hash(plain_copy(at_once.record))
    again = tune(small, REQUESTS, small_moments, **arguments, folder=tmp_path)
    assert len(calls) == n_resumed, "finished trials are read"
    assert record_hash(plain_copy(again.record)) == record_hash(plain_copy(at_once.record))
    seeded = dataclasses.replace(BUDGET, seed=1)
    different = tune(small, REQUESTS, small_moments, config=SMALL, tuning=seeded)
    assert record_hash(plain_copy(different.record)) != record_hash(plain_copy(resumed.record)), "the control"


def test_minutes_become_edits_once(
    small: Any, small_moments: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    minutes = dataclasses.replace(BUDGET, minutes=5, edits=None)
    arguments = {"config": SMALL, "folder": tmp_path}
    lines: list[str] = []
    first = tune(small, REQUESTS, small_moments, tuning=minutes, **arguments, notify=lines.append)
    assert "seconds per edit" in lines[0]
    assert f"--edits {first.record['budget']['edits']} gives the same" in lines[0]
    monkeypatch.setattr("mechedit.tuning.ledger.monotonic", lambda: 1e9)  # another speed would give another plan
    again = tune(small, REQUESTS, small_moments, tuning=minutes, **arguments)
    assert record_hash(plain_copy(again.record)) == record_hash(plain_copy(first.record))
    short = dataclasses.replace(minutes, minutes=1e-9)
    with pytest.raises(InputError, match=r"the budget is 1e-09 minutes, expected at least"):
        tune(small, REQUESTS, small_moments, tuning=short, **arguments)


def test_a_setting_at_the_end_of_what_was_tried_is_warned_of(searched: Any) -> None:
    tuned, _ = searched
    assert "relative_lr" in tuned.record["plan"]["searched"]
    tried = {trial["settings"].get("relative_lr", SMALL.relative_lr) for trial in tuned.record["trials"]}
    assert len(tried) == 3
    warned = any("relative_lr is" in warning for warning in tuned.warnings)
    assert warned == (tuned.config.relative_lr in (min(tried), max(tried)))
    assert all("may lie beyond" in warning for warning in tuned.warnings)
    assert tuned.trials["layers"].map(tuple).nunique() == 2


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (TuneConfig(edits=5), "the budget is 5 edits, expected at least"),
        (TuneConfig(edits=200, width=11), "11 layers are wanted, expected at most all 10|no window of 11 layers fits"),
        (TuneConfig(edits=200, windows=(Window(8, 12),)), "the window 8-12 does not lie in the model"),
        (TuneConfig(edits=200, windows=(Window(6, 8),)), r"there are no second moments of \[7, 8\]"),
    ],
)
def test_what_cannot_be_tuned_is_refused(tiny: Any, moments: Any, facts: Any, budget: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tune(tiny, facts[0], moments, tuning=budget)


def test_too_few_facts_and_methods_without_windows_are_refused(tiny: Any, moments: Any, facts: Any) -> None:
    with pytest.raises(InputError, match="there are 1 subjects among the 2 requests, expected at least 4"):
        tune(tiny, [facts[0][0]] * 2, moments)
    for method in ("rome", "ft"):
        with pytest.raises(InputError, match="expected one of memit, emmet, alphaedit, pmet"):
            tune(tiny, facts[0], moments, method=method)


def test_scores_that_are_all_equal_are_refused(small: Any, small_moments: Any) -> None:
    nothing = MemitConfig(steps=1, relative_lr=1e-12, clamp=1e-12, generated_prefixes=0)
    with pytest.raises(InputError, match=r"all \d+ trials of windows score the same"):
        tune(small, REQUESTS, small_moments, config=nothing, tuning=BUDGET)


def test_facts_are_one_per_subject_and_more_begin_with_fewer(facts: Any) -> None:
    few, more = (tuning_facts(facts[0], TuneConfig(facts=count)) for count in (5, 20))
    assert more[:5] == few
    assert len({request.subject for request in more}) == 20
    assert tuning_facts(facts[0], TuneConfig(facts=5, seed=1)) != few


def test_windows_lie_within_the_moments_and_leave_the_last_layer_out(tiny: Any) -> None:
    windows = tuned_windows(tiny, range(10), TuneConfig())
    assert {window.width for window in windows} == {2}
    assert {windows[0], windows[-1]} == {(0, 1), (7, 8)}
    assert tuned_windows(tiny, range(5), TuneConfig(width=3)) == [(0, 2), (1, 3), (2, 4)]
    with_candidate = tuned_windows(tiny, range(5), TuneConfig(width=3), candidates=[(1, 4), (0, 9)])
    assert set(with_candidate) - set(tuned_windows(tiny, range(5), TuneConfig(width=3))) == {(1, 4)}


DRAWS = np.linspace(80, 90, 101)


def trial(gain: Any, window: tuple[int, int] = (1, 2), value: float = 0.2) -> Trial:
    """A trial that is better by so much on every resample."""
    scored = DRAWS + gain
    return Trial(
        stage="",
        window=Window(*window),
        changes={"relative_lr": value},
        facts=9,
        scores={},
        objective=float(scored.mean()),
        draws=scored,
    )


def test_a_setting_is_left_as_it_was_unless_another_is_worth_it_on_most_resamples() -> None:
    current = trial(0.0)
    assert preferred(current, [trial(0.01, value=0.4)]) is current, "what decides ties is no reason"
    better = trial(1.0, value=0.1)
    assert preferred(current, [trial(0.01, value=0.4), better]) is better
    lucky = trial(np.where(np.arange(101) < 30, 10.0, 0.0), value=0.05)
    assert lucky.objective > better.objective, "better on average, and on three of ten resamples"
    assert preferred(current, [lucky]) is current


def test_of_windows_about_as_good_the_middle_one_is_taken() -> None:
    first, middle, last = trial(0.4, (0, 3)), trial(0.0, (1, 4)), trial(0.1, (2, 5))
    far = trial(-20.0, (7, 10))
    assert central([first, middle, last, far]) is middle
    assert central([first, far]) is first
    clear = trial(9.0, (0, 3))
    assert central([clear, middle, last, far]) is clear, "the control: one that is better is taken"
    unsure = trial(np.where(np.arange(101) < 60, 20.0, 0.0), (0, 3))
    assert preferred(middle, [unsure]) is middle
    assert central([unsure, middle, last]) is unsure, "12 points better, on six of ten resamples"


def test_a_window_that_a_trace_selected_is_tried_with_all_facts(small: Any, small_moments: Any) -> None:
    budget = TuneConfig(edits=60, width=1)
    tuned = tune(small, REQUESTS, small_moments, config=SMALL, tuning=budget, selected=(0, 1))
    assert tuned.record["edits"] <= 60
    tried = {tuple(trial["layers"]) for trial in tuned.record["trials"] if trial["facts"] == len(REQUESTS)}
    assert (0, 1) in tried


def test_a_window_that_a_trace_selected_is_left_where_another_is_preferred(tiny: Any, moments: Any, facts: Any) -> None:
    good = dataclasses.replace(recommended("memit", tiny), steps=15, generated_prefixes=0)
    tuned = tune(tiny, facts[0], moments, config=good, tuning=GOOD_BUDGET, selected=(5, 6))
    assert tuned.layers == (1, 2, 3, 4), "the MLPs of layers 5 and 6 hold nothing"


def test_other_widths_end_like_the_window_and_lie_within_the_moments() -> None:
    assert widths_of(Window(3, 5), range(18)) == [(5, 5), (4, 5), (2, 5), (1, 5), (0, 5)]
    assert widths_of(Window(3, 5), range(2, 18)) == [(5, 5), (4, 5), (2, 5)]
    assert widths_of(Window(0, 0), range(18)) == []


def test_end_layers_beside_the_best_lie_halfway_to_those_that_were_tried() -> None:
    assert halfway_ends(12, range(30), {4, 9, 12, 15, 28}, 2) == [10, 14]
    assert halfway_ends(12, range(30), {4, 9, 12, 15, 28}, 1) == [10]
    assert halfway_ends(4, range(4, 30), {4, 12}, 2) == [8], "there is none below"
    assert halfway_ends(12, range(30), {8, 12, 13}, 2) == [10], "no layer is between neighbors"
    # Where no window ends halfway, the nearest does, and not none.
    assert halfway_ends(12, [0, 4, 9, 12, 13, 20], {4, 12, 20}, 2) == [9, 13]


def test_speed_is_measured_as_if_nothing_had_been_searched_for(
    small: Any, small_moments: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tune(small, REQUESTS, small_moments, config=SMALL, tuning=BUDGET, folder=tmp_path)
    folders: list[tuple[Path, Path | None]] = []

    def recorded(*arguments: Any, **options: Any) -> Any:
        folders.append((Path(options["cache"]), options["parts"]))
        return sweep_windows(*arguments, **options)

    monkeypatch.setattr(sys.modules["mechedit.tuning.search"], "sweep_windows", recorded)
    minutes = dataclasses.replace(BUDGET, minutes=5, edits=None)
    tune(small, REQUESTS, small_moments, config=SMALL, tuning=minutes, folder=tmp_path)
    (apart, parts), *rest = folders[:4]
    assert parts is None
    assert not apart.is_relative_to(tmp_path), "targets of the search would look as if they cost nothing"
    assert not apart.exists()
    assert rest == [(apart, None)] * 3
    assert folders[4][0].is_relative_to(tmp_path), "the control: the search itself keeps what it does"


@pytest.mark.parametrize("budget", [BUDGET, dataclasses.replace(BUDGET, minutes=5, edits=None)])
def test_a_round_without_a_window_that_can_be_edited_ends_the_search_in_one_line(
    small: Any, small_moments: Any, monkeypatch: pytest.MonkeyPatch, budget: TuneConfig
) -> None:
    def singular(model: Any, requests: Any, *arguments: Any, **options: Any) -> Any:
        if len(requests) > 3:
            raise InputError("none of the 2 windows can be edited; layer 0: keys are linearly dependent")
        return sweep_windows(model, requests, *arguments, **options)

    monkeypatch.setattr(sys.modules["mechedit.tuning.search"], "sweep_windows", singular)
    monkeypatch.setattr("mechedit.tuning.timing.FACTS", 3)
    lines: list[str] = []
    with pytest.raises(InputError, match=r"no window can be edited with \d facts: none of the 2 windows"):
        tune(small, REQUESTS, small_moments, config=SMALL, tuning=budget, notify=lines.append)
    assert sum("left out" in line for line in lines) == 1


def test_layers_without_second_moments_are_said_not_to_be_tried(small: Any, small_moments: Any) -> None:
    lines: list[str] = []
    arguments: dict[str, Any] = {"config": SMALL, "notify": lines.append}
    tune(small, REQUESTS, {0: small_moments[0]}, **arguments, tuning=TuneConfig(edits=30, width=1))
    assert [line for line in lines if line.startswith("there are no second moments of layers 1, so that")], lines
    lines.clear()
    tune(small, REQUESTS, small_moments, **arguments, tuning=BUDGET)
    assert not [line for line in lines if "second moments" in line], "the control: windows that were asked for"
