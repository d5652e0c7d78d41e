"""Approximate effects beside exact ones: rows of correlations, and seconds per fact."""

from __future__ import annotations

import re
import sys

import pytest

from analyses.real_models import agreement


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What the script prints about the tiny model."""
    shared = ["tiny", "--facts", "known", "--samples", "2", "--points", "1"]
    monkeypatch.setattr(sys, "argv", ["agreement", *shared, *options])
    assert agreement.main() == 0
    return capsys.readouterr().out


def test_a_row_per_kind_and_severing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(monkeypatch, capsys, "--count", "2", "--cells", "20").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:5] == ["kind", "severed", "points", "cells", "rank correlation"]
    assert [row[:3] for row in cells[2:]] == [
        *([kind, "nothing", "1"] for kind in agreement.KINDS),
        *(["state", sever, "1"] for sever in ("mlp", "attn")),
    ]
    assert all(0 < int(row[3]) <= 20 for row in cells[2:]), "a severed state of the last layers changes nothing"
    assert all(-1 <= float(row[4]) <= 1 for row in cells[2:])


def test_seconds_are_those_of_a_fact_of_the_mean_length(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agreement, "MORE", 3)
    line = printed(monkeypatch, capsys, "--time", "1")
    counts = re.search(
        r"1 facts of \d+ cells exactly, (\d+) of (\d+) in (\d+) groups approximately, 2 samples, points 1: exact", line
    )
    assert counts is not None
    traced, known, groups = map(int, counts.groups())
    assert 3 <= traced < known, "three facts in whole groups, of a trace of all"
    assert 1 <= groups <= 3
    exact, approximate, drawn = map(float, re.findall(r"([\d.]+) s ", line))
    assert exact > approximate > 0
    assert int(re.findall(r"ratio (\d+)", line)[0]) == pytest.approx(exact / (approximate + drawn), rel=0.1, abs=1)
