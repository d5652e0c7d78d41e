"""The papers' tracing figures: what the scripts print is what the effects in their folder say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analyses.common.command import open_experiment, options
from analyses.papers import trace_average, trace_severed
from mechedit import load_facts, pipeline
from mechedit.files import read_json, write_parquet
from mechedit.trace import KIND_LABELS, ROLE_LABELS, sever_in_words

FACTS = 10
"""As few as a selection takes."""
UNKNOWN = "unknown"
KINDS = {"fact", "severed", "lines"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Facts that the tiny model knows, and one that it does not."""
    path = tmp_path_factory.mktemp("papers")
    short = sorted(load_facts("known"), key=lambda fact: len(fact.text))
    facts = short[: 20 * FACTS : 20]
    wrong = replace(facts[0], id=UNKNOWN, object=next(f.object for f in facts if f.object != facts[0].object))
    rows = [json.dumps(asdict(fact)) for fact in (*facts, wrong)]
    (path / "facts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def words(folder) -> Sequence[str]:
    return ["--quick", "--facts", str(folder / "facts.jsonl"), "--out", str(folder)]


@pytest.fixture(scope="module")
def averaged(folder, words, light_figures) -> Path:
    trace_average.main(words)
    return folder


@pytest.fixture(scope="module")
def severed(folder, words, light_figures) -> Path:
    assert trace_severed.main(words) == 0
    return folder


def test_the_averages_are_the_largest_over_layers_of_means_over_facts(averaged):
    effects = pd.read_parquet(averaged / "trace" / "effects.parquet")
    cell = ["kind", "sever", "role"]
    by_fact = effects.groupby([*cell, "layer", "fact"])["effect"].mean()  # over the role's tokens
    means = by_fact.groupby([*cell, "layer"]).mean()
    scores = effects.drop_duplicates("fact")
    total = (scores["clean"] - scores["corrupted"]).mean()
    printed = pd.read_csv(averaged / "trace_average.csv")
    paper = printed.loc[printed["kind"].str.contains("paper"), :].set_index("role")
    assert list(paper.index) == ["last subject token"] * 3 + ["last token"]
    # ROME's Appendix B.2 gives a score for the last token, which the corrupted probability is taken from.
    assert paper.loc["last token", "AIE"] == pytest.approx(16.5 - 8.47, abs=0.05)
    printed = printed.loc[~printed["kind"].str.contains("paper"), :].set_index(["kind", "severed", "role"])
    assert len(printed) == means.groupby(cell).ngroups
    for (kind, sever, role), curve in means.groupby(cell):
        row = printed.loc[KIND_LABELS[kind], sever_in_words(sever), ROLE_LABELS[role]]
        best = curve.droplevel(cell)
        assert row["AIE"] == pytest.approx(100 * best.max(), abs=0.0501)
        assert best[row["layer"]] == pytest.approx(best.max(), abs=1e-9)
        assert row["low"] <= row["AIE"] <= row["high"]
        assert row["ATE"] == pytest.approx(100 * total, abs=0.0501)
    early = printed.sort_index().loc["single state", "nothing severed"]["AIE"]
    assert early["last subject token"] > 5 > 1 > early["further tokens"]
    # After its last block the last token's state is all that is read: restoring it gives back all that was lost.
    assert early["last token"] == pytest.approx(100 * total, abs=0.0501)


def test_the_tidy_averages_hold_every_layer_whole_and_severed(averaged):
    table = pd.read_parquet(averaged / "trace_average.parquet")
    assert list(table) == ["kind", "sever", "metric", "role", "layer", "mean", "low", "high", "facts"]
    assert {(kind, sever) for kind, sever in zip(table["kind"], table["sever"], strict=True)} == {
        *((kind, "nothing") for kind in KIND_LABELS),
        *(("state", sever) for sever in ("mlp", "attn")),
    }
    assert set(table.loc[table["sever"] != "nothing", "role"]) == {"subject_last"}
    assert set(table.groupby(["kind", "sever", "role"])["layer"].nunique()) == {10}


def test_facts_that_are_not_known_are_dropped_with_the_reason(averaged):
    facts = pd.read_csv(averaged / "trace_average_facts.csv").set_index("id")
    assert len(facts) == FACTS + 1
    assert list(facts.index[~facts["traced"]]) == [UNKNOWN]
    assert "the model says" in facts.loc[UNKNOWN, "reason"]
    traced = facts.loc[facts["traced"]]
    assert traced["reason"].isna().all()
    assert (traced["clean"] > traced["corrupted"]).mean() > 0.9


def test_the_severed_table_is_means_over_facts_and_their_differences(severed):
    effects = pd.read_parquet(severed / "selection" / "effects.parquet").query("kind == 'state'")
    table = pd.read_csv(severed / "trace_severed.csv").set_index("layer")
    for column, sever in (("state", "nothing"), ("mlp_severed", "mlp"), ("attn_severed", "attn")):
        means = effects[effects["sever"] == sever].groupby("layer")["effect"].mean()
        np.testing.assert_allclose(table[column], 100 * means, atol=0.00501)
    np.testing.assert_allclose(table["gap"], table["state"] - table["mlp_severed"], atol=0.0151)
    np.testing.assert_allclose(table["contribution"][1:], -np.diff(table["gap"]), atol=0.0151)
    assert table["contribution"].iloc[0] == 0
    for column in trace_severed.MEASURES:
        assert (table[f"{column}_low"] <= table[column]).all()
        assert (table[column] <= table[f"{column}_high"]).all()
    assert table["gap"].max() > 5, "there is a gap to be found"
    selection = read_json(severed / "selection" / "selection.json")
    assert list(table.index[table["chosen"]]) == selection["layers"] != []
    assert table.loc[table["chosen"], "membership"].min() > table.loc[~table["chosen"], "membership"].max()


def test_the_rules_come_with_the_one_that_chose_first(severed):
    rules = pd.read_csv(severed / "trace_severed_rules.csv")
    selection = read_json(severed / "selection" / "selection.json")
    assert rules["rule"].iloc[0] == selection["rule"]
    assert set(rules["rule"]) == set(selection["rules"])
    assert rules["stability"].iloc[0] == pytest.approx(100 * selection["stability"], abs=0.0501)
    assert rules["stability"].between(0, 100).all()


def test_the_bars_have_the_intervals_of_the_table(severed):
    tidy = pd.read_parquet(severed / "trace_severed.parquet")
    assert list(tidy) == ["layer", "measure", "mean", "low", "high"]
    assert set(tidy["measure"]) == {*trace_severed.MEASURES, "membership"}
    table = pd.read_csv(severed / "trace_severed.csv").set_index("layer")
    for measure in trace_severed.MEASURES:
        rows = tidy[tidy["measure"] == measure].set_index("layer")
        for end, column in (("mean", measure), ("low", f"{measure}_low"), ("high", f"{measure}_high")):
            np.testing.assert_allclose(100 * rows[end], table[column], atol=0.00501)


@pytest.mark.parametrize(
    ("main", "outputs", "effects"),
    [
        (trace_average.main, ["trace_average", *(f"trace_average_{kind}" for kind in KINDS)], "trace"),
        (trace_severed.main, ["trace_severed"], "selection"),
    ],
)
def test_run_again_it_draws_again_from_what_was_traced(
    averaged, severed, words, monkeypatch, main: Callable[..., Any], outputs: list[str], effects: str
):
    files = [averaged / f"{name}.{kind}" for name in outputs for kind in ("pdf", "png")] + [
        averaged / f"{outputs[0]}.csv"
    ]
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}
    traced = (averaged / effects / "effects.parquet").stat().st_mtime_ns
    monkeypatch.setattr("mechedit.trace.folder.plan_trace", None)  # what is there needs no tracing
    main(words)
    assert (averaged / effects / "effects.parquet").stat().st_mtime_ns == traced
    for file, (made_at, content) in before.items():
        assert file.stat().st_mtime_ns > made_at
        assert file.read_bytes() == content
    with pytest.raises(TypeError):
        main([*words, "--out", str(averaged / "other")])


def test_without_an_early_site_nothing_is_selected_and_the_bars_are_drawn(
    severed, words, light_figures, monkeypatch, capsys
):
    """The MLPs at the subject's last token do nothing: severed or not, the effects are the same."""
    file = severed / "selection" / "effects.parquet"
    effects = pd.read_parquet(file)
    cell = ["fact", "kind", "layer", "position"]
    unsevered = effects[effects["sever"] == "nothing"].set_index(cell)
    cut = effects["sever"] == "mlp"
    effects.loc[cut, ["score", "effect"]] = unsevered.loc[
        list(effects.loc[cut, cell].itertuples(index=False, name=None)), ["score", "effect"]
    ].to_numpy()
    with monkeypatch.context() as planted:
        planted.setattr(Figure, "savefig", light_figures)
        planted.setattr(pipeline, "trace_step", lambda run, *_: write_parquet(run.path / "effects.parquet", effects))
        out = severed / "none"
        assert trace_severed.main([*words, "--out", str(out)]) == 3
    assert "no layers are selected from 10 facts: no early site" in capsys.readouterr().out
    table = pd.read_csv(out / "trace_severed.csv")
    assert not table["chosen"].any()
    assert (table["gap"] == 0).all()
    assert set(pd.read_csv(out / "trace_severed_rules.csv")["layers"]) == {"none"}
    assert (out / "trace_severed.pdf").stat().st_size > 5000
    assert (out / "trace_severed.png").is_file()


def test_a_script_traces_as_many_facts_as_it_asks_for_by_default(tmp_path):
    assert len(open_experiment("try", options("Try.", max_facts=7), ["--out", str(tmp_path)]).facts) == 7
    assert (
        len(open_experiment("try", options("Try.", max_facts=7), ["--out", str(tmp_path), "--max-facts", "9"]).facts)
        == 9
    )
