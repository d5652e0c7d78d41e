"""The script for a GPU runs on a CPU with a small shape, so that it cannot rot."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from benchmarks import gpu
from benchmarks.run_on_devices import RunDifference, difference

SAME = RunDifference(layers=((2, 3), (2, 3)), effects=1e-6, magnitudes=1e-5, rates=0.0)


def test_every_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--device cpu --shape small --dtype float32 --facts 2 --updates 2 --edits 3 --texts 20"
    run_options = "--run-facts 10 --run-samples 1 --run-requests 2"
    files = ["--json", str(tmp_path / "r.json"), "--out", str(tmp_path / "out")]
    monkeypatch.setitem(sys.modules, "__main__", gpu)  # a command says what Python ran
    monkeypatch.setattr(sys, "argv", [gpu.__file__, *options.split(), *run_options.split(), *files])
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())
    assert gpu.main() == 0
    printed = capsys.readouterr().out
    records = json.loads((tmp_path / "r.json").read_text())
    assert [record["step"] for record in records] == ["targets", "keys", "moments", "trace", "severed trio"]
    assert records[0]["command"].startswith("python -m benchmarks.gpu --device cpu")
    assert "3 edits:" in printed
    assert "30 edits, with" in printed
    assert "mechedit run on cpu and cpu: layers" in printed
    # Control: a run with other scores is another.
    other = tmp_path / "other"
    (other / "run").mkdir(parents=True)
    for name in ("selection.json", "effects.parquet"):
        (other / "run" / name).write_bytes((tmp_path / "out" / "cpu" / "run" / name).read_bytes())
    scores = pd.read_parquet(tmp_path / "out" / "cpu" / "run" / "scores.parquet")
    changed = scores.assign(value=scores.value.where(scores.measure != "PM", scores.value + 0.1))
    changed.to_parquet(other / "run" / "scores.parquet")
    compared = difference(tmp_path / "out" / "cpu", other)
    assert compared.magnitudes == pytest.approx(0.1)
    assert compared.effects == compared.rates == 0
    assert not compared.equal


@pytest.mark.parametrize(
    "changes", [{"layers": ((2, 3), (2, 4))}, {"effects": 0.01}, {"magnitudes": 0.01}, {"rates": 0.5}]
)
def test_devices_are_equal_in_selection_and_all_numbers(changes: dict[str, object]) -> None:
    assert SAME.equal
    assert not dataclasses.replace(SAME, **changes).equal


def test_a_part_that_fails_ends_no_other_and_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    script = gpu.GpuScript(None)  # type: ignore[arg-type]
    done = []

    def broken() -> None:
        raise RuntimeError("no memory")

    def sound() -> None:
        done.append("sound")

    script.attempt(broken)
    script.attempt(sound)
    assert (script.failures, done) == (["broken"], ["sound"])
    assert "no memory" in capsys.readouterr().err
