"""The papers' editing scripts in their quick form: files, columns, what is reused, and numbers taken directly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import mechedit as me
from analyses.common.alone import check_records, scored_alone
from analyses.common.batches import disjoint_batches, scored_in_batches
from analyses.common.beside import paper_scores
from analyses.common.command import open_experiment, options
from analyses.common.counterfacts import counterfacts
from analyses.common.experiment import Experiment
from analyses.common.free_text import references_of, with_own_prompts
from analyses.common.variants import Variant
from analyses.papers import runtime, scaling_curve, table_counterfact, table_zsre
from mechedit import Fact, InputError, edited, evaluate, load_facts, published_scores
from mechedit.tables import where

METHODS = "memit,rome@2"


def arguments(out: Path, *more: str) -> list[str]:
    """Few requests, layers that need no trace, two methods."""
    return ["--quick", "--count", "3", "--layers", "1-3", "--out", str(out), "--methods", METHODS, *more]


@pytest.fixture(scope="module")
def out(papers_folder, light_figures) -> Path:
    """One folder for all scripts, as for a reader."""
    return papers_folder()


@pytest.fixture(scope="module")
def scaling(out) -> pd.DataFrame:
    assert scaling_curve.main(arguments(out)) == 0
    return pd.read_parquet(out / "scaling_curve.parquet")


@pytest.fixture(scope="module")
def experiment(out) -> Experiment:
    return open_experiment(
        "direct", options("Direct."), ["--quick", "--count", "3", "--layers", "1-3", "--out", str(out)]
    )


def refuses(*_: object, **__: object) -> None:
    raise AssertionError("what is kept was made again")


def test_sizes_are_the_papers_seventeen():
    # exp(ln(10,000)·i/16) = 10^(i/4): 1, 1.78, 3.16, 5.62, 10, …
    assert scaling_curve.sizes(10_000)[:5] == [1, 2, 3, 6, 10]
    assert scaling_curve.sizes(10_000)[-2:] == [5623, 10_000]
    assert len(scaling_curve.sizes(10_000)) == 17
    assert scaling_curve.sizes(8, 4) == [1, 2, 3, 5, 8]  # 8^(1/4) = 1.68, 8^(1/2) = 2.83, 8^(3/4) = 4.76


def test_scaling_curve_has_every_method_at_every_size(out, scaling):
    assert list(scaling) == ["edits", "method", "layers", "measure", "mean", "low", "high", "n"]
    scores = where(scaling, measure="S")
    for name in ("unedited", "memit", "rome"):
        assert list(where(scores, method=name)["edits"]) == [1, 2, 3]
    assert (scores["n"] == scores["edits"]).all()
    assert (scores["low"] <= scores["mean"]).all()
    for suffix in (".csv", "_order.csv", ".pdf", ".png"):
        assert (out / f"scaling_curve{suffix}").stat().st_size > 100
    means = where(scores, method="memit")["mean"]
    assert where(scores, method="unedited")["mean"].max() == 0 < means.iloc[-1]  # there is something to see


def test_scaling_curve_agrees_with_an_edit_made_directly(scaling, experiment):
    requests = experiment.requests[:2]
    for method, layers in (("memit", (1, 2, 3)), ("rome", (2,))):
        edit = experiment.edit(Variant(method=method, layers=layers), requests)
        with edited(experiment.model, edit):
            direct = evaluate(experiment.model, requests, experiment.evaluation).summary()
        rows = where(scaling, method=method, edits=2).set_index("measure")["mean"]
        for measure in ("ES", "PS", "NS", "PM", "NM"):  # PM and NM are differences of probabilities, not shares
            assert rows[measure] == pytest.approx(direct[measure]["mean"], abs=1e-3)
        assert direct["PM"]["mean"] != 0


def test_few_edits_are_made_in_disjoint_batches_and_averaged(experiment):
    """Each batch from the unedited model, the last one smaller, as in the published code; against a plain loop."""
    requests, config = experiment.requests, experiment.evaluation
    batches = disjoint_batches(requests, 2, 3)
    assert [[r.id for r in batch] for batch in batches] == [[r.id for r in requests[:2]], [requests[2].id]]
    assert [len(batch) for batch in disjoint_batches(requests, 2, 1)] == [2], "one batch where enough records are in it"
    trained = Variant(method="ft", layers=(2,), settings={"steps": "3"})
    scores = scored_in_batches(experiment, {"unedited": None, "ft": trained}, batches, config)
    values = []
    for batch in batches:
        with edited(experiment.model, experiment.edit(trained, batch)):
            values += (
                evaluate(experiment.model, batch, config).table.groupby(["measure", "case"])["value"].mean().items()
            )
    for measure in ("ES", "PS", "NS", "PM", "NM"):
        expected = 100 * np.mean([value for (name, _), value in values if name == measure])
        row = where(scores["ft"], measure=measure).iloc[0]
        assert (row["mean"], row["n"]) == (pytest.approx(expected, abs=1e-3), len(requests))
    before, after = (where(scores[name], measure="PM")["mean"].item() for name in ("unedited", "ft"))
    assert abs(after - before) > 1, "the control: three steps of training change something"


def test_the_first_of_romes_edits_are_its_edit_of_the_first(scaling, experiment):
    rome = Variant(method="rome", layers=(2,))
    of_three, of_two = (experiment.edit(rome, experiment.requests[:count]) for count in (3, 2))
    first_two = scaling_curve.first(of_three, 2)
    assert torch.allclose(first_two.delta(2), of_two.delta(2), rtol=0, atol=1e-5 * of_two.delta(2).norm())
    assert not torch.allclose(of_three.delta(2), of_two.delta(2), rtol=0, atol=1e-2 * of_two.delta(2).norm())
    assert first_two.manifest["requests"] == of_two.manifest["requests"]


def test_the_order_is_that_of_the_largest_n(out, scaling):
    table = pd.read_csv(out / "scaling_curve_order.csv")
    means = where(scaling, measure="S", edits=3).set_index("method")["mean"]
    assert list(means[table["method"]]) == sorted(means.drop("unedited"), reverse=True)
    assert list(table["place"]) == [1, 2]


def test_a_second_run_makes_nothing_again(out, scaling, monkeypatch, no_figures):
    no_figures()
    monkeypatch.setattr(Experiment, "score_rows", refuses)
    monkeypatch.setattr(Experiment, "edit", refuses)
    assert scaling_curve.main(arguments(out)) == 0
    pd.testing.assert_frame_equal(pd.read_parquet(out / "scaling_curve.parquet"), scaling)
    with pytest.raises(AssertionError, match="made again"):
        scaling_curve.main(arguments(out, "--seed", "1"))


def test_table_has_the_papers_columns_and_leaves_out_what_has_no_data(out, capsys):
    assert table_counterfact.main(arguments(out)) == 0
    table = pd.read_csv(out / "table_counterfact.csv")
    assert list(table)[:6] == ["method", "layers", "S", "ES", "PS", "NS"]
    assert not {"GE", "RS"} & set(table)
    assert list(table["method"])[:3] == ["unedited", "memit", "rome"]
    # Below them, the paper's own rows, as its table prints them.
    paper = published_scores("memit_table_2", "GPT-J").set_index(["method", "measure"])["mean"]
    printed = table.set_index("method").loc["memit, paper (GPT-J)"]
    for measure in ("ES", "PS", "NS"):
        assert printed[measure].startswith(f"{paper['memit', measure]:.1f} (")
    assert printed["S"] == f"{paper['memit', 'S']:.1f}", "no interval is printed for S"
    assert "memit" in capsys.readouterr().out
    tidy = pd.read_parquet(out / "table_counterfact.parquet")
    row = where(tidy, method="memit", measure="NS").iloc[0]
    assert table.loc[1, "NS"] == f"{row['mean']:.1f} ({(row['high'] - row['low']) / 2:.1f})"
    unwritten = where(tidy, method="memit", measure="left")["mean"].item()
    assert 0 < unwritten < 100
    assert float(table.loc[1, "left"]) == pytest.approx(unwritten, abs=0.05)
    assert (out / "table_counterfact.png").is_file()


def test_free_text_brings_ge_and_rs(out, no_figures):
    no_figures()
    assert table_counterfact.main(arguments(out, "--free", "1", "--count", "2", "--methods", "memit")) == 0
    tidy = pd.read_parquet(out / "table_counterfact.parquet")
    for measure, least, most in (("GE", 100, 800), ("RS", 0.1, 100)):
        rows = where(tidy, measure=measure)
        assert set(rows["method"]) == {"unedited", "memit"}
        assert rows["mean"].between(least, most).all()


def test_references_are_texts_that_start_with_a_subject_of_the_object():
    facts = [
        Fact(id="a", subject="Ada", prompt="{} likes", object=" tea", relation="drink"),
        Fact(id="b", subject="Ada Bly", prompt="{} likes", object="milk", relation="drink"),
        Fact(id="c", subject="Cy", prompt="{} likes", object="tea", relation="drink"),
    ]
    texts = ["Ada has a cup.", "Ada Bly's farm has cows.", "Cy and Ada Bly met.", "Of Ada nothing is known."]
    by_object = references_of(facts, texts).texts
    assert by_object == {("drink", "tea"): (texts[0], texts[2]), ("drink", "milk"): (texts[1],)}
    assert references_of(facts, texts, limit=1).texts["drink", "tea"] == (texts[0],)
    with pytest.warns(UserWarning, match="no text starts with a subject.*RS is left out"):
        assert references_of(facts, ["Nobody."]) is None


def test_records_without_prompts_for_free_text_start_it_with_their_own(out, no_figures, monkeypatch):
    bare = [dataclasses.replace(request, generations=()) for request in me.load_requests("tiny")[:2]]
    monkeypatch.setattr("analyses.common.inputs.load_requests", lambda source, conflicts: bare)
    no_figures()
    assert table_counterfact.main(arguments(out, "--free", "1", "--count", "2", "--methods", "ft@2")) == 0
    tidy = pd.read_parquet(out / "table_counterfact.parquet")
    assert "GE" not in set(tidy["measure"]), "it is not the papers' measure"
    of_own_prompts = where(tidy, measure="GE own")
    assert set(of_own_prompts["method"]) == {"unedited", "ft"}
    assert of_own_prompts["mean"].between(100, 800).all()
    printed = pd.read_csv(out / "table_counterfact.csv")
    assert "GE" not in printed, "nor do the papers' numbers stand in its column"
    assert printed["GE own"].notna().sum() == 2
    asked = with_own_prompts(bare[0])
    assert asked.generations == bare[0].paraphrases
    assert with_own_prompts(dataclasses.replace(bare[0], paraphrases=())).generations == (bare[0].text,)


def test_every_request_on_the_tiny_model_has_references():
    texts = (Path(__file__).parents[2] / "mechedit/data/tiny/texts.txt").read_text().splitlines()
    facts = load_facts("known")
    references = references_of(facts, texts)
    assert all(references.of(request) for request in counterfacts(facts, 200))


def test_runtime_times_stages_and_methods(out, experiment, monkeypatch, no_figures):
    command_line = arguments(out, "--count", "4", "--methods", "ft@2")
    assert runtime.main(command_line) == 0
    table = pd.read_parquet(out / "runtime.parquet")
    assert {"facts", "method", "stage", "seconds", "cpu", "memit", "processor", "threads", "torch", "device"} <= {
        *table
    }
    stages = table.pivot_table(index="facts", columns="stage", values="seconds")
    assert list(stages.index) == [0, 2, 4]  # the second moments serve any number of facts
    parts = stages.loc[2:, ["search", "keys", "solve"]]
    assert (parts > 0).all(axis=None)
    np.testing.assert_allclose(parts.sum(axis=1), stages.loc[2:, "total"], rtol=0.05)
    assert (where(table, stage="whole")["memit"] > 0).all()
    printed = pd.read_csv(out / "runtime.csv")
    measured = ["second moments", *(f"memit: {s}" for s in runtime.STAGES), "ft"]
    assert list(printed["what"])[: len(measured)] == measured
    paper = printed.set_index("what").loc["rome, paper (GPT-J)"]
    assert paper["facts"] == "10000"
    assert float(paper["of memit"]) == pytest.approx(12.29 / 7.44, abs=0.01)  # hours, Appendix B
    no_figures()
    monkeypatch.setattr(runtime, "stage_seconds", refuses)
    monkeypatch.setattr(runtime, "make_edit", refuses)
    assert runtime.main(command_line) == 0
    monkeypatch.setattr(runtime, "processor", lambda: "another")
    with pytest.raises(AssertionError, match="made again"):
        runtime.main(command_line)


def test_the_exponent_is_the_slope_in_logarithms():
    facts = np.array([2, 4, 8])
    assert runtime.exponent(pd.DataFrame({"facts": facts, "seconds": 0.3 * facts**1.5})) == pytest.approx(1.5)
    assert np.isnan(runtime.exponent(pd.DataFrame({"facts": [4], "seconds": [1.0]})))
    assert runtime.halvings(100) == [6, 12, 25, 50, 100]
    assert runtime.halvings(4) == [2, 4]


def test_a_method_of_one_layer_takes_the_middle_one(experiment):
    variants = experiment.variants(["memit", "rome", "emmet@middle", "rome@3"])
    assert [variant.layers for variant in variants] == [(1, 2, 3), (2,), (2,), (3,)]
    with pytest.raises(InputError, match="each once"):
        experiment.variants(["rome", "rome@2"])
    with pytest.raises(InputError, match="each once"):
        experiment.variants([])


def test_records_are_edited_one_by_one_from_the_unedited_model(out, experiment):
    rome = Variant(method="rome", layers=(2,))
    table = scored_alone(experiment, rome, experiment.requests, "counterfact").set_index("measure")
    config = dataclasses.replace(experiment.config(rome), joint=False)
    alone = []
    for request in experiment.requests:
        edit = me.rome(experiment.model, [request], [2], experiment.moments([2]), config=config)
        with edited(experiment.model, edit):
            alone.append(evaluate(experiment.model, [request], experiment.evaluation).summary())
    for measure in ("ES", "PS", "NS", "EM", "PM", "NM", "exact_match"):
        expected = np.mean([summary[measure]["mean"] for summary in alone])
        assert table.loc[measure, "mean"] == pytest.approx(expected, abs=0.1)
    batch = experiment.scored(rome, experiment.requests).set_index("measure")
    assert abs(batch.loc["PM", "mean"] - table.loc["PM", "mean"]) > 0.2, (
        "the control: edits in sequence disturb another"
    )
    assert table.loc["ES", "n"] == len(experiment.requests)


def test_the_single_protocol_has_romes_columns_rows_and_files(out, no_figures):
    no_figures()
    assert table_counterfact.main(arguments(out, "--protocol", "single", "--methods", "rome@2")) == 0
    printed = pd.read_csv(out / "table_counterfact_single.csv")
    assert list(printed)[:9] == ["method", "layers", "S", "ES", "EM", "PS", "PM", "NS", "NM"]
    names = list(printed["method"])
    assert names[:2] == ["unedited", "rome"]
    assert {"rome, paper (GPT-2 XL)", "rome, paper (GPT-2 Medium)"} <= set(names)
    table_zsre.main(arguments(out, "--protocol", "single", "--methods", "rome@2"))
    assert "rome, paper (GPT-2 Large)" in set(pd.read_csv(out / "table_zsre_single.csv")["Editor"])


def test_a_record_without_what_the_protocol_needs_is_refused(experiment):
    record = dataclasses.replace(experiment.requests[0], neighbors=())
    with pytest.raises(InputError, match="has no neighbors, expected them for the measures of zsre, each record alone"):
        check_records([record], "zsre")
    check_records(experiment.requests, "zsre")


def test_two_protocols_have_no_table_in_common():
    assert len(paper_scores("rome_table_4", ["GPT-J"], "single")) > 10
    with pytest.raises(InputError, match="rome_table_4 is of the protocol 'single', expected one of 'batch'"):
        paper_scores("rome_table_4", ["GPT-J"])
