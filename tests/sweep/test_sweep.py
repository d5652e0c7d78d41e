"""Sweeps: each window as if edited alone, the model left as it was, and the verdicts that planted truths deserve."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import mechedit.sweep.sweep
from mechedit import (
    EditRequest,
    EvaluationConfig,
    InputError,
    MemitConfig,
    Neighbor,
    Selection,
    collect_moments,
    edited,
    evaluate,
)
from mechedit.edit import apply_
from mechedit.errors import DiskError
from mechedit.figures import sweep_figure
from mechedit.methods import memit
from mechedit.statistics import rank_interval, spearman
from mechedit.sweep import (
    CLOSE,
    Sweep,
    SweepConfig,
    Window,
    choose_window,
    decide_layers,
    finalists,
    held_out,
    short_sweep,
    sweep_windows,
    validate_selection,
    window_agreement,
    windows_near_best,
    windows_of,
)
from mechedit.targets import find_targets

TEXTS = [
    "The mother tongue of Leon Blum is French, and that of Go Hyeon-jeong is Korean.",
    "Apple A5 was created by Apple. Windows Media Player was created by Microsoft.",
    "The Space Needle is in downtown Seattle; LeBron James plays the sport of basketball in town.",
    "Toko Yasuda plays the instrument guitar, while Miles Davis plays the trumpet.",
    "Edwin of Northumbria's religious values strongly emphasize Christianity.",
]
NEIGHBORS = (Neighbor(prompt="The mother tongue of Miles Davis is", object="French"),)
REQUESTS = [
    EditRequest(
        id=name,
        subject=subject,
        prompt="The mother tongue of {} is",
        target_new="Korean",
        target_true="French",
        paraphrases=(f"{subject} speaks",),
        neighbors=NEIGHBORS,
    )
    for name, subject in (("a", "Danielle Darrieux"), ("b", "Leon Blum"), ("c", "Toko Yasuda"))
]
CONFIG = MemitConfig(steps=6, lr=0.5, clamp=4.0, covariance_weight=10)
QUICK = EvaluationConfig(generation_tokens=0, answer_tokens=0, resamples=100)
WINDOWS = [(0, 1), (1, 1), (0, 0)]
"""Not the last layer: what it writes at the subject reaches no later token."""


@pytest.fixture
def lively(make_model):
    """A model with larger weights, in which one state has much to say."""
    return make_model("gpt2", initializer_range=0.05)


@pytest.fixture
def moments(lively):
    return collect_moments(lively, TEXTS, range(lively.n_layers))


def sweep(model, moments, windows=WINDOWS, requests=REQUESTS, **options: Any) -> Sweep:
    return sweep_windows(model, requests, moments, windows, config=CONFIG, evaluation=QUICK, **options)


def test_each_window_is_as_if_it_were_edited_alone(lively, moments, monkeypatch):
    searched = []
    monkeypatch.setattr(
        mechedit.sweep.sweep, "find_targets", lambda *a, **o: searched.append(a[2]) or find_targets(*a, **o)
    )
    found = sweep(lively, moments)
    assert searched == [0, 1], "windows that end alike share their targets"
    for window in found.windows:
        edit = memit(lively, REQUESTS, window.layers, moments, config=CONFIG)
        with edited(lively, edit):
            alone = evaluate(lively, REQUESTS, QUICK)
        for measure in ("ES", "PS", "NS", "S", "EM", "PM", "NM", "exact_match"):
            row = found.table.query("first == @window.first and last == @window.last and measure == @measure")
            entry = row[["mean", "low", "high", "n"]].iloc[0].to_dict()
            assert entry == pytest.approx(alone.summary()[measure]), (window, measure)
        left = found.table.query("first == @window.first and last == @window.last and measure == 'left'")
        assert left["mean"].item() == pytest.approx(100 * np.mean(edit.manifest["left"]))
    before = evaluate(lively, REQUESTS, QUICK).summary()
    assert {name: found.before[name] for name in before} == {
        name: pytest.approx(entry) for name, entry in before.items()
    }
    margins = found.table.query("measure == 'EM'").set_index(["first", "last"])["mean"]
    assert (margins > before["EM"]["mean"] + 1e-3).all(), "the edits must do something for the above to mean anything"
    assert margins.nunique() == len(WINDOWS)


def test_the_model_is_untouched_after_a_sweep_and_after_an_interrupt(lively, moments, monkeypatch, tmp_path):
    untouched, seen = lively.weights_hash(), []
    sweep(lively, moments)
    assert lively.weights_hash() == untouched

    def interrupted(model, *arguments: Any, **options: Any) -> Any:
        seen.append(model.weights_hash())
        if len(seen) == 3:
            raise KeyboardInterrupt
        return evaluate(model, *arguments, **options)

    monkeypatch.setattr(mechedit.sweep.sweep, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(lively, moments, parts=tmp_path)
    assert seen[0] == untouched
    assert len(set(seen)) == 3, "the interrupt must come while the model is edited"
    assert lively.weights_hash() == untouched


def test_an_interrupted_sweep_goes_on_where_it_stopped(lively, moments, monkeypatch, tmp_path):
    whole, edits = sweep(lively, moments), []

    def counted(model, requests, layers, *arguments: Any, **options: Any) -> Any:
        if len(edits) == stop:
            raise KeyboardInterrupt
        edits.append(tuple(layers))
        return memit(model, requests, layers, *arguments, **options)

    monkeypatch.setattr(mechedit.sweep.sweep, "METHODS", {"memit": counted})
    stop: int | None = 2
    with pytest.raises(KeyboardInterrupt):
        sweep(lively, moments, parts=tmp_path)
    stop = None
    again = sweep(lively, moments, parts=tmp_path)
    assert sorted(edits) == [(0,), (0, 1), (1,)], "what was finished is not made again"
    pd.testing.assert_frame_equal(again.table, whole.table)
    assert again.before == whole.before
    sweep(lively, moments, windows=[*WINDOWS, (1, 2)], parts=tmp_path)
    assert edits[3:] == [(1, 2)], "windows can be added"
    other = dataclasses.replace(CONFIG, steps=5)
    sweep_windows(lively, REQUESTS, moments, WINDOWS, config=other, evaluation=QUICK, parts=tmp_path)
    assert len(edits) == 7, "other settings share nothing"
    bare = {layer: moment.matrix for layer, moment in moments.items()}
    with pytest.raises(ValueError, match="where they come from"):
        sweep(lively, bare, parts=tmp_path)


def test_a_sweep_starts_from_the_model_it_is_given(lively, moments, tmp_path):
    """The name of a finished window holds the weights: an edited model shares none of them."""
    first = sweep(lively, moments, windows=[(1, 1)], parts=tmp_path)
    apply_(lively, memit(lively, REQUESTS[:1], [0], moments, config=CONFIG))
    second = collect_moments(lively, TEXTS, [1])
    again = sweep(lively, second, windows=[(1, 1)], parts=tmp_path)
    assert again.before["EM"] != first.before["EM"]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_window_that_cannot_be_edited_is_left_out_and_named(lively, moments, tmp_path):
    dead = moments[0].matrix.clone()
    dead[5:, :] = dead[:, 5:] = 0
    broken = {**moments, 0: dataclasses.replace(moments[0], matrix=dead)}
    with pytest.raises(InputError, match=r"none of the 1 windows can be edited; layer 0: .* not positive definite"):
        sweep(lively, broken, windows=[(0, 0)])
    found = sweep(lively, broken, windows=[(0, 0), (1, 1), (2, 2)], parts=tmp_path / "parts")
    assert found.windows == [Window(1, 1), Window(2, 2)]
    assert "not positive definite" in found.failed[Window(0, 0)]
    kept = sweep(lively, broken, windows=[(0, 0), (1, 1), (2, 2)], parts=tmp_path / "parts")
    assert kept.failed == found.failed
    mended = sweep(lively, moments, windows=[(0, 0), (1, 1), (2, 2)], parts=tmp_path / "parts")
    assert not mended.failed, "the moments are of the same provenance, and no longer damaged"
    found.save(tmp_path)
    loaded = Sweep.load(tmp_path)
    assert loaded.failed == found.failed
    pd.testing.assert_frame_equal(loaded.table, found.table)
    np.testing.assert_array_equal(loaded.draws, found.draws)
    gap = np.array([[3.0, 2.0, 1.0], [2.0, 2.0, 1.0]])
    assert any(
        line.startswith("left out, since they could not be edited: 0-0 (layer 0")
        for line in validate_selection(loaded, gap, [1]).warnings
    )
    alone = validate_selection(loaded, gap, [0])
    assert alone.outcome == "disagree"
    assert "layer 0, which it selects, cannot be edited" in alone.verdict


@pytest.mark.parametrize(("error", "stays"), [(DiskError("the disk is full"), True), (InputError("singular"), False)])
def test_a_full_disk_is_no_property_of_a_window(lively, moments, monkeypatch, tmp_path, error, stays):
    """Nor is it kept as one for the next call."""

    def method(model, requests, layers, *arguments, **options):
        if list(layers) == [1]:
            raise error
        return memit(model, requests, layers, *arguments, **options)

    methods = mechedit.sweep.sweep.METHODS
    monkeypatch.setattr(mechedit.sweep.sweep, "METHODS", {**methods, "memit": method})
    if stays:
        with pytest.raises(DiskError, match="the disk is full"):
            sweep(lively, moments, windows=[(0, 0), (1, 1)], parts=tmp_path)
        monkeypatch.setattr(mechedit.sweep.sweep, "METHODS", methods)
        assert not sweep(lively, moments, windows=[(0, 0), (1, 1)], parts=tmp_path).failed
    else:
        assert sweep(lively, moments, windows=[(0, 0), (1, 1)], parts=tmp_path).failed == {Window(1, 1): "singular"}


@pytest.mark.parametrize(
    ("windows", "message"),
    [([], "no windows"), ([(1, 3)], "does not lie in the model"), ([(2, 1)], "does not lie in the model")],
)
def test_windows_outside_the_model_are_refused(lively, moments, windows, message):
    with pytest.raises(InputError, match=message):
        sweep(lively, moments, windows=windows)


def test_shared_targets_must_be_those_that_would_be_found(lively, moments):
    targets = find_targets(lively, REQUESTS, 1, config=CONFIG.targets)
    shared = memit(lively, REQUESTS, [0, 1], moments, config=CONFIG, targets=targets)
    plain = memit(lively, REQUESTS, [0, 1], moments, config=CONFIG)
    assert torch.equal(shared.delta(1), plain.delta(1))
    for options, message in (
        ({"config": dataclasses.replace(CONFIG, lr=0.1)}, "lr = 0.5, expected 0.1"),
        ({"prefixes": ["{}"]}, "prefixes"),
    ):
        with pytest.raises(InputError, match=message):
            memit(lively, REQUESTS, [0, 1], moments, targets=targets, **{"config": CONFIG, **options})
    with pytest.raises(InputError, match="requests"):
        memit(lively, REQUESTS[:2], [0, 1], moments, config=CONFIG, targets=targets)
    with pytest.raises(InputError, match="after layer 1, expected"):
        memit(lively, REQUESTS, [0], moments, config=CONFIG, targets=targets)
    apply_(lively, plain)
    with pytest.raises(InputError, match="the targets was made with weights_hash"):
        memit(lively, REQUESTS, [0, 1], collect_moments(lively, TEXTS, [0, 1]), config=CONFIG, targets=targets)


def test_requests_about_traced_subjects_are_held_out():
    requests = [EditRequest(id=str(i), subject=f"s{i}", prompt="{} is", target_new="x") for i in range(30)]
    traced = {f"s{i}" for i in range(0, 30, 2)}
    sample = held_out(requests, traced, 10, seed=1)
    assert len(sample.requests) == 10
    assert not {request.subject for request in sample.requests} & traced
    assert sample.warning is None
    assert sample == held_out(requests, traced, 10, seed=1)
    assert sample != held_out(requests, traced, 10, seed=2)
    places = [int(request.id) for request in sample.requests]
    assert places == sorted(places)
    filled = held_out(requests, traced, 20)
    assert {request.subject for request in filled.requests} >= {f"s{i}" for i in range(1, 30, 2)}
    assert (len(filled.requests), filled.traced) == (20, 5)
    assert filled.warning is not None
    assert filled.warning.startswith("5 of the 20 requests are about subjects that were traced")
    assert len(held_out(requests, traced, 100).requests) == 30
    with pytest.raises(InputError, match="no requests"):
        held_out([], traced)


def test_what_is_swept_by_default():
    assert windows_of(4, 3, 1) == [(0, 0), (1, 1), (2, 2), (3, 3), (0, 2), (1, 3)]
    swept = SweepConfig().swept((1, 2, 3), 5)
    assert set(swept) == set(windows_of(5, 1, 3))
    assert [window.last for window in swept] == sorted(window.last for window in swept)
    assert set(SweepConfig(windows=(Window(0, 1),)).swept((2, 3), 5)) == {(0, 1), (2, 3)}
    assert set(SweepConfig(width=2).swept((), 3)) == set(windows_of(3, 1, 2))
    with pytest.raises(InputError, match="give a width"):
        SweepConfig().swept((), 5)
    with pytest.raises(InputError, match="the width is 6, expected 1 to 5"):
        SweepConfig(width=6).swept((1,), 5)
    with pytest.raises(InputError, match="by is 'eye', expected one of trace, sweep, both"):
        SweepConfig(by="eye")


# Planted truths: a model of eight layers whose MLPs 2–4 recall, so that the gap falls over these.
CONTRIBUTION = np.array([0, 0, 8, 10, 6, 0, 0, 0]) / 100
GAP = CONTRIBUTION.sum() - np.cumsum(CONTRIBUTION)
LAYERS = len(GAP)
OWN = (2, 3, 4)
BY_TRACE = {window: 100 * CONTRIBUTION[window.layers].sum() / CONTRIBUTION.sum() for window in windows_of(LAYERS, 3)}


def gaps(facts: int = 30, noise: float = 0.01) -> np.ndarray:
    return GAP + noise * np.random.default_rng(0).normal(size=(facts, LAYERS))


def planted(
    success: dict[Window, float], margin: dict[Window, float] | None = None, requests: int = 40, seed: int = 0
) -> Sweep:
    """A sweep in which each window succeeds with its probability (percent), the same luck for all windows."""
    luck = 100 * np.random.default_rng(seed).random((requests, 3))
    rows = []
    for window, chance in success.items():
        for case in range(requests):
            for measure, drawn in zip(("ES", "PS", "NS"), luck[case], strict=True):
                rows.append((window.first, window.last, str(case), measure, 100.0 * (drawn < chance)))
            rows.append((window.first, window.last, str(case), "EM", (margin or {}).get(window, 0.0)))
    cases = pd.DataFrame(rows, columns=["first", "last", "case", "measure", "value"])
    config = dataclasses.replace(QUICK, resamples=400)
    return Sweep(cases=cases, before={}, failed={}, config=config, provenance={"method": "memit"})


def test_edits_that_follow_the_trace_agree_with_it():
    found = validate_selection(planted(BY_TRACE), gaps(), OWN)
    assert found.outcome == "agree"
    assert found.warnings == ()
    assert found.best["layers"] == found.traced["layers"] == [2, 3, 4]
    assert (found.traced["rank"], found.traced["of"]) == (1, 6)
    assert found.correlation["mean"] > 0.9
    assert found.correlation["low"] > 0.5
    assert found.correlation["n"] == 6
    assert [2, 3, 4] in found.near_best
    assert [5, 6, 7] not in found.near_best
    assert "edits agree with the trace: layers 2–4" in found.verdict


def test_a_planted_disagreement_is_warned_of():
    """Hase et al. (2023): the best layers to edit may lie where the trace shows nothing."""
    against = {window: 100 - said for window, said in BY_TRACE.items()}
    found = validate_selection(planted(against), gaps(), OWN)
    assert found.outcome == "disagree"
    assert found.warnings == (found.verdict,)
    assert found.verdict.startswith("edits disagree with the trace: layers 2–4")
    assert found.correlation["high"] < 0
    assert found.traced["rank"] == 6
    assert [2, 3, 4] not in found.near_best


def test_a_falling_score_disagrees_even_where_the_selected_range_is_good():
    """All windows but one edit well; that one has the second largest contribution."""
    scores = {window: 96.0 + window.first / 10 for window in BY_TRACE} | {Window(1, 3): 10.0, Window(3, 5): 10.0}
    found = validate_selection(planted(scores), gaps(), OWN)
    assert [2, 3, 4] in found.near_best
    assert found.correlation["mean"] <= 0
    assert found.outcome == "disagree"


@pytest.mark.parametrize("level", [0.0, 60.0, 100.0])
def test_windows_that_all_edit_alike_decide_nothing(level):
    found = validate_selection(planted({window: level for window in BY_TRACE}), gaps(), OWN)
    assert found.outcome == "undecided"
    assert found.warnings == ()
    assert found.correlation is None
    assert len(found.near_best) == 6


def test_by_sweep_takes_the_best_score_and_by_both_what_the_trace_prefers_of_the_best():
    scores = {window: 30.0 for window in BY_TRACE}
    scores |= {Window(0, 2): 97.0, Window(1, 3): 95.0, Window(5, 7): 97.0}
    swept = planted(scores, margin={Window(0, 2): 40.0, Window(5, 7): 50.0})
    window, stability = choose_window(swept, gaps(), OWN, "sweep")
    assert window == (5, 7), "of equal scores the larger probability difference"
    assert 0.5 < stability <= 1
    assert windows_near_best(swept).tolist() == [scores[window] > 90 for window in swept.windows]
    window, stability = choose_window(swept, gaps(), OWN, "both")
    assert window == (1, 3), "of those that score alike the largest contribution, though not the selected range"
    assert stability == 1
    worse = planted(scores | {Window(1, 3): 97.0 - 1.1 * CLOSE}, margin={Window(0, 2): 40.0, Window(5, 7): 50.0})
    assert windows_near_best(worse)[worse.windows.index(Window(1, 3))], "few requests do not tell it from the best"
    assert choose_window(worse, gaps(), OWN, "both")[0] == (0, 2), "yet a lower score is not made up for by the trace"
    _, less = choose_window(swept, gaps(noise=1.0), OWN, "both")
    assert less < 1, "the trace's preference rests on its facts"
    with pytest.raises(InputError, match="selects no layers"):
        choose_window(swept, gaps(), (), "both")
    with pytest.raises(InputError, match="by is 'eye'"):
        choose_window(swept, gaps(), OWN, "eye")


def test_the_windows_near_the_best_hold_the_truly_best_one_as_often_as_they_say():
    """Five windows, of which two are truly best: both must stay in 19 of 20 sweeps, and the far ones go."""
    truth = dict(zip(windows_of(7, 3), (80.0, 80.0, 70.0, 40.0, 20.0), strict=True))
    kept = np.array([windows_near_best(independent(truth, seed)) for seed in range(50)])
    assert kept[:, 0].mean() >= 0.9
    assert kept[:, 1].mean() >= 0.9
    assert kept[:, 3:].mean() < 0.1


def independent(truth: dict[Window, float], seed: int) -> Sweep:
    """As `planted`, but each window with luck of its own."""
    parts = [planted({window: chance}, seed=1000 * seed + i) for i, (window, chance) in enumerate(truth.items())]
    return dataclasses.replace(parts[0], cases=pd.concat([part.cases for part in parts], ignore_index=True))


def test_spearman_agrees_with_scipy_also_with_ties():
    generator = np.random.default_rng(0)
    one, other = generator.integers(4, size=(20, 9)).astype(float), generator.normal(size=(20, 9))
    expected = [spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(spearman(one, other), expected)
    assert np.isnan(spearman(np.ones((1, 9)), other[:1])).all()


def test_the_interval_of_a_rank_correlation_covers_the_truth_and_holds_what_was_measured():
    """Twelve windows that truly rank as the trace does but for noise: a correlation of 0.77, as simulated here."""
    generator, n, noise = np.random.default_rng(0), 12, 0.3
    truth = np.arange(n) / n
    true = spearman(np.tile(truth, (2000, 1)), truth + generator.normal(scale=noise, size=(2000, n))).mean()
    assert 0.6 < true < 0.9
    held, inside = [], []
    for _ in range(200):
        measured = truth + generator.normal(scale=noise, size=n)
        draws = spearman(np.tile(truth, (300, 1)), measured + generator.normal(scale=noise, size=(300, n)))
        rho = float(spearman(truth[None], measured[None])[0])
        low, high = rank_interval(rho, draws, n, 0.95)
        held.append(low <= true <= high)
        inside.append(low <= rho <= high)
    assert np.mean(held) >= 0.85
    assert all(inside)
    assert rank_interval(1.0, np.ones(10), 6, 0.95)[1] == 1.0


def test_without_early_site_or_swept_range_it_says_so():
    swept = planted(BY_TRACE)
    found = validate_selection(swept, gaps(), ())
    assert found.outcome == "undecided"
    assert found.traced is None
    assert found.verdict.startswith("the trace selects no layers; S is highest for layers 2–4")
    with pytest.raises(InputError, match="not among the windows swept"):
        validate_selection(swept, gaps(), (1, 2))
    with pytest.raises(InputError, match="reaches layer 7, but 5 layers were traced"):
        validate_selection(swept, gaps()[:, :5], OWN)


def test_widths_are_not_mixed_in_the_correlation():
    """Wider windows hold more contribution and edit better: that says nothing of where to edit."""
    flat = {window: 40.0 for window in windows_of(LAYERS, 1)} | {window: 90.0 for window in windows_of(LAYERS, 3)}
    found = validate_selection(planted(flat), gaps(), OWN)
    assert found.correlation is None
    mixed = validate_selection(planted({**flat, **BY_TRACE}), gaps(), OWN)
    assert (mixed.correlation["width"], mixed.correlation["n"]) == (3, 6)


def test_the_score_takes_what_there_is(lively, moments):
    assert planted(BY_TRACE).score == "S"
    bare = [dataclasses.replace(request, neighbors=()) for request in REQUESTS]
    found = sweep(lively, moments, windows=[(2, 2)], requests=bare)
    assert found.score == "harmonic mean of ES and PS"
    means = found.table.set_index("measure")["mean"]
    parts = means[["ES", "PS"]].to_numpy()
    expected = 0.0 if not parts.all() else 2 / (1 / parts).sum()
    assert means[found.score] == pytest.approx(expected)
    assert found.scores == pytest.approx([expected])
    bare = [dataclasses.replace(request, neighbors=(), target_true=None) for request in REQUESTS]
    assert sweep(lively, moments, windows=[(2, 2)], requests=bare).score == "exact_match"


def test_the_figure_shows_every_window_and_marks_the_choice(tmp_path):
    swept = planted(BY_TRACE)
    swept.save(tmp_path)
    table = pd.read_parquet(tmp_path / "sweep.parquet")
    validation = dataclasses.asdict(validate_selection(swept, gaps(), OWN))
    evidence = [{"layer": layer, "contribution": part} for layer, part in enumerate(CONTRIBUTION)]
    figure = sweep_figure(table, {"layers": list(OWN), "evidence": evidence, "validation": validation})
    above, below = figure.axes
    points = next(part for part in above.collections if len(part.get_offsets()) == 6)
    np.testing.assert_allclose(points.get_offsets()[:, 0], [1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(points.get_offsets()[:, 1], swept.scores)
    hollow = (points.get_facecolors()[:, :3] == 1).all(1)
    np.testing.assert_array_equal(hollow, ~windows_near_best(swept))
    assert 0 < hollow.sum() < 6
    line = next(line for line in below.lines if len(line.get_xdata()) == 6)
    np.testing.assert_allclose(line.get_ydata(), [100 * CONTRIBUTION[w.layers].sum() for w in swept.windows])
    assert len(sweep_figure(table, {}).axes) == 1, "without a trace the scores alone"
    known = dataclasses.replace(swept, before={"S": {"mean": 12.5, "low": 10.0, "high": 15.0, "n": 8}})
    unsaved = sweep_figure(known.table, {}).axes[0]
    assert [line.get_ydata()[0] for line in unsaved.lines if line.get_label() == "unedited"] == [12.5]
    with pytest.raises(InputError, match="no evidence for layers"):
        sweep_figure(table, {"evidence": evidence[:5]})


def test_no_two_widths_have_one_color() -> None:
    for widths in ((2, 3), range(2, 9)):
        swept = planted({Window(first, first + width - 1): 50.0 for width in widths for first in (0, 1)})
        figure = sweep_figure(swept.table, {})
        colors = {line.get_label(): line.get_color() for line in figure.axes[0].lines if "layers" in line.get_label()}
        assert len(colors) == len({*colors.values()}) == len(widths)


def test_a_short_sweep_covers_the_depth_and_the_ranges_that_resamples_give():
    windows = short_sweep([(7, 8, 9), (), (4, 5), tuple(range(12))], n_layers=14, width=4)
    assert set(windows) == {Window(0, 3), Window(4, 7), Window(8, 11), Window(4, 5), Window(7, 9)}
    assert short_sweep([], n_layers=3, width=1) == [Window(0, 0), Window(1, 1), Window(2, 2)]


def test_agreement_counts_the_resamples_in_which_the_window_is_among_the_best():
    scores = {window: 30.0 for window in BY_TRACE} | {Window(0, 2): 90.0, Window(1, 3): 86.0, Window(5, 7): 60.0}
    swept = planted(scores)
    for window in swept.windows:
        mine = swept.draws[:, swept.windows.index(window)]
        naive = np.mean([max(draw) - score <= CLOSE for draw, score in zip(swept.draws, mine, strict=True)])
        assert window_agreement(swept, window) == pytest.approx(naive)
    assert window_agreement(swept, Window(5, 7)) == 0
    assert 0 < window_agreement(swept, Window(1, 3)) < window_agreement(swept, Window(0, 2)) == 1
    best = finalists(swept, Window(1, 3))
    assert best[:2] == [Window(1, 3), Window(0, 2)], "the chosen window is never left out"
    assert Window(5, 7) not in best
    assert finalists(swept, Window(1, 3), 1) == best[:1]
    assert set(best) <= {window for window, near in zip(swept.windows, windows_near_best(swept), strict=True) if near}


def test_the_layers_are_chosen_from_the_finals_where_there_are_some():
    first = planted({window: 40.0 for window in BY_TRACE} | {Window(0, 2): 90.0, Window(1, 3): 88.0})
    finals = planted({Window(0, 2): 80.0, Window(1, 3): 92.0})
    first, finals = (dataclasses.replace(swept, before=UNEDITED) for swept in (first, finals))
    decide = partial(decide_layers, selected(), validate_selection(first, gaps(), OWN), first, gaps(), "sweep")
    assert decide().layers == (0, 1, 2)
    decided = decide(finals)
    assert decided.layers == (1, 2, 3)
    assert decided.validation["finals"]["n_requests"] == len(set(finals.cases["case"]))
    assert [record["layers"] for record in decided.validation["finals"]["windows"]] == [[0, 1, 2], [1, 2, 3]]
    assert decided.validation["agreement"] == window_agreement(finals, Window(1, 3))
    assert f"on {decided.validation['agreement']:.0%} of resamples of the requests" in decided.reason
    assert len(decided.validation["windows"]) == len(first.windows), "the first round stays"


UNEDITED = {"S": {"mean": 5.0, "low": 2.0, "high": 8.0, "n": 40}}


def selected() -> Selection:
    """A selection that is unsettled."""
    return Selection(
        layers=OWN,
        rule="contribution",
        n_facts=12,
        evidence=(),
        alternatives={},
        state="unsettled",
        stability=0.2,
        agreement=0.4,
        modal=OWN,
        candidates=(),
        reason="",
    )


@pytest.mark.parametrize(("level", "state"), [(97.0, "settled"), (3.0, "unsettled")])
def test_layers_that_a_sweep_chose_are_settled_when_edits_of_them_change_the_model(level, state):
    swept = dataclasses.replace(planted({window: level - window.first / 10 for window in BY_TRACE}), before=UNEDITED)
    selection = selected()
    decided = decide_layers(selection, validate_selection(swept, gaps(), OWN), swept, gaps(), "sweep")
    assert (decided.state, decided.agreement) == (state, selection.agreement)
    assert ("is not reliably above" in decided.reason) == (state == "unsettled")
