"""Selection on effects whose truth is planted, and the statistics that say how far to trust it."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechedit import InputError, SelectConfig, Selection, select_layers
from mechedit.files import read_json, write_json
from mechedit.published import canonical, published_ranges
from mechedit.selection import RULES, bootstrap, subject_effects
from mechedit.selection.bootstrap import BootstrapSelections, bootstrap_selections, resampled_curves
from mechedit.selection.config import Rule
from mechedit.selection.curves import MeanCurves, SubjectEffects, contribution, window_spans
from mechedit.selection.early_site import early_site, skewness_corrected_t
from mechedit.selection.rules import (
    contribution_rule,
    gap_peak_rule,
    mlp_window_rule,
    moving_average_rule,
    moving_width,
    within_bounds,
)
from mechedit.selection.select import state_of, support, widest_site
from mechedit.statistics import bootstrap_means, percentile_interval
from mechedit.trace import window_span

# Measured on a model whose MLPs exist only in layers 2, 3 and 4 (percent of probability).
PLANTED = np.array([3.4, 4.3, 1.6, 1.0, 0.0, 0.0, 0.0, 0.0])
QUICK = SelectConfig(resamples=200)
ABLATION = ["ablation", "ablation_low", "ablation_high", "ablation_from"]


def effects_of(gap, facts=40, spread=0.2, seed=0, window=None, width=3):
    """Tidy effects in which state minus severed is `gap` plus noise, in percent; `window`: MLP windows' effects."""
    draw = np.random.default_rng(seed)
    depth = len(gap)
    state = 10 + draw.normal(0, 1, (facts, depth))
    grids = {
        ("state", "nothing"): state,
        ("state", "mlp"): state - gap - draw.normal(0, spread, (facts, depth)),
        ("state", "attn"): state - 0.1,
    }
    if window is not None:
        grids["mlp", "nothing"] = window + draw.normal(0, spread, (facts, depth))
    names, layers = np.repeat([f"fact {f}" for f in range(facts)], depth), np.tile(np.arange(depth), facts)
    frames = [
        pd.DataFrame({"fact": names, "kind": kind, "sever": sever, "layer": layers, "effect": grid.ravel() / 100})
        for (kind, sever), grid in grids.items()
    ]
    spans = [len(window_span("mlp", layer, depth, width)) for layer in range(depth)]
    effects = pd.concat(frames, ignore_index=True).assign(role="subject_last", metric="probability")
    return effects.assign(
        window=np.where(effects["kind"] == "mlp", np.array(spans)[effects["layer"]], 1), clean=0.6, corrupted=0.1
    )


def subject_of(gap):
    """Grids of facts by layers in which state minus severed is exactly `gap`."""
    state = np.full(gap.shape, 50.0)
    facts = tuple(f"fact {f}" for f in range(len(gap)))
    return SubjectEffects(facts=facts, metric="probability", state=state, mlp_severed=state - gap, single_severed={})


def curves_of(gap, window=None, width=3):
    gap = np.asarray(gap, dtype=float)
    spans = tuple(window_span("mlp", layer, len(gap), width) for layer in range(len(gap)))
    return MeanCurves(gap=gap, window=None if window is None else np.asarray(window, dtype=float), spans=spans)


# Rules


def test_contribution_names_the_planted_layers_and_the_peak_of_the_gap_does_not():
    config = SelectConfig()
    assert contribution_rule(curves_of(PLANTED), config) == (2, 3, 4)
    assert not set(gap_peak_rule(curves_of(PLANTED), config)) & {2, 3, 4}


def test_contributions_add_up_to_what_the_gap_loses():
    assert contribution(PLANTED)[1:].sum() == pytest.approx(PLANTED[0] - PLANTED[-1])
    assert contribution(PLANTED)[0] == 0
    two = np.stack([PLANTED, 2 * PLANTED])
    np.testing.assert_array_equal(contribution(two)[1], contribution(2 * PLANTED))


curve_lists = st.lists(st.integers(-20, 60), min_size=2, max_size=9)


@settings(max_examples=200, deadline=None)
@given(curve_lists, st.sampled_from([0.3, 0.6, 0.9, 1.0]))
def test_contribution_rule_equals_a_search_of_all_runs(gap, share):
    falls = {(a, b): gap[a - 1] - gap[b] for a in range(1, len(gap)) for b in range(a, len(gap))}
    most = max(falls.values())
    layers = contribution_rule(curves_of(gap), SelectConfig(share=share))
    if most <= 0:
        assert layers == ()
        return
    good = [(b - a, -m, a, b) for (a, b), m in falls.items() if m >= share * most]
    _, _, a, b = min(good)
    assert layers == tuple(range(a, b + 1))
    assert contribution(np.array(gap, dtype=float))[list(layers)].sum() >= share * most - 1e-9


@settings(max_examples=200, deadline=None)
@given(curve_lists, st.sampled_from([0.5, 0.9, 1.0]))
def test_gap_peak_rule_equals_a_walk_from_the_peak(gap, share):
    peak = gap.index(max(gap))
    expected = []
    if gap[peak] > 0:
        expected = [peak]
        while expected[0] > 0 and gap[expected[0] - 1] >= share * gap[peak]:
            expected.insert(0, expected[0] - 1)
        while expected[-1] + 1 < len(gap) and gap[expected[-1] + 1] >= share * gap[peak]:
            expected.append(expected[-1] + 1)
    assert list(gap_peak_rule(curves_of(gap), SelectConfig(share=share))) == expected


@settings(max_examples=200, deadline=None)
@given(curve_lists, st.integers(1, 9))
def test_moving_average_rule_equals_a_search_of_all_runs_of_its_width(gap, width):
    if width > len(gap):
        with pytest.raises(InputError, match="layers are wanted"):
            moving_average_rule(curves_of(gap), SelectConfig(width=width))
        return
    c = contribution(np.array(gap, dtype=float))
    starts = range(1, len(gap) - width + 1) if width < len(gap) else [0]
    best = max(starts, key=lambda a: (c[a : a + width].mean(), -a))
    expected = tuple(range(best, best + width)) if c[best : best + width].sum() > 0 else ()
    assert moving_average_rule(curves_of(gap), SelectConfig(width=width)) == expected


@pytest.mark.parametrize("width", [1, 3, 4, 10, 12, 30])
def test_mlp_window_rule_gives_the_layers_that_the_best_cell_restored(width):
    depth = 12
    for peak in range(depth):
        window = np.where(np.arange(depth) == peak, 2.0, 1.0)
        # Written out: w/2 layers below the center and the rest from it on, as far as there are layers.
        expected = [x for x in range(peak - width // 2, peak - width // 2 + width) if 0 <= x < depth]
        layers = mlp_window_rule(curves_of(np.zeros(depth), window, width), SelectConfig())
        assert list(layers) == expected
    assert mlp_window_rule(curves_of(np.zeros(depth), -np.ones(depth), width), SelectConfig()) == ()


@pytest.mark.parametrize("width", [1, 2, 3, 5, 10, 11, 20])
def test_the_windows_width_is_recovered_from_the_spans_in_the_rows(width):
    depth = 8
    rows = effects_of(np.zeros(depth), facts=10, window=np.zeros(depth), width=width)
    spans = window_spans(rows[rows["kind"] == "mlp"], depth)
    assert spans == tuple(window_span("mlp", layer, depth, width) for layer in range(depth))
    assert all(len(span) == n for span, n in zip(spans, rows[rows["kind"] == "mlp"]["window"], strict=False))


def test_windows_of_several_widths_are_refused():
    three, five = (effects_of(PLANTED, window=PLANTED, width=width) for width in (3, 5))
    mixed = three.assign(window=three["window"].where(three["fact"] != "fact 1", five["window"]))
    with pytest.raises(InputError, match="expected windows of one width"):
        select_layers(mixed)


@settings(max_examples=300, deadline=None)
@given(
    curve_lists,
    st.lists(st.integers(-5, 20), min_size=9, max_size=9),
    st.sampled_from(list(RULES)),
    st.integers(1, 4),
    st.integers(0, 5),
    st.sampled_from([0.25, 2.0, 64.0]),
)
def test_what_every_rule_returns(gap, window, rule, low, more, scale):
    """Ascending without a hole, inside the model, within the bounds; and the unit does not matter."""
    low = min(low, len(gap))
    config = SelectConfig(min_width=low, max_width=low + more)
    curves = curves_of(gap, window[: len(gap)])
    layers = RULES[rule](curves, config)
    assert list(layers) == list(range(layers[0], layers[-1] + 1)) if layers else True
    assert set(layers) <= set(range(len(gap)))
    assert not layers or low <= len(layers) <= low + more
    assert curves.window is not None
    scaled = replace(curves, gap=scale * curves.gap, window=scale * curves.window)
    assert RULES[rule](scaled, config) == layers
    free = SelectConfig()
    if rule != "moving-average" and low <= len(RULES[rule](curves, free)) <= low + more:
        assert layers == RULES[rule](curves, free)  # bounds that hold anyway change nothing


def test_bounds_grow_by_the_better_neighbor_and_keep_the_best_part():
    score = np.array([0.0, 5.0, 9.0, 7.0, 1.0, 6.0])
    assert within_bounds((2,), score, SelectConfig(min_width=2)) == (2, 3)
    assert within_bounds((2,), score, SelectConfig(min_width=3)) == (1, 2, 3)
    assert within_bounds((2,), score, SelectConfig(min_width=4)) == (1, 2, 3, 4)
    assert within_bounds((2,), score, SelectConfig(min_width=99)) == (0, 1, 2, 3, 4, 5)
    assert within_bounds((1, 2, 3, 4, 5), score, SelectConfig(max_width=2)) == (2, 3)
    assert within_bounds((), score, SelectConfig(min_width=3)) == ()
    assert within_bounds((3, 4), np.ones(6), SelectConfig(min_width=3)) == (2, 3, 4)  # alike: the lower


def test_the_moving_width_follows_depth_and_bounds():
    depths = {2: 1, 8: 2, 12: 3, 24: 5, 28: 5, 48: 5}
    assert {depth: moving_width(depth, SelectConfig()) for depth in depths} == depths
    assert moving_width(48, SelectConfig(min_width=7)) == 7
    assert moving_width(48, SelectConfig(max_width=3)) == 3
    assert moving_width(48, SelectConfig(width=4)) == 4


def test_every_rule_that_may_be_asked_for_exists():
    assert set(RULES) == set(get_args(Rule))


# Selection and its evidence


def test_selection_carries_its_evidence():
    selection = select_layers(effects_of(PLANTED))
    assert selection.layers == selection.modal == (2, 3, 4)
    assert selection.n_facts == 40
    assert selection.stability > 0.9
    assert selection.alternatives["gap-peak"] == [1]
    for record, gap in zip(selection.evidence, PLANTED, strict=True):
        assert record.gap == pytest.approx(gap / 100, abs=2e-3)
        assert record.gap_low <= record.gap <= record.gap_high
        assert record.membership == pytest.approx(1.0 if record.layer in (2, 3, 4) else 0.0, abs=0.1)


def test_every_rule_is_reported_on_the_same_resamples():
    window = np.array([1.0, 2.0, 4.0, 6.0, 5.0, 2.0, 1.0, 0.0])
    effects = effects_of(PLANTED, spread=2, window=window)
    chosen = {rule: select_layers(effects, rule, config=QUICK) for rule in RULES}
    first = chosen["contribution"]
    assert set(first.rules) == set(RULES)
    assert set(first.alternatives) == set(RULES) - {"contribution"}
    for rule, selection in chosen.items():
        assert selection.rules == first.rules  # whichever is asked for
        of_rule = first.rules[rule]
        assert (selection.layers, selection.modal) == (of_rule.layers, of_rule.modal)
        assert selection.stability == of_rule.stability
        assert tuple(record.membership for record in selection.evidence) == of_rule.membership
        assert all(rival.alternatives[rule] == list(of_rule.layers) for name, rival in chosen.items() if name != rule)
    assert chosen["mlp-window"].layers == (2, 3, 4)
    assert first.evidence[3].mlp_window == pytest.approx(0.06, abs=0.015)
    assert first.evidence[0].mlp_window_layers == (0, 1)


def test_membership_modal_range_and_stability_agree_with_the_resamples_one_by_one():
    effects = effects_of(PLANTED, facts=12, spread=4)
    selection = select_layers(effects, config=QUICK)
    subject = subject_effects(effects, QUICK)
    generator, ranges = np.random.default_rng(QUICK.seed), []
    for weights in generator.multinomial(12, np.full(12, 1 / 12), size=QUICK.resamples):
        drawn = np.repeat(np.arange(12), weights)  # facts drawn with replacement
        ranges.append(contribution_rule(curves_of(subject.gap[drawn].mean(0)), QUICK))
    assert len(set(ranges)) > 2  # there is something to count
    assert selection.stability == pytest.approx(ranges.count(selection.layers) / len(ranges))
    assert ranges.count(selection.modal) == max(map(ranges.count, ranges))
    for record in selection.evidence:
        assert record.membership == pytest.approx(np.mean([record.layer in layers for layers in ranges]))


def test_membership_is_how_often_new_facts_give_the_layer():
    """Bootstrap membership, averaged over trials, against fresh draws from the same population."""
    draw, config, fresh, claimed = np.random.default_rng(0), SelectConfig(resamples=100), [], []
    for _ in range(50):
        subject = subject_of(PLANTED + draw.normal(0, 3, (40, 8)))
        selections = bootstrap_selections(subject, resampled_curves(subject, config), config, has_site=True)[
            "contribution"
        ]
        fresh.append([layer in selections.layers for layer in range(8)])
        claimed.append(selections.membership(8))
    fresh, claimed = np.mean(fresh, axis=0), np.mean(claimed, axis=0)
    assert ((fresh > 0.1) & (fresh < 0.9)).any()  # layers that come and go
    assert np.abs(fresh - claimed).max() < 0.25
    assert np.corrcoef(fresh, claimed)[0, 1] > 0.95


def test_an_uncertain_range_says_so():
    sure = select_layers(effects_of(PLANTED, spread=0.1))
    unsure = select_layers(effects_of(PLANTED, spread=8, facts=15))
    assert unsure.stability < sure.stability == 1.0
    assert (sure.state, sure.agreement) == ("settled", 1.0)
    assert "100% of resamples of the facts agree" in sure.reason
    assert unsure.state == "unsettled"
    assert unsure.agreement < 0.8
    first = unsure.candidates[0]
    assert "so that it is unsettled: the likeliest are" in unsure.reason
    assert f"({first.share:.0%})" in unsure.reason


def test_agreement_is_the_share_of_resamples_that_overlap_by_four_fifths():
    counts = Counter({(2, 3, 4, 5, 6): 50, (2, 3, 4, 5): 20, (3, 4, 5, 6, 7): 20, (): 10})
    selections = BootstrapSelections(layers=(2, 3, 4, 5, 6), counts=counts)
    assert selections.agreement(0.8) == 0.7, "4 of 5 layers in common are enough, 4 of 6 are not"
    assert selections.agreement(1.0) == selections.stability == 0.5
    assert selections.candidates(2) == [((2, 3, 4, 5, 6), 0.5), ((2, 3, 4, 5), 0.2)]


def test_facts_whose_effects_are_permuted_over_layers_settle_nothing():
    draw = np.random.default_rng(3)
    gaps = PLANTED + draw.normal(0, 1, (40, 8))
    permuted = np.stack([draw.permutation(gap) for gap in gaps])
    states = []
    for subject in map(subject_of, (gaps, permuted)):
        selections = bootstrap_selections(subject, resampled_curves(subject, QUICK), QUICK, has_site=True)
        states.append(state_of(selections["contribution"], QUICK, 8))
    assert states == ["settled", "unsettled"]


def test_a_range_as_wide_as_the_network_is_not_settled_however_often_it_comes_up():
    # The gap falls by the same amount at every layer: all resamples agree that no layer stands out.
    falling = subject_of(np.tile(np.linspace(20, 2, 24), (40, 1)))
    curves = resampled_curves(falling, QUICK)
    for changes, state in (({}, "unsettled"), ({"min_width": 24}, "settled")):
        config = replace(QUICK, **changes)
        selected = bootstrap_selections(falling, curves, config, has_site=True)["contribution"]
        assert selected.agreement(config.overlap) == 1, "resamples do agree"
        assert state_of(selected, config, 24) == state
        words = support(selected, config, 24)
        assert ("are no site (at most 6 are)" in words) == (state == "unsettled")
    assert [widest_site(QUICK, depth) for depth in (12, 30, 80)] == [6, 6, 16]
    assert widest_site(replace(QUICK, max_width=9), 24) == 9, "who allows more asks for more"


def test_a_file_from_before_agreement_is_read_by_its_stability(tmp_path):
    selection = select_layers(effects_of(PLANTED, spread=8, facts=15))
    content = selection.plain()
    for entry in (content, *content["rules"].values()):
        del entry["agreement"]
    del content["state"], content["candidates"]
    write_json(tmp_path / "selection.json", content)
    old = Selection.load(tmp_path / "selection.json")
    assert (old.state, old.agreement) == ("unsettled", selection.stability)
    selection.save(tmp_path / "selection.json")
    assert Selection.load(tmp_path / "selection.json") == selection


@pytest.mark.parametrize(("facts", "least"), [(40, 0.91), (10, 0.85)])
def test_intervals_cover_the_truth_as_often_as_they_promise(facts, least):
    """Those of gap and contribution, at every layer; with the fewest facts allowed, somewhat seldom."""
    draw, hits = np.random.default_rng(0), []
    for _ in range(250):
        draws = resampled_curves(subject_of(PLANTED + draw.standard_t(5, size=(facts, 8))), QUICK)
        for name, truth in (("gap", PLANTED), ("contribution", contribution(PLANTED))):
            low, high = percentile_interval(draws[name], 0.95)
            hits.append(((low <= truth) & (truth <= high))[1:])
    assert least <= np.mean(hits) <= 0.97


def test_ablation_is_taken_from_the_state_below_with_the_largest_gap():
    effects = effects_of(PLANTED)
    unsevered = effects[(effects["kind"] == "state") & (effects["sever"] == "nothing")]
    losses = {1: 0.5, 2: 3.0, 6: 0.0}
    cuts = [
        unsevered.assign(sever=f"mlp@{layer}", effect=unsevered["effect"] - by / 100) for layer, by in losses.items()
    ]
    # From other states the cut takes something else, which must not be reported.
    cuts[1]["effect"] -= 0.5 * (cuts[1]["layer"] != 1)
    cuts[2] = cuts[2][cuts[2]["layer"] == 3]
    selection = select_layers(pd.concat([effects, *cuts]))
    ablations = {record.layer: record.ablation for record in selection.evidence}
    assert {layer: value for layer, value in ablations.items() if value is not None} == pytest.approx(
        {layer: by / 100 for layer, by in losses.items()}
    )
    assert [record.ablation_from for record in selection.evidence][:7] == [None, 0, 1, None, None, None, 3]
    plain = select_layers(effects)
    assert selection.layers == plain.layers  # and the gap is of the whole severing
    assert plain.evidence[0].ablation is None
    assert "ablation" not in plain.plain()["evidence"][0]
    assert list(selection.plain()["evidence"][4]) == [*list(plain.plain()["evidence"][4])[:-1], *ABLATION, "membership"]


class LineCounter:
    """Counts the lines that the interpreter runs in the files of a folder."""

    def __init__(self, folder):
        self.folder, self.lines = str(folder), 0

    def __enter__(self):
        self.previous = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.previous)

    def trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self.folder):
            return None
        self.lines += event == "line"
        return self.trace


def test_a_resample_costs_the_same_few_lines_at_any_depth_and_facts_are_drawn_once(monkeypatch):
    """Loops over layers or runs of layers would make a thousand resamples of a deep model slow."""
    drawn = []

    def counted_means(*args, **kwargs):
        drawn.append(args)
        return bootstrap_means(*args, **kwargs)

    monkeypatch.setattr(bootstrap, "bootstrap_means", counted_means)
    per_rule = {}
    for depth in (12, 48):
        gap = np.linspace(5, 0, depth).clip(min=1)
        effects, counts = effects_of(gap, facts=200, window=gap, width=10), []
        for resamples in (100, 200):
            drawn.clear()
            with LineCounter(Path(bootstrap.__file__).parent) as counter:
                select_layers(effects, config=SelectConfig(resamples=resamples))
            counts.append(counter.lines)
            assert len(drawn) == 1, "all measures and rules share one draw of the facts"
        per_rule[depth] = (counts[1] - counts[0]) / (100 * len(RULES))
    assert 5 < per_rule[12] < 40
    # One rule that looped over the layers would run 36 lines more, 9 on average over the rules.
    assert per_rule[48] - per_rule[12] < 4.5


# No early site


@pytest.mark.parametrize("facts", [10, 40])
@pytest.mark.parametrize("layers", [8, 48])
def test_pure_noise_is_declared_empty_nineteen_times_in_twenty(facts, layers):
    """However many layers have a chance to be the largest; and the naive rule, layer by layer, fails."""
    draw = np.random.default_rng(0)
    trials, empty, naive = 400, 0, 0
    for seed in range(trials):
        gap = draw.standard_t(5, size=(facts, layers))
        empty += not early_site(subject_of(gap), replace(QUICK, seed=seed)).found
        peak = gap[:, gap.mean(0).argmax()]
        naive += peak.mean() - 1.96 * peak.std(ddof=1) / np.sqrt(facts) <= 0
    assert empty / trials >= 0.917  # 0.95 less three times the error of 400 trials
    assert naive / trials < 0.9


def test_noise_of_a_few_strongly_negative_facts_is_no_site():
    """Mean zero, skewed to the left: a plain t statistic takes it for a site too often."""
    draw, corrected, plain = np.random.default_rng(0), [], []
    for seed in range(200):
        gap = 1 - draw.exponential(size=(40, 24))
        corrected.append(early_site(subject_of(gap), replace(QUICK, seed=seed)).found)
        flipped = draw.choice([-1.0, 1.0], size=(200, 40)) @ gap / 40
        t = [mean / np.sqrt((gap**2).mean(0) - mean**2) for mean in (gap.mean(0), flipped)]
        plain.append(np.mean(t[1].max(1) >= t[0].max()) < 0.05)
    assert np.mean(corrected) <= 0.1
    assert np.mean(plain) > 0.25


def test_the_corrected_statistic_is_the_t_statistic_where_nothing_is_skewed():
    values = np.array([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0], [2.0, 0.0, 2.0]])
    t = 2 / (np.std([1, 2, 3], ddof=1) / np.sqrt(3))
    np.testing.assert_allclose(skewness_corrected_t(values, np.ones((1, 3))), [[t, -np.inf, np.inf]])


def test_a_site_of_the_planted_size_is_found():
    """With noise of each fact's gap as large as the gap itself, and 20 facts."""
    draw = np.random.default_rng(0)
    sites = [early_site(subject_of(PLANTED + draw.normal(0, 4, (20, 8))), QUICK).found for _ in range(100)]
    assert np.mean(sites) > 0.9


def test_rounding_in_layers_without_gaps_does_not_move_the_early_site():
    """Some t statistics of rounding are as large as any: with such layers p would be a matter of the processor."""

    def p_with(scale: float, seed: int) -> float:
        draw = np.random.default_rng(seed)
        gap = PLANTED + np.random.default_rng(0).normal(0, 8, (12, 8))
        beside = scale * draw.standard_t(1, (12, 30))
        return early_site(subject_of(np.hstack([gap, beside])), QUICK).p

    assert len({p_with(1e-7, seed) for seed in range(6)}) == 1
    assert len({p_with(1.0, seed) for seed in range(6)}) > 1, "the control: gaps of the effects' size do move it"


def test_no_early_site_selects_nothing_and_says_why():
    nothing = select_layers(effects_of(np.zeros(8), spread=1.0))
    assert nothing.layers == ()
    assert set(map(tuple, nothing.alternatives.values())) == {()}
    assert "no early site" in nothing.reason
    assert nothing.early_site["p"] > 0.05
    planted = select_layers(effects_of(PLANTED, spread=1.0))
    assert planted.layers != ()
    assert planted.early_site["p"] < 0.05
    assert planted.early_site["gap"] == pytest.approx(0.043, abs=0.005)


def test_rounding_that_always_goes_one_way_is_no_site():
    effects = effects_of(np.full(8, 1e-6), spread=1e-8)
    assert select_layers(effects).layers == ()
    assert select_layers(effects).early_site["p"] < 0.05  # as regular as can be
    assert "less than a thousandth" in select_layers(effects).reason


def test_a_gap_that_never_falls_is_a_site_without_a_range():
    rising = select_layers(effects_of(np.linspace(1, 5, 8), spread=0.0))
    assert rising.early_site["found"]
    assert rising.layers == ()
    assert "no MLP stands out" in rising.reason
    assert rising.alternatives["gap-peak"]


def test_a_contribution_spread_over_the_depth_is_said_to_be():
    spread = select_layers(effects_of(np.linspace(7, 0, 8), spread=0.1))
    assert len(spread.layers) > 4
    assert "spread over the depth" in spread.reason
    assert "spread over the depth" not in select_layers(effects_of(PLANTED)).reason


def test_the_reason_states_the_threshold_and_what_is_reached():
    plain = select_layers(effects_of(PLANTED)).reason
    (share,) = re.findall(r"at least 90% of the MLPs' contribution is made: here (\d+)%", plain)
    assert int(share) >= 90
    assert "at least 60% of" in select_layers(effects_of(PLANTED), config=SelectConfig(share=0.6)).reason
    cut = select_layers(effects_of(PLANTED), config=SelectConfig(max_width=1)).reason
    (share,) = re.findall(
        r"(\d+)% of the MLPs' contribution, in the best part of the shortest run .* at least 90%", cut
    )
    assert int(share) < 90


# Files


def test_the_same_seed_gives_the_same_selection_and_the_file_brings_it_back(tmp_path):
    effects = effects_of(PLANTED, spread=2, window=PLANTED)
    effects.attrs = {"provenance": {"model": "gpt2-xl", "weights_hash": "ab"}}
    selection = select_layers(effects)
    assert selection == select_layers(effects)
    assert selection != select_layers(effects, config=SelectConfig(seed=1))
    selection.save(tmp_path / "selection.json")
    assert Selection.load(tmp_path / "selection.json") == selection
    content = read_json(tmp_path / "selection.json")
    assert content["layers"] == list(selection.layers)
    assert content["alternatives"]["gap-peak"] == content["rules"]["gap-peak"]["layers"]
    assert content["provenance"]["weights_hash"] == "ab"
    assert {entry["method"] for entry in content["published"]} >= {"MEMIT", "ROME"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"layers": "12"}, "'layers' is '12'"),
        ({"layers": [1.5]}, "'layers.0' is 1.5"),
        ({"layers": [-1]}, "'layers.0' is -1"),
        ({"modal": None}, "'modal' is None"),
        ({"evidence": [3]}, "'evidence.0' is 3"),
        ({"color": "red"}, "has a field 'color'"),
        ({"stability": None}, "'stability' is None"),
        ({"stability": True}, "'stability' is True"),
        ({"rules": 5}, "'rules' is 5"),
        ({"rules": {"gap-peak": [1]}}, "'rules.gap-peak' is "),
        ({"candidates": [[1]]}, "'candidates.0' is "),
        ({"state": "sure"}, "'state' is 'sure'"),
        ({"published": [1]}, "'published.0' is 1"),
    ],
)
def test_selections_with_a_field_of_another_type_are_refused(tmp_path, change, problem):
    content = select_layers(effects_of(PLANTED)).plain()
    write_json(tmp_path / "right.json", content)
    assert Selection.load(tmp_path / "right.json").layers  # the control
    write_json(tmp_path / "other.json", {**content, **change})
    with pytest.raises(InputError, match=re.escape(problem)):
        Selection.load(tmp_path / "other.json")


@pytest.mark.parametrize("content", [[1, 2], "3-8", None, 5])
def test_files_that_hold_no_object_are_refused(tmp_path, content):
    write_json(tmp_path / "other.json", content)
    with pytest.raises(InputError, match=r"other\.json' is .*expected a JSON object"):
        Selection.load(tmp_path / "other.json")


@pytest.mark.parametrize("name", ["layers", "stability", "modal", "evidence", "rule"])
def test_selections_that_lack_a_field_are_refused(tmp_path, name):
    content = select_layers(effects_of(PLANTED)).plain()
    del content[name]
    write_json(tmp_path / "other.json", content)
    with pytest.raises(InputError, match=f"'{name}' is absent"):
        Selection.load(tmp_path / "other.json")


# Bad input


def refusal_of(effects):
    """What the selection says of these effects; None where it takes them."""
    try:
        select_layers(effects)
    except InputError as error:
        return str(error)
    return None


def test_a_column_that_is_missing_is_named_or_not_needed():
    effects = effects_of(PLANTED, window=np.array(PLANTED))
    refused = {column: refusal_of(effects.drop(columns=column)) for column in effects}
    refused = {column: message for column, message in refused.items() if message}
    assert {"fact", "kind", "sever", "layer", "role", "effect", "window"} <= set(refused)
    assert all(column in message for column, message in refused.items())


def test_effects_that_do_not_suffice_are_refused():
    effects = effects_of(PLANTED)
    with pytest.raises(InputError, match="sever = 'mlp'"):
        select_layers(effects[effects.sever == "nothing"])
    with pytest.raises(InputError, match="lack the columns sever"):
        select_layers(effects.drop(columns="sever"))
    with pytest.raises(InputError, match="metrics none"):
        select_layers(effects.assign(role="last"))
    with pytest.raises(InputError, match=r"no MLP windows .* kinds state and mlp"):
        select_layers(effects, rule="mlp-window")
    assert "mlp-window" not in select_layers(effects).rules
    with pytest.raises(InputError, match="expected every layer from 0"):
        select_layers(effects[effects.layer != 3])
    with pytest.raises(InputError, match="9 layers are wanted, expected at most all 8"):
        select_layers(effects, config=SelectConfig(min_width=9))


def test_too_few_facts_are_refused_unless_asked_for():
    nine = effects_of(PLANTED, facts=9)
    with pytest.raises(InputError, match=r"9 fact\(s\), expected at least 10"):
        select_layers(nine)
    forced = select_layers(nine, config=SelectConfig(min_facts=9))
    assert forced.layers == (2, 3, 4)
    assert "9 facts are too few" in forced.reason
    assert "too few" not in select_layers(effects_of(PLANTED, facts=10)).reason
    with pytest.raises(InputError, match="expected at least 5; so few facts can show nothing"):
        SelectConfig(min_facts=4)
    assert SelectConfig(min_facts=4, confidence=0.9).min_facts == 4


def test_cells_that_are_missing_there_twice_or_not_finite_are_named():
    effects = effects_of(PLANTED)
    cell = (effects.fact == "fact 7") & (effects.layer == 3) & (effects.sever == "mlp")
    assert cell.sum() == 1
    with pytest.raises(InputError, match=r"fact 'fact 7', layer 3, state, sever = 'mlp': the effect is missing"):
        select_layers(effects[~cell])
    with pytest.raises(InputError, match=r"fact 'fact 7', layer 3, .*'mlp': the effect is there more than once"):
        select_layers(pd.concat([effects, effects[cell]]))
    with pytest.raises(InputError, match=r"fact 'fact 7', layer 3, .*'mlp': the effect is not finite"):
        select_layers(effects.assign(effect=effects.effect.mask(cell)))
    with pytest.raises(InputError, match=r"fact 'fact 7', layer 0, .*'mlp': the effect \(and 7 others\) is missing"):
        select_layers(effects[~((effects.fact == "fact 7") & (effects.sever == "mlp"))])


def test_effects_of_several_models_are_refused():
    effects = effects_of(PLANTED)
    with pytest.raises(InputError, match=r"several models \(a, b\)"):
        select_layers(effects.assign(model=np.where(effects.sever == "mlp", "b", "a")))
    mixed = effects.assign(clean=np.where((effects.sever == "mlp") & (effects.fact == "fact 3"), 0.4, 0.6))
    with pytest.raises(InputError, match=r"fact 'fact 3' has clean scores from 0\.4 to 0\.6"):
        select_layers(mixed)
    rounded = effects.assign(clean=np.where(effects.sever == "mlp", 0.601, 0.6))
    assert select_layers(rounded).layers == (2, 3, 4)


def test_other_metrics_follow_the_same_rules_in_their_own_unit():
    effects = effects_of(PLANTED)
    logs = effects.assign(metric="log_probability", effect=30 * effects.effect)
    both = pd.concat([effects, logs])
    assert select_layers(both).metric == "probability"
    alone = select_layers(logs)
    assert (alone.metric, alone.layers) == ("log_probability", (2, 3, 4))
    assert "nats" in select_layers(logs, "gap-peak").reason
    assert "%" in select_layers(effects, "gap-peak").reason
    assert select_layers(both, config=SelectConfig(metric="log_probability")) == replace(
        alone, settings={**alone.settings, "metric": "log_probability"}
    )
    with pytest.raises(InputError, match="in the metrics log_probability, logit_difference"):
        select_layers(pd.concat([logs, logs.assign(metric="logit_difference")]))
    with pytest.raises(InputError, match="expected kl"):
        select_layers(both, config=SelectConfig(metric="kl"))
    # Divergence from the clean run falls as the fact comes back.
    assert select_layers(effects.assign(metric="kl_clean", effect=-effects.effect)).layers == (2, 3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "by eye"}, "expected one of contribution, gap-peak, mlp-window, moving-average"),
        ({"share": 0}, "share is 0"),
        ({"share": 1.1}, "share is 1.1"),
        ({"confidence": 1}, "confidence is 1"),
        ({"min_width": 0}, "min_width is 0"),
        ({"min_width": 4, "max_width": 3}, "min_width is 4 and max_width 3"),
        ({"width": 6, "max_width": 5}, "width is 6"),
        ({"resamples": 50}, "at least 100"),
    ],
)
def test_settings_are_checked_at_the_door(options, message):
    with pytest.raises(InputError, match=message):
        SelectConfig(**options)


# The registry


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (["gpt2-xl", "openai-community/gpt2-xl", "GPT2-XL", "/models/gpt2-xl/"], (13, 17)),
        (["EleutherAI/gpt-j-6b", "EleutherAI/gpt-j-6B", "gptj", "gpt-j"], (3, 8)),
        (["EleutherAI/gpt-neox-20b"], (6, 10)),
        (["meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B"], (4, 8)),
        (["meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"], (4, 8)),
    ],
)
def test_published_ranges_are_found_by_the_names_in_use(names, layers):
    for name in names:
        memit = next(entry for entry in published_ranges(name) if entry.method == "MEMIT")
        assert (memit.layers[0], memit.layers[-1]) == layers
        assert published_ranges(name)[0].method == "MEMIT"


def test_published_ranges_are_not_found_by_names_alike():
    for name in ("gpt2", "gpt2-x", "gpt2-xl-finetuned", "tiny", "", "llama", "Llama-3.3-8B", "gpt-j-6b/checkpoint"):
        assert published_ranges(name) == [], name
    assert canonical("org/Meta-Llama_3-8B-Instruct-hf/") == "llama-3-8b"


def test_the_registry_holds_conflicts_and_sources():
    qwen = published_ranges("Qwen/Qwen2.5-7B-Instruct")
    assert {(entry.layers[0], entry.layers[-1]) for entry in qwen if entry.method == "MEMIT"} == {
        (4, 8),
        (7, 11),
        (3, 4),
    }
    for entry in [*qwen, *published_ranges("gpt2-medium"), *published_ranges("gpt-j-6b")]:
        assert entry.source
        assert list(entry.layers) == sorted(set(entry.layers))


def test_attributes_of_another_type_are_refused():
    effects = effects_of([0.0, 0.3, 0.2, 0.1, 0.0])
    select_layers(effects)
    effects.attrs["provenance"] = 7
    with pytest.raises(InputError, match="the attributes of the effects"):
        select_layers(effects)
