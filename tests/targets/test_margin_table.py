"""The script that measures what a margin changes, on the tiny model."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analyses.real_models import margin


def test_a_margin_ends_the_search_sooner_and_rows_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tiny", "--count", "2", "--layers", "2", "--tokens", "1000", "--out", str(tmp_path)]
    assert margin.main([*arguments, "--margins", "0"]) == 0
    assert margin.main([*arguments, "--margins", "off,0,1000"]) == 0
    table = pd.read_csv(tmp_path / "margin.csv", dtype={"margin": str}).set_index("margin")
    assert list(table.index) == ["0", "off", "1000"]
    assert table.loc["0", "updates"] < table.loc["off", "updates"]
    assert table.loc["0", "probability"] < table.loc["off", "probability"]
    # A margin that no fact reaches is none.
    numbers = table.drop(columns="seconds")
    pd.testing.assert_series_equal(numbers.loc["1000"], numbers.loc["off"], check_names=False, rtol=1e-5)
    assert table["ES"].between(0, 100).all()
    monkeypatch.setattr(margin, "measure", None)
    capsys.readouterr()
    assert margin.main([*arguments, "--margins", "off,0,1000"]) == 0
    assert "exact_match" in capsys.readouterr().out
