"""The scripts of MEMIT's ablations: their files, what stands in them, and that nothing is made twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analyses.common.experiment import Experiment
from analyses.papers import ablate_lambda, ablate_layers, ablate_module
from mechedit import InputError
from mechedit.sweep import Window
from mechedit.sweep import sweep as sweep_module
from mechedit.tables import where

SMALL = ["--quick", "--count", "4", "--layers", "2-3"]


@pytest.fixture(scope="module")
def folder(papers_folder: Callable[[], Path], light_figures: None) -> Path:
    """One folder for all three, as a reader would have; the ranges come first, whichever test runs here."""
    out = papers_folder()
    ablate_layers.main([*SMALL, "--out", str(out)])
    return out


def files(folder: Path, name: str) -> set[str]:
    return {path.suffix for path in folder.glob(f"{name}.*")}


def score(table: pd.DataFrame, measure: str, **equal: object) -> float:
    (row,) = where(table, measure=measure, **equal).itertuples()
    return row.mean


def test_ranges_are_edited_once_and_scored(
    folder: Path, monkeypatch: pytest.MonkeyPatch, no_figures: Callable[[], None]
) -> None:
    assert files(folder, "ablate_layers") == {".parquet", ".csv", ".pdf", ".png"}
    table = pd.read_parquet(folder / "ablate_layers.parquet")
    printed = pd.read_csv(folder / "ablate_layers.csv").set_index("layers")
    rows = where(table, varied="width", layers="2–3")
    assert set(where(table, varied="width", model="edited")["layers"]) == {"3", "2–3"}
    assert printed.loc["2–3", "ES"].startswith(f"{score(rows, 'ES'):.1f} (")
    assert score(rows, "ES") > score(table, "ES", model="unedited", varied="width") == 0
    pd.testing.assert_frame_equal(
        where(table, varied="depth", layers="2–3").drop(columns="varied").reset_index(drop=True),
        rows.drop(columns="varied").reset_index(drop=True),
    )
    monkeypatch.setattr(sweep_module, "find_targets", None)
    monkeypatch.setattr(sweep_module, "evaluate", None)
    before = (folder / "ablate_layers.parquet").read_bytes()
    no_figures()
    ablate_layers.main([*SMALL, "--out", str(folder)])
    assert (folder / "ablate_layers.parquet").read_bytes() == before


def test_both_modules_start_from_the_same_z(
    folder: Path, monkeypatch: pytest.MonkeyPatch, no_figures: Callable[[], None]
) -> None:
    """What was found for the MLPs is read from the folder: attention's edits search for nothing."""
    targets = set((folder / "targets").iterdir())
    ablate_module.main([*SMALL, "--out", str(folder)])
    assert set((folder / "targets").iterdir()) == targets
    assert files(folder, "ablate_module") == {".parquet", ".csv", ".pdf", ".png"}
    table = pd.read_parquet(folder / "ablate_module.parquet")
    layers = pd.read_parquet(folder / "ablate_layers.parquet")
    assert score(table, "PM", module="MLP", layers="2–3") == score(layers, "PM", varied="depth", layers="2–3")
    assert score(table, "PM", module="attention", layers="2–3") != score(table, "PM", module="MLP", layers="2–3")
    assert list(pd.read_csv(folder / "ablate_module.csv")["module"].dropna().unique()) == ["MLP", "attention"]
    monkeypatch.setattr(sweep_module, "evaluate", None)
    no_figures()
    ablate_module.main([*SMALL, "--out", str(folder)])


def test_lambda_trades_what_is_written_for_what_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, no_figures: Callable[[], None]
) -> None:
    ablate_lambda.main([*SMALL, "--out", str(folder)])
    assert files(folder, "ablate_lambda") == {".parquet", ".csv", ".pdf", ".png"}
    table = pd.read_parquet(folder / "ablate_lambda.parquet")
    unwritten = where(table, measure="left").sort_values("weight")
    assert list(unwritten["weight"]) == [0.1, 100.0, 100_000.0]
    assert unwritten["mean"].is_monotonic_increasing
    assert unwritten["mean"].iloc[0] < 5 < 50 < unwritten["mean"].iloc[-1]
    assert list(pd.read_csv(folder / "ablate_lambda.csv")["λ"]) == ["unedited", "0.1", "100", "100000"]
    monkeypatch.setattr(Experiment, "score", None)
    no_figures()
    ablate_lambda.main([*SMALL, "--out", str(folder)])


def test_a_method_without_lambda_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="'rome' has no λ"):
        ablate_lambda.main([*SMALL, "--out", str(folder), "--method", "rome"])


@pytest.mark.parametrize("script", [ablate_lambda, ablate_layers, ablate_module])
@pytest.mark.parametrize(
    ("layers", "message"), [("98-99", "layer 99 is not in the model, expected layers 0 to 9"), ("", "the layers ''")]
)
def test_layers_that_there_are_not_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Any, layers: str, message: str
) -> None:
    for name in ("trace", "moments", "score"):
        monkeypatch.setattr(Experiment, name, None)
    command = ["--quick", "--count", "4", "--out", str(tmp_path)]
    with pytest.raises(InputError, match=message):
        script.main([*command, "--layers", layers])
    with pytest.raises(TypeError):  # the control: with layers that there are the work begins
        script.main([*command, "--layers", "2-3"])


def test_ranges_lie_at_every_depth_and_hold_the_models_own() -> None:
    class Deep:
        quick = False

        class model:  # noqa: N801 - stands for an attribute
            n_layers = 48

    windows = ablate_layers.at_depths(Deep(), Window(12, 16))  # type: ignore[arg-type]
    assert Window(12, 16) in windows
    assert (windows[0], windows[-1]) == (Window(0, 4), Window(43, 47))
    assert {window.width for window in windows} == {5}
    assert len(windows) == ablate_layers.MOST_DEPTHS + 1
    assert ablate_layers.of_every_width(Deep(), Window(1, 3)) == [
        Window(3, 3),
        Window(2, 3),
        Window(1, 3),
        Window(0, 3),
    ]  # type: ignore[arg-type]
