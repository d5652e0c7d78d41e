"""How a budget is dealt out: never more than it, more thoroughly the larger it is, refused where it is too small."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mechedit import InputError, MemitConfig, TuneConfig
from mechedit.methods import AlphaEditConfig
from mechedit.tuning.alternatives import alternatives, changed, weights, wider_weight
from mechedit.tuning.ledger import Ledger
from mechedit.tuning.plan import ENOUGH, FEWEST, Plan, Rung, Scope, Speed, make_plan, plan_for_seconds, smallest_plan

SEARCHED = ("relative_lr", "clamp", "kl_weight", "generated_prefixes")
DEEP = Scope(ends=25, requests=64, searched=SEARCHED)
"""A model of some 30 layers, and facts enough."""


def searches(plan: Plan) -> int:
    """The same count by going through every fact at every end layer, naively."""
    done = {(end, fact) for rung in plan.rungs for end in range(rung.ends) for fact in range(rung.facts)}
    done |= {(f"beside {i}", fact) for i in range(plan.neighbors) for fact in range(plan.facts)}
    done |= {("selected", fact) for _ in range(plan.selected) for fact in range(plan.facts)}
    settings = [(name, value) for name in plan.searched for value in (0, 1)]
    return len(done) + len({(setting, fact) for setting in settings for fact in range(plan.facts)})


@pytest.mark.parametrize("ends", [1, 2, 3, 5, 12, 25, 90])
@pytest.mark.parametrize("selected", [False, True])
def test_a_plan_stays_within_its_budget_and_a_larger_one_tries_no_less(ends: int, selected: bool) -> None:
    scope = Scope(ends=ends, requests=64, searched=SEARCHED, selected=selected)
    least, before = smallest_plan(scope).edits, None
    for edits in [*range(least, least + 80, 7), 200, 400, 1000, 10_000]:
        plan = make_plan(edits, scope)
        assert plan.edits == searches(plan) <= edits
        assert plan.facts >= FEWEST
        assert all(rung.ends <= ends for rung in plan.rungs)
        assert before is None or plan.edits >= before.edits - before.facts, "what is gained in one way is not lost"
        before = plan
    assert before.facts == 64
    assert before.searched == SEARCHED
    with pytest.raises(InputError, match=f"the budget is {least - 1} edits, expected at least {least}"):
        make_plan(least - 1, scope)


def test_four_hundred_edits_halve_twelve_ends_down_to_three() -> None:
    plan = make_plan(400, DEEP)
    assert plan.rungs == (Rung(ends=12, facts=10), Rung(ends=6, facts=20), Rung(ends=3, facts=40))
    assert (plan.neighbors, plan.searched) == (2, SEARCHED[:1])
    assert plan.edits == 120 + 60 + 60 + 80 + 80 <= 400
    assert "12 end layers with 10 facts, then 6 end layers with 20 facts" in plan.in_words()
    with_selection = make_plan(400, replace(DEEP, selected=True))
    assert (with_selection.facts, with_selection.searched) == (44, ()), "the selected window is tried with all facts"


@pytest.mark.parametrize("edits", range(50, 800, 25))
def test_no_setting_is_tried_before_windows_have_enough_facts(edits: int) -> None:
    plan = make_plan(edits, DEEP)
    if plan.searched:
        assert plan.facts >= ENOUGH
        assert plan.rungs[0].ends == 12
    else:
        assert edits < 400, "the control: with enough edits settings are tried"
        assert plan.edits > edits - 16, "all edits go into windows"


def test_edits_that_cannot_be_made_are_not_set_aside() -> None:
    """Where the first round tries all end layers none is left beside them; where it is the only one, none selected."""
    every = replace(DEEP, ends=12)
    assert make_plan(400, every).neighbors == 0
    assert make_plan(400, DEEP).neighbors == 2, "the control"
    few = Scope(ends=2, requests=40, selected=True)
    assert smallest_plan(few).edits == 2 * FEWEST
    assert make_plan(400, few).selected == 0
    assert make_plan(400, replace(every, selected=True)).selected == 1, "the control: the rounds leave some out"


def test_a_single_window_leaves_the_edits_to_settings() -> None:
    plan = make_plan(150, replace(DEEP, ends=1, fixed=True))
    assert plan.searched == SEARCHED
    assert plan.facts == 16


def test_a_small_budget_tries_fewer_facts_before_fewer_ends() -> None:
    assert make_plan(130, DEEP).rungs == (Rung(ends=12, facts=4), Rung(ends=6, facts=8), Rung(ends=3, facts=16))
    for edits in (80, 100, 120, 150):
        plan = make_plan(edits, DEEP)
        assert plan.rungs[0].ends >= 4
        assert plan.searched == ()


def test_few_facts_leave_edits_over_and_chosen_windows_are_all_tried() -> None:
    plan = make_plan(400, replace(DEEP, requests=8))
    assert (plan.facts, plan.searched) == (8, SEARCHED)
    plan = make_plan(400, replace(DEEP, ends=7, fixed=True))
    assert plan.rungs[0].ends == 7
    assert plan.neighbors == 0


def test_minutes_become_the_most_edits_that_fit_into_them() -> None:
    speed = Speed(edit=2.5, low_edit=2.5, trial=2.0, fact=0.1)
    plan = plan_for_seconds(1200, speed, DEEP)
    assert plan.seconds(speed) <= 1200
    assert plan.edits > 250
    more = make_plan(plan.edits + 60, DEEP)
    assert more.seconds(speed) > 1200, "no larger plan fits"
    for slower in ({"edit": 10}, {"low_edit": 5}, {"trial": 8.0}, {"fact": 1.0}):
        assert plan_for_seconds(1200, replace(speed, **slower), DEEP).edits < plan.edits
    with pytest.raises(
        InputError, match=r"the budget is 0\.5 minutes, expected at least [\d.]+ at 2\.5 to 2\.5 seconds per edit"
    ):
        plan_for_seconds(30, speed, DEEP)


@pytest.mark.parametrize("best", [1, 12, 24])
def test_minutes_hold_wherever_the_best_window_lies(best: int) -> None:
    """Of 25 end layers: a search takes a second for each block above its own, and the middle one was measured."""
    speed = Speed(edit=13.0, low_edit=25.0, trial=2.0, fact=0.1)
    plan = plan_for_seconds(7200, speed, DEEP)
    first, *rest = plan.rungs
    ends = np.linspace(0, 24, first.ends).round()
    near = sorted(ends, key=lambda end: abs(end - best))
    seconds, facts = first.facts * (25 - ends).sum(), first.facts
    for rung in rest:
        seconds += (rung.facts - facts) * sum(25 - end for end in near[: rung.ends])
        facts = rung.facts
    seconds += (plan.neighbors + 2 * len(plan.searched)) * facts * (25 - best)
    written = plan.seconds(replace(speed, edit=0.0, low_edit=0.0))
    assert written < seconds + written <= 7200
    if best == 1:
        assert plan.seconds(replace(speed, low_edit=speed.edit)) < seconds + written, "the middle one says too little"


def test_a_speed_that_no_machine_has_gives_a_plan_all_the_same() -> None:
    fast = Speed(edit=1e-300, low_edit=1e-300, trial=0, fact=0)
    scope = Scope(ends=6, requests=100)
    assert plan_for_seconds(1e30, fast, scope) == make_plan(10**8, scope)


@pytest.mark.parametrize("speed", [{"edit": 0}, {"edit": -1.0}, {"low_edit": 0}, {"trial": -1}, {"fact": -1}])
def test_a_ledger_of_no_speed_is_refused(tmp_path: Path, speed: dict[str, float]) -> None:
    ledger = Ledger.at(tmp_path, {})
    ledger.speed = Speed(edit=0.5, low_edit=1.0, trial=0.0, fact=0.0)
    with ledger.timed("trial"):
        pass
    assert Ledger.at(tmp_path, {}).speed == ledger.speed  # the control
    content = json.loads(ledger.file.read_text())
    for damage in ({"speed": {**content["speed"], **speed}}, {"seconds": {"trial": -1}}):
        ledger.file.write_text(json.dumps({**content, **damage}))
        with pytest.raises(InputError, match=r"is not as it was written.*remove it, and the search measures"):
            Ledger.at(tmp_path, {})
        ledger.file.write_text(json.dumps({"speed": content["speed"], "seconds": content["seconds"], **damage}))
        with pytest.raises(InputError, match=r"is -?\d.*, expected .*remove it, and the search measures"):
            Ledger.at(tmp_path, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edits": 3, "minutes": 1}, "expected one of the two"),
        ({"edits": 0}, "edits is 0, expected at least 1"),
        ({"minutes": 0}, "minutes is 0, expected a number above 0"),
        ({"minutes": float("nan")}, "minutes is nan"),
        ({"width": 0}, "width is 0, expected at least 1"),
        ({"facts": 3}, "facts is 3, expected at least 4"),
    ],
)
def test_bad_budgets_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        TuneConfig(**settings)


def test_other_values_lie_on_both_sides_and_in_the_unit_of_the_config() -> None:
    config = MemitConfig()
    assert alternatives(config, "relative_lr") == [{"relative_lr": 0.1}, {"relative_lr": 0.4}]
    assert alternatives(config, "clamp") == [{"clamp": 0.5}, {"clamp": 1.0}]
    assert alternatives(MemitConfig(clamp=3.0), "clamp") == [{"clamp": 2.0}, {"clamp": 1.5}]
    assert alternatives(config, "generated_prefixes") == [{"generated_prefixes": 0}, {"generated_prefixes": 10}]
    assert {"relative_covariance_weight": config.relative_covariance_weight} not in weights(config)
    assert wider_weight(config, {"relative_covariance_weight": 1.0}, larger=True) == {"relative_covariance_weight": 3.0}
    assert weights(AlphaEditConfig()) == []
    # A config in absolute units is left for relative ones; the published convention has absolute ones throughout.
    absolute = MemitConfig(lr=0.5, covariance_weight=100)
    for change in (*alternatives(absolute, "relative_lr"), *weights(absolute)):
        other = changed(absolute, change)
        assert (other.lr is None) == ("relative_lr" in change)
        assert (other.covariance_weight is None) == ("relative_covariance_weight" in change)
    published = MemitConfig(convention="memit-2022")
    assert {changed(published, change).covariance_weight for change in weights(published)} == {150, 1500, 150_000}
    assert {changed(published, change).lr for change in alternatives(published, "relative_lr")} == {0.25, 1.0}
