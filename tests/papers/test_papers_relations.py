"""The scripts by relation: pairs by their stated rule, the mixture's arithmetic, and quick runs that are reused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.stats import binomtest

from analyses.common.categories import Pair, by_relation, find_pairs, mixed
from analyses.common.command import open_experiment, options
from analyses.common.counterfacts import counterfacts
from analyses.common.experiment import Experiment
from analyses.common.variants import Variant
from analyses.papers import fresh_knowledge, mixtures, relations, table_zsre
from analyses.plots.groups import plot_groups, plot_tradeoff
from analyses.plots.mixtures import plot_mixture
from mechedit import InputError, load_facts
from mechedit.data import EditRequest
from mechedit.edit import edited
from mechedit.evaluation import evaluate, generate
from mechedit.tables import where

QUICK_RUN = ["--quick", "--layers", "1-3"]


def request(name: str, relation: str, subject: str, old: str, new: str) -> EditRequest:
    return EditRequest(id=name, subject=subject, prompt="{} is", target_new=new, target_true=old, relation=relation)


def relation(name: str, subjects: str, objects: str) -> list[EditRequest]:
    """A request a letter of `subjects`, between neighboring letters of `objects`."""
    ends = list(zip(objects, objects[1:] + objects[0], strict=True))
    return [request(f"{name}{s}", name, s, *ends[i % len(ends)]) for i, s in enumerate(subjects)]


def grouped(*groups: list[EditRequest]) -> dict[str, list[EditRequest]]:
    return by_relation([r for group in groups for r in group], seed=0)


def test_pairs_are_told_apart_by_what_they_share():
    groups = grouped(
        relation("born", "abcdefgh", "XYZ"),  # people, places
        relation("speaks", "abcdefgh", "uvw"),  # people, languages
        relation("lives", "cdefgh", "XYZ"),  # people, places
        relation("lies", "ijklm", "YZ"),  # rivers, places
        relation("spoken", "ijklm", "stuvw"),  # rivers, languages
    )
    pairs = find_pairs(groups, {}, least=2)
    names_and_rules = {same: (set(pair.names), pair.rule) for same, pair in pairs.items()}
    assert names_and_rules == {
        "neither": ({"born", "spoken"}, "overlap"),
        "subjects": ({"born", "speaks"}, "overlap"),
        "objects": ({"born", "lies"}, "overlap"),
        "both": ({"born", "lives"}, "overlap"),
    }
    for pair in pairs.values():
        first, second = ({r.subject for r in requests} for requests in pair.requests)
        assert not first & second
        assert pair.size == min(len(first), len(second))
    assert pairs["subjects"].size == 4  # eight people between two relations
    assert pairs["both"].size == 4  # a and b are born only: of the six others two more are left with born


def test_the_papers_pairs_and_given_ones_come_first():
    groups = grouped(
        relation("P27", "abcdef", "XYZ"), relation("P37", "ghijkl", "uvw"), relation("P99", "mnopqrst", "123")
    )
    assert find_pairs(groups, {}, least=3)["neither"].rule == "published"
    pair = find_pairs(groups, {"neither": ("P37", "P99")}, least=3)["neither"]
    assert (pair.names, pair.rule, pair.size) == (("P37", "P99"), "given", 6)
    with pytest.raises(InputError, match="fewer than 7"):
        find_pairs(groups, {"neither": ("P37", "P99")}, least=7)
    with pytest.raises(InputError, match="P1"):
        find_pairs(groups, {"neither": ("P1", "P99")}, least=3)
    with pytest.raises(InputError, match="neither, subjects"):
        find_pairs(groups, {"none": ("P37", "P99")}, least=3)


def test_where_no_relations_share_their_objects_one_stands_for_both():
    groups = grouped(
        relation("animal", "abcdefgh", "123"), relation("country", "abcd", "XY"), relation("language", "efgh", "uv")
    )
    pairs = find_pairs(groups, {}, least=2)
    kinds, halves = pairs["objects"], pairs["both"]
    assert (kinds.names, kinds.rule) == (("animal/country", "animal/language"), "kinds")
    assert [{r.subject for r in part} for part in kinds.requests] == [set("abcd"), set("efgh")]
    assert halves.rule == "halves"
    assert halves.names == ("animal/1", "animal/2")
    assert [len(part) for part in halves.requests] == [4, 4]
    assert {r.relation for part in (*kinds.requests, *halves.requests) for r in part} == {"animal"}
    assert set(find_pairs(groups, {}, least=5)) == set()


def test_the_almanac_fills_all_four_cases():
    groups = by_relation(counterfacts(load_facts("known")), seed=0)
    pairs = find_pairs(groups, {}, least=32)
    assert {same: pair.rule for same, pair in pairs.items()} == {
        "neither": "overlap", "subjects": "overlap", "objects": "kinds", "both": "halves",
    }  # fmt: skip
    assert set(pairs["neither"].names) == {"country", "language"}


def test_a_mix_takes_relations_in_turn_and_no_subject_twice():
    groups = {"one": relation("one", "abe", "XY"), "two": relation("two", "acd", "uv")}
    ids = [request.id for request in mixed(groups, 4)]
    assert ids == ["onea", "twoc", "oneb", "twod"]  # in plain turns the second would be twoa, of a once more
    assert len(mixed(groups, 9)) == 5  # a, b, c, d, e are all there are


def cases(**values: tuple[float, float, float]) -> pd.DataFrame:
    rows = [
        (case, measure, value)
        for case, scores in values.items()
        for measure, value in zip(("ES", "PS", "NS"), scores, strict=True)
    ]
    return pd.DataFrame(rows, columns=["case", "measure", "value"])


def part(table: pd.DataFrame, measure: str, name: str) -> pd.Series:
    return where(table, measure=measure, part=name).iloc[0]


def test_the_mixtures_arithmetic_on_numbers_worked_by_hand():
    first = cases(a1=(100, 100, 50), a2=(100, 0, 50))  # ES 100, PS 50, NS 50: S = 3/(1/100 + 1/50 + 1/50) = 60
    second = cases(b1=(0, 50, 100), b2=(100, 50, 100))  # ES 50, PS 50, NS 100: S = 60
    both = cases(a1=(100, 100, 100), b1=(100, 0, 100))  # ES 100, PS 50, NS 100: S = 3/(1/100 + 1/50 + 1/100) = 75
    comparison = mixtures.compare(first, second, both, seed=0, resamples=200)
    at = {(row.measure, row.part): row.mean for row in comparison.itertuples()}
    assert at["S", "first"] == pytest.approx(60)
    assert at["S", "second"] == pytest.approx(60)
    assert at["S", "mixture"] == pytest.approx(75)
    assert at["S", "difference"] == pytest.approx(15)
    assert [at["ES", name] for name in mixtures.PARTS] == pytest.approx([100, 50, 75, 100, 25])
    assert [at["NS", name] for name in mixtures.PARTS] == pytest.approx([50, 100, 75, 100, 25])


def test_the_differences_interval_holds_what_varies_and_nothing_else():
    same = {f"a{i}": (100.0, 100.0, 80.0) for i in range(8)}
    second = {f"b{i}": (100.0, 100.0, 60.0) for i in range(8)}
    halves = {name: value for i, (name, value) in enumerate([*same.items(), *second.items()]) if i % 8 < 4}
    steady = mixtures.compare(cases(**same), cases(**second), cases(**halves), seed=0)
    # Each relation's requests are all alike, and the two halves weigh alike however they are drawn.
    assert part(steady, "NS", "difference")[["mean", "low", "high"]].tolist() == [0, 0, 0]
    rng = np.random.default_rng(0)
    same = {name: (100.0, 100.0, float(value)) for name, value in zip(same, rng.integers(0, 100, 8), strict=True)}
    halves |= {name: same[name] for name in halves if name in same}
    varied = mixtures.compare(cases(**same), cases(**second), cases(**halves), seed=0)
    difference = part(varied, "NS", "difference")
    in_mixture = [same[name][2] for name in list(same)[:4]]
    assert difference["mean"] == pytest.approx((np.mean(in_mixture) - np.mean([v[2] for v in same.values()])) / 2)
    assert difference["low"] < difference["mean"] < difference["high"]


def test_ten_draws_have_students_interval_of_their_means_at_90_percent():
    """x̄ ± t₀.₉₅(2) s/√3 = x̄ ± 2.920 s/√3, of three draws whose ES in the mixture is 100, 100 and 50."""
    first, second = cases(a1=(100, 100, 50), a2=(100, 0, 50)), cases(b1=(0, 50, 100), b2=(100, 50, 100))
    draws = [(first, second, cases(a1=(100, 100, 100), b1=(es, 0, 100))) for es in (100, 100, 0)]
    table = mixtures.compare_draws(draws)
    mixture = part(table, "ES", "mixture")
    half = 2.920 * np.std([100, 100, 50], ddof=1) / 3**0.5
    assert mixture[["mean", "low", "high"]].tolist() == pytest.approx(
        [250 / 3, 250 / 3 - half, 250 / 3 + half], abs=0.05
    )
    assert part(table, "ES", "mean")[["mean", "low", "high"]].tolist() == [75, 75, 75], "the control: no draw differs"
    one = mixtures.compare(*draws[0], seed=0, resamples=20)
    assert (
        part(one, "S", "mixture")["mean"]
        == pytest.approx(75)
        == mixtures.compare_draws(draws[:2]).query("measure == 'S' and part == 'mixture'")["mean"].item()
    )


def test_facts_are_drawn_anew_and_the_same_for_a_seed():
    pair = Pair(
        same="both", names=("a", "b"), rule="given",
        requests=(relation("a", "abcdefgh", "XY"), relation("b", "ijklmnop", "XY")),
    )  # fmt: skip
    as_they_stand, shuffled = mixtures.drawn(pair, None), mixtures.drawn(pair, "0/1")
    assert as_they_stand == pair.requests
    assert shuffled == mixtures.drawn(pair, "0/1") != mixtures.drawn(pair, "0/2")
    for part_shuffled, requests in zip(shuffled, pair.requests, strict=True):
        assert part_shuffled != requests
        assert {r.id for r in part_shuffled} == {r.id for r in requests}


@pytest.fixture(scope="module")
def out(papers_folder, light_figures):
    return papers_folder()


def check_files(out, name: str, *more: str) -> pd.DataFrame:
    for file in (f"{name}.parquet", f"{name}.csv", f"{name}.pdf", f"{name}.png", *more):
        assert (out / file).stat().st_size > 100, file
    return pd.read_parquet(out / f"{name}.parquet")


def forbid_work(monkeypatch):
    """What is kept needs neither a search nor a score."""
    monkeypatch.setattr(Experiment, "edit", None)
    monkeypatch.setattr("analyses.common.experiment.evaluate", None)


def test_relations_runs_reuses_and_agrees_with_a_direct_computation(out, monkeypatch, capsys, no_figures):
    arguments = [*QUICK_RUN, "--out", str(out), "--methods", "memit", "--per-relation", "2"]
    relations.main(arguments)
    table = check_files(out, "relations")
    assert list(table) == ["method", "relation", "measure", "mean", "low", "high", "n"]
    assert set(table["method"]) == {"unedited", "memit"}
    assert len(set(table["relation"])) == relations.QUICK_RELATIONS + 1
    assert where(table, method="unedited", measure="ES")["mean"].max() == 0
    experiment = open_experiment("try", options("Try.", quick_count=None), [*QUICK_RUN, "--out", str(out)])
    name = table["relation"].iloc[0]
    requests = by_relation(experiment.requests, seed=0)[name][:2]
    with edited(experiment.model, experiment.edit(Variant(method="memit", layers=(1, 2, 3)), requests)):
        direct = evaluate(experiment.model, requests, experiment.evaluation).summary()
    row = where(table, method="memit", relation=name, measure="S").iloc[0]
    assert row["mean"] == pytest.approx(direct["S"]["mean"])
    assert row["mean"] > 0
    forbid_work(monkeypatch)
    no_figures()
    relations.main(arguments)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "relations.parquet"), table)
    assert "all mixed" in capsys.readouterr().out


def test_relations_without_enough_requests_are_left_out_or_refused(out):
    with pytest.raises(InputError, match="no relation has 500"):
        relations.main(["--layers", "1-3", "--out", str(out), "--per-relation", "500"])


def test_mixtures_runs_reuses_and_agrees_with_a_direct_computation(out, monkeypatch, no_figures):
    arguments = [*QUICK_RUN, "--edits", "2", "--out", str(out)]
    mixtures.main(arguments)
    table = check_files(out, "mixtures", "mixtures_detail.png", "mixtures_detail.pdf")
    assert list(dict.fromkeys(table["same"])) == list(mixtures.SAME)
    assert len(table) == 4 * len(mixtures.SCORES) * len(mixtures.PARTS)
    experiment = open_experiment("try", options("Try.", quick_count=None), [*QUICK_RUN, "--out", str(out)])
    groups = by_relation(experiment.requests, seed=0)
    pair = find_pairs(groups, {}, least=2)["neither"]
    mixture = [pair.requests[0][0], pair.requests[1][0]]
    with edited(experiment.model, experiment.edit(Variant(method="memit", layers=(1, 2, 3)), mixture)):
        direct = evaluate(experiment.model, mixture, experiment.evaluation).summary()
    row = where(table, same="neither", edits=2, measure="NS", part="mixture").iloc[0]
    assert row["mean"] == pytest.approx(direct["NS"]["mean"])
    forbid_work(monkeypatch)
    no_figures()
    mixtures.main(arguments)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "mixtures.parquet"), table)
    printed = pd.read_csv(out / "mixtures.csv")
    assert {"same", "edits", "measure", "mean", "mixture", "difference", "low", "high"} <= set(printed)


@pytest.mark.parametrize(
    "unreadable",
    [
        ["--edits", "3"],
        ["--edits", "a"],
        ["--pairs", "both=P1"],
        ["--pairs", "x"],
        ["--draws", "0"],
    ],
)
def test_mixtures_refuses_what_it_cannot_read(out, unreadable):
    with pytest.raises(InputError, match=r"cannot be read|--draws is 0"):
        mixtures.main(["--layers", "1-3", "--out", str(out), *unreadable])


def test_fresh_knowledge_runs_reuses_and_agrees_with_a_direct_computation(out, monkeypatch, capsys):
    arguments = [*QUICK_RUN, "--out", str(out)]
    fresh_knowledge.main(arguments)
    output = capsys.readouterr().out
    table = check_files(out, "fresh_knowledge", "fresh_knowledge_facts.csv", "fresh_knowledge_said.csv")
    assert len(table) == 6
    assert not table["exact_match_before"].any()
    assert table["took"].any()
    for row in table.itertuples():
        assert row.took == row.said_after.strip().startswith(row.target_new)
        assert row.said_before.strip().startswith(row.target_true)
    printed = pd.read_csv(out / "fresh_knowledge.csv").set_index("measure")
    half_width = 100 * binomtest(0, 6).proportion_ci(method="wilson").high / 2
    assert printed.loc["accuracy", "before"] == f"0.0 ({half_width:.1f})"
    assert printed.loc["accuracy", "after"].startswith(f"{100 * table['took'].mean():.1f}")
    stars = printed.loc["accuracy, constellations of 289 stars, paper (GPT-J)"]
    assert float(stars["before"]) < float(stars["after"])
    assert len(pd.read_csv(out / "fresh_knowledge_missed.csv")) == (~table["took"]).sum()
    assert f"{(~table['took']).sum()} of 6 facts did not take" in output
    assert "before:" in output
    monkeypatch.setattr("mechedit.pipeline.scoring.evaluate", None)
    fresh_knowledge.main(arguments)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "fresh_knowledge.parquet"), table)


def test_table_zsre_runs_reuses_and_agrees_with_a_direct_computation(out, monkeypatch, no_figures):
    arguments = [*QUICK_RUN, "--out", str(out), "--count", "3", "--methods", "memit"]
    table_zsre.main(arguments)
    table = check_files(out, "table_zsre")
    printed = pd.read_csv(out / "table_zsre.csv")
    assert list(printed) == ["Editor", "Score", "Efficacy", "Paraphrase", "Specificity", "Exact match"]
    assert list(printed["Editor"])[:2] == ["unedited", "memit"]
    assert list(printed["Editor"])[-1] == "memit, paper (GPT-J)"
    assert printed["Score"].notna().all()
    experiment = open_experiment(
        "try", options("Try."), [*QUICK_RUN, "--out", str(out), "--requests", "tiny", "--count", "3"]
    )
    with edited(experiment.model, experiment.edit(Variant(method="memit", layers=(1, 2, 3)), experiment.requests)):
        texts = [generate(experiment.model, [r.text], tokens=6)[0] for r in experiment.requests]
    # The shipped objects are one token or a few: what greedy decoding writes in full is an exact match.
    right = [text.strip().startswith(r.target_new) for text, r in zip(texts, experiment.requests, strict=True)]
    row = where(table, method="memit", measure="exact_match").iloc[0]
    assert row["mean"] == pytest.approx(100 * np.mean(right))
    assert where(table, method="unedited", measure="exact_match").iloc[0]["mean"] == 0 < row["mean"]
    three = [where(table, method="memit", measure=m).iloc[0]["mean"] for m in ("efficacy", "paraphrase", "specificity")]
    score = where(table, method="memit", measure="S").iloc[0]["mean"]
    assert score == pytest.approx(3 / sum(1 / value for value in three))
    monkeypatch.setattr(Experiment, "edit", None)
    no_figures()
    table_zsre.main(arguments)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "table_zsre.parquet"), table)


def frame(rows: list[tuple[str, str, str, float]], by: str = "relation") -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["method", by, "measure", "mean"])
    return table.assign(low=table["mean"] - 1, high=table["mean"] + 1)


def test_the_best_group_is_on_top_and_the_reference_at_the_foot():
    table = frame([("memit", name, "S", s) for name, s in (("a", 50), ("b", 90), ("all", 99), ("c", 70))])
    ax = plot_groups(table, Figure().subplots(), by="relation", reference="all")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["all", "a", "c", "b"]
    with pytest.raises(InputError, match="expected one of S"):
        plot_groups(table, Figure().subplots(), by="relation", measure="ES")


def test_names_of_points_neither_overlap_nor_leave_the_axes():
    rng = np.random.default_rng(1)
    rows = [
        ("memit", f"relation {i}", m, float(v))
        for i in range(14)
        for m, v in zip(("PS", "NS"), rng.normal(95, 1, 2), strict=True)
    ]
    figure = Figure(figsize=(3.5, 2.8))
    ax = plot_tradeoff(frame(rows), figure.subplots(), by="relation", reference="relation 3")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
    assert len(boxes) == 14
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    inside = ax.get_window_extent().padded(1)
    assert all(inside.x0 <= b.x0 and b.x1 <= inside.x1 and inside.y0 <= b.y0 and b.y1 <= inside.y1 for b in boxes)


def test_a_mixture_is_drawn_with_its_interval_beside_the_dashed_mean():
    rows = [
        ("memit", name, n, float(v))
        for name, v in (("first", 90), ("second", 70), ("mean", 80), ("mixture", 82))
        for n in (4, 8)
    ]
    table = pd.DataFrame(rows, columns=["method", "part", "edits", "mean"]).assign(low=79.0, high=85.0)
    ax = plot_mixture(table, Figure().subplots())
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["mean of the two"].get_linestyle() == "--"
    assert lines["mean of the two"].get_ydata().tolist() == [
        80,
        80,
    ]
    assert lines["mixture"].get_ydata().tolist() == [82, 82]
    (bars,) = ax.containers
    assert [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()] == [[79, 85], [79, 85]]
    with pytest.raises(InputError, match="mixture"):
        plot_mixture(table[table["part"] != "mixture"], Figure().subplots())
    # One number of edits gives a line nothing to join, and an axis no width.
    ax = plot_mixture(table[table["edits"] == 8], Figure().subplots())
    assert {line.get_label(): line for line in ax.lines}["mean of the two"].get_marker() == "_"
    assert ax.get_xlim() == (4, 16)
