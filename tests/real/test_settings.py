"""The script that measures MEMIT's settings, in small on the tiny model; and its comparison of rules for λ."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest

import mechedit as me
from analyses.real_models import settings
from mechedit.errors import InputError
from mechedit.files import read_json

LAYERS = "2-3"
SHARED = ["tiny", "--requests", "tiny", "--layers", LAYERS, "--count", "4"]


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Iterator[None]:
    """All runs of the script get one model, which they leave as it was."""
    with mock.patch.object(me, "load_model", functools.cache(me.load_model)):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both measurements, in one folder."""
    out = tmp_path_factory.mktemp("settings")
    settings.main(["rates", *SHARED, "--out", str(out), "--rates", "0.2", "0.001", "published"])
    model = me.load_model("tiny", device="cpu")
    me.collect_moments(model, "tiny", [2, 3], me.MomentsConfig(tokens=5_000), out=out)
    weights = ["--facts", "4", "1", "--singles", "2", "--absolute", "1e8", "1", "--relative", "1e4", "0.01"]
    settings.main(["weights", *SHARED, "--out", str(out), "--moments", str(out), "--rate", "0.2", *weights])
    return out


def test_rates_tell_a_search_that_arrives_from_one_that_does_not(folder: Path) -> None:
    rows = read_json(folder / "rates_tiny_2-3_4.json")
    assert [row["learning rate"] for row in rows] == ["0.2", "0.001", "lr 0.5"]
    fast, slow, published = rows
    assert fast["converged"] == 100.0
    assert published["converged"] >= 50.0 > slow["converged"] == 0.0
    assert slow["norm ratio"] < 0.03 < fast["norm ratio"]


def test_weights_trade_what_is_written(folder: Path) -> None:
    table = settings.all_rows(folder, "weights")
    unedited = table[table["value"].isna()]
    assert list(unedited["facts"]) == [4, 1]
    assert (unedited["ES"] < 50).all()
    assert (unedited["left"] == 100).all()
    results = table.dropna(subset=["value"]).set_index(["facts", "relative", "value"])
    for facts in (4, 1):
        for relative, heavy, light in ((False, 1e8, 1.0), (True, 1e4, 0.01)):
            assert results.loc[(facts, relative, heavy), "left"] > 90
            assert results.loc[(facts, relative, light), "left"] < 30
    # What is the larger λ, if it is 15,000 or 1, depends on the keys.
    assert all(len(strengths) == 2 and min(strengths) > 0 for strengths in results["strength"])


def test_finished_measurements_are_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "scored", None)
    values = ["--facts", "1", "--singles", "2", "--absolute", "1", "--relative", "0.01"]
    again = ["weights", *SHARED, "--out", str(folder), "--moments", str(folder), "--rate", "0.2", *values]
    before = settings.all_rows(folder, "weights")
    settings.main(again)
    after = settings.all_rows(folder, "weights")
    pd.testing.assert_frame_equal(
        after, before[(before["facts"] == 1) & ~before["value"].isin([1e8, 1e4])].reset_index(drop=True)
    )
    capsys.readouterr()
    settings.main(["table", "--out", str(folder)])
    shown = capsys.readouterr().out
    assert "| tiny | 2–3 | 1 | relative | 0.01 |" in shown
    with pytest.raises(TypeError):  # one that is not finished is measured
        settings.main([*again[:-1], "0.02"])


def test_more_facts_than_requests_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="there are 4 requests, expected 5; raise --count"):
        settings.main(["weights", *SHARED, "--facts", "5", "--moments", str(folder), "--out", str(folder)])


def measured(best: dict[str, float]) -> pd.DataFrame:
    """Scores that fall from 100 with the distance of log λ to the best, which is that of the rule by its name."""
    rows = []
    for model, d_mlp, strength in (("a", 100, 300.0), ("b", 5000, 40.0)):
        for facts in (1, 100):
            optimum = best["c"] * facts ** best["facts"] * d_mlp ** best["d_mlp"] * strength ** best["strength"]
            for relative, values in ((False, np.logspace(-4, 9, 27)), (True, np.logspace(-7, 6, 27))):
                for value in values:
                    weight = value * strength if relative else value
                    score = 100 - 10 * abs(np.log10(weight / optimum))
                    rows.append({"model": model, "window": "1–5", "facts": facts, "relative": relative,
                                 "value": value, "d_mlp": d_mlp, "S": score})  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("rule", "exponents"),
    [
        ("c", {}),
        ("c · facts", {"facts": 1}),
        ("c · d_mlp", {"d_mlp": 1}),
        ("c · median kᵀM⁻¹k", {"strength": 1}),
    ],
)
def test_the_rule_by_which_scores_were_made_loses_least(rule: str, exponents: dict[str, float]) -> None:
    best = {"c": 0.1, "facts": 0, "d_mlp": 0, "strength": 0, **exponents}
    compared = settings.compared_rules(measured(best)).set_index("rule")
    assert compared.loc[rule, "worst"] < 3  # the scores are measured half a decade apart
    assert compared.loc[rule, "c"] == pytest.approx(0.1, rel=0.8)
    assert (compared["worst"].drop(rule) > 3 + compared.loc[rule, "worst"]).all()


def test_a_model_measured_in_one_unit_alone_is_left_out_of_the_comparison() -> None:
    results = measured({"c": 0.1, "facts": 0, "d_mlp": 0, "strength": 0})
    unfinished = results[results["relative"]].assign(model="c", S=50.0)
    compared = settings.compared_rules(pd.concat([results, unfinished]))
    pd.testing.assert_frame_equal(compared, settings.compared_rules(results))
    with pytest.raises(InputError, match="no model has scores by both --relative and --absolute"):
        settings.compared_rules(unfinished)
