"""The script of MEMIT's Fig. 9: its files, what stands in them, and that nothing is trained twice."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from analyses.common.command import open_experiment, options
from analyses.common.experiment import Experiment
from analyses.papers import finetune_decay
from mechedit import EditRequest, edited, evaluate, ft
from mechedit.tables import where

SMALL = ["--quick", "--count", "4", "--layers", "2", "--decades", "3", "--decades-below", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, light_figures: None) -> Path:
    out = tmp_path_factory.mktemp("papers")
    finetune_decay.main([*SMALL, "--out", str(out)])
    return out


def test_both_ends_and_training_without_decay_are_scored(folder: Path) -> None:
    assert {path.suffix for path in folder.glob("finetune_decay.*")} == {".parquet", ".csv", ".pdf", ".png"}
    table = pd.read_parquet(folder / "finetune_decay.parquet")
    assert sorted(table["weight"].dropna().unique()) == [5e-4, 0.5]
    printed = pd.read_csv(folder / "finetune_decay.csv").set_index("weight decay")
    assert list(printed.index) == ["unedited", "none", "0.0005", "0.5"]
    assert printed.loc["unedited", "ES"].startswith("0.0 (")
    none = where(table, measure="NS", model="no decay")["mean"].item()
    strong = where(table, measure="NS", weight=0.5)["mean"].item()
    assert none + 10 < strong, "decay gives neighbors back"
    assert printed.loc["none", "ES"].startswith("100.0 (")


def test_a_score_is_that_of_the_method_itself(folder: Path) -> None:
    experiment = open_experiment("finetune_decay", options("Try.", count=4), [*SMALL[:-4], "--out", str(folder)])
    requests: list[EditRequest] = experiment.requests
    edit = ft(experiment.model, requests, [2])
    with edited(experiment.model, edit):
        summary = evaluate(experiment.model, requests, experiment.evaluation).summary()
    table = where(pd.read_parquet(folder / "finetune_decay.parquet"), model="no decay").set_index("measure")
    for measure in ("ES", "PS", "NS", "S"):
        assert table.loc[measure, "mean"] == pytest.approx(summary[measure]["mean"])


def test_the_published_decay_has_others_on_both_sides() -> None:
    def chosen(quick: bool) -> list[float]:
        arguments = Namespace(decades=1.0, decades_below=0.5)
        return finetune_decay.weights(SimpleNamespace(quick=quick, arguments=arguments))  # type: ignore[arg-type]

    assert chosen(False) == [1.58e-4, 5e-4, 1.58e-3, 5e-3]
    assert chosen(True) == [1.58e-4, 5e-3]


def test_a_second_run_trains_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, no_figures: Callable[[], None]
) -> None:
    no_figures()
    before = (folder / "finetune_decay.parquet").read_bytes()
    monkeypatch.setattr(Experiment, "score", None)
    finetune_decay.main([*SMALL, "--out", str(folder)])
    assert (folder / "finetune_decay.parquet").read_bytes() == before
