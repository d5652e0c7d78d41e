"""What a choice of layers costs: regret against the best window, on requests that chose neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import mechedit as me
from analyses.real_models import regret as script
from analyses.real_models.regret import judging_requests, regret, regret_by_count, values_of, windows_by_rule
from mechedit.errors import InputError
from mechedit.evaluation import EvaluationConfig
from mechedit.files import read_json, write_parquet
from mechedit.statistics import harmonic_mean
from mechedit.sweep import Sweep, Window
from mechedit.tables import read_table

CHANCES = {Window(0, 1): 90.0, Window(1, 2): 70.0, Window(2, 3): 40.0}
PLANTED = Path(__file__).parents[1] / "selection" / "planted_effects.parquet"


def sweep_of(chances: dict[Window, float], n: int = 200, seed: int = 0) -> Sweep:
    """A sweep in which every measure of a window succeeds with its chance, in percent; each window has its own luck."""
    draw, rows = np.random.default_rng(seed), []
    for window, chance in chances.items():
        for case in range(n):
            for measure in ("ES", "PS", "NS", "exact_match"):
                rows.append((*window, str(case), measure, 100.0 * (100 * draw.random() < chance)))
    cases = pd.DataFrame(rows, columns=["first", "last", "case", "measure", "value"])
    return Sweep(cases=cases, before={}, failed={}, config=EvaluationConfig(resamples=100), provenance={})


def test_regret_is_what_the_better_window_would_have_gained() -> None:
    swept = sweep_of(CHANCES)
    scores = {window: float(score) for window, score in zip(swept.windows, swept.scores, strict=True)}
    assert regret(swept, Window(0, 1))["mean"] == 0.0
    for window in CHANCES:
        lost = regret(swept, window)
        assert lost["low"] <= lost["mean"] <= lost["high"]
        # Both halves judge, so that it is nearly the difference on all requests.
        assert lost["mean"] == pytest.approx(scores[Window(0, 1)] - scores[window], abs=1.0)
    assert regret(swept, Window(2, 3))["low"] > regret(swept, Window(1, 2))["high"] > 0


def test_the_winner_of_equals_is_not_better_on_the_other_half() -> None:
    """Of ten equal windows the best on all requests looks better than the others by luck alone."""
    equals = {Window(layer, layer): 60.0 for layer in range(10)}
    lucky, honest = [], []
    for seed in range(15):
        swept = sweep_of(equals, n=40, seed=seed)
        lucky.append(swept.scores.max() - swept.scores[4])
        honest.append(regret(swept, Window(4, 4))["mean"])
    assert np.mean(lucky) > 5.0
    assert abs(np.mean(honest)) < 3 * np.std(honest) / np.sqrt(len(honest))


def test_the_interval_holds_the_true_regret_as_often_as_it_says() -> None:
    chances = {Window(0, 1): 90.0, Window(2, 3): 70.0}
    truth = 20.0  # the harmonic mean of equal measures is their value
    covered = 0
    for seed in range(20):
        lost = regret(sweep_of(chances, n=60, seed=seed), Window(2, 3))
        covered += lost["low"] <= truth <= lost["high"]
    assert covered >= 16
    assert harmonic_mean(np.full((1, 3), 0.9))[0] == pytest.approx(0.9)


def test_a_choice_by_few_requests_costs_what_chance_takes() -> None:
    """By five requests windows of 90, 80 and 70 % are confused, by forty hardly; equal ones cost nothing."""
    chances = {Window(0, 1): 90.0, Window(1, 2): 80.0, Window(2, 3): 70.0}
    costs = regret_by_count(values_of(sweep_of(chances)))
    assert list(costs) == [5, 10, 20, 40]
    assert costs[5] > costs[10] > costs[20] > costs[40] > -0.5
    assert 1.0 < costs[5] < 10.0, "less than a window chosen at random loses"
    equal = [regret_by_count(values_of(sweep_of(dict.fromkeys(chances, 80.0), seed=seed)))[5] for seed in range(10)]
    assert abs(np.mean(equal)) < 1.0
    assert not regret_by_count(values_of(sweep_of(chances, n=8)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the effects of a planted model and the selection from them."""
    effects = read_table(PLANTED)
    model = effects["model"].iloc[0]
    effects = effects[effects["model"] == model].drop(columns="model")
    write_parquet(tmp_path / "effects.parquet", effects)
    me.select_layers(effects).save(tmp_path / "selection.json")
    facts = pd.DataFrame({"subject": ["Ada Abel", "Bruno Brandt"], "traced": [True, False]})
    write_parquet(tmp_path / "facts.parquet", facts)
    return tmp_path


def test_every_rule_and_every_copied_range_is_judged(run: Path) -> None:
    selection = me.Selection.load(run / "selection.json")
    rules: dict[str, Any] = windows_by_rule(run, 12)
    for name, rule in selection.rules.items():
        assert rules[f"trace: {name}"]["layers"] == list(rule.layers)
    assert rules["layers 1–5"]["layers"] == [1, 2, 3, 4, 5]
    assert rules["12–28 % of the depth (GPT-J, MEMIT)"]["layers"] == [1, 2, 3]
    assert not any("short sweep" in name for name in rules), "nothing was swept"
    assert "layers 3–8 (GPT-J, MEMIT)" not in windows_by_rule(run, 8), "a range that the model lacks"


def test_what_the_sweep_of_a_run_chooses_is_judged(run: Path) -> None:
    selection = me.Selection.load(run / "selection.json")
    traced, elsewhere = Window(selection.layers[0], selection.layers[-1]), Window(8, 9)
    sweep_of({elsewhere: 100.0, traced: 99.5, Window(7, 8): 20.0}).save(run)
    rules = windows_by_rule(run, 12)
    assert rules["short sweep"]["layers"] == elsewhere.layers
    assert rules["short sweep and trace (default)"]["layers"] == traced.layers
    sweep_of({elsewhere: 100.0, traced: 80.0}).save(run / "finals")
    rules = windows_by_rule(run, 12)
    assert rules["short sweep and trace (default)"]["layers"] == elsewhere.layers, "the finals decide"
    assert rules["short sweep"]["agreement"] == 1.0


def test_nobody_judges_who_was_traced_or_edited(run: Path) -> None:
    requests = me.load_requests("tiny")
    cases = pd.DataFrame({"case": [requests[0].id], "first": 1, "last": 2, "measure": "ES", "value": 100.0})
    write_parquet(run / "sweep_cases.parquet", cases)
    facts = pd.DataFrame({"subject": [requests[1].subject, requests[2].subject], "traced": [True, False]})
    write_parquet(run / "facts.parquet", facts)
    subjects = {request.subject for request in requests if request.target_true}
    judges = judging_requests("tiny", run, len(subjects) - 2, seed=1)
    assert {request.subject for request in judges} == subjects - {requests[0].subject, requests[1].subject}
    with pytest.raises(InputError, match="requests about other subjects than the run's"):
        judging_requests("tiny", run, len(subjects) - 1, seed=1)


def test_the_table_has_a_row_for_each_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def known(judge: Any, windows: Any, count: int) -> Sweep:
        return sweep_of({Window(*ends): 90.0 - 10 * ends[0] for ends in windows}, count)

    monkeypatch.setattr(script.Judge, "sweep", known)
    unsure = {"stability": None, "agreement": None}
    rules = {"low": {"layers": [0, 1], **unsure}, "high": {"layers": [2, 3], **unsure}, "no": {"layers": [], **unsure}}
    judge = script.Judge(model=None, requests=[], moments={}, config=None, out=Path())  # type: ignore[arg-type]
    frame, by_count = script.table(judge, rules, [Window(0, 1), Window(1, 1)], 200)
    frame = frame.set_index("rule")
    assert list(frame.index) == ["low", "high", "best of the screening, 1", "best of the screening, 2", "no"]
    assert frame.loc["low", "layers"] == "0–1"
    assert frame.loc["no", "layers"] == "none"
    assert frame.loc["low", "regret"] == frame.loc["best of the screening, 1", "regret"] == 0.0
    assert frame.loc["high", "regret"] > frame.loc["best of the screening, 2", "regret"] > 5.0
    assert frame.loc["low", "S"] > frame.loc["high", "S"]
    # What has no value, as a rule without layers, is none in the file.
    script.write_rows(tmp_path / "regret.json", "a model", frame.reset_index(), by_count)
    written = read_json(tmp_path / "regret.json")
    assert list(written["by_count"]) == ["5", "10", "20", "40"]
    rows = {row["rule"]: row for row in written["rows"]}
    assert rows["no"]["S"] is rows["low"]["stability"] is None
    assert rows["low"]["S"] == frame.loc["low", "S"]
