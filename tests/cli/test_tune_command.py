"""`mechedit tune`, and the commands that take what it wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

import mechedit as me
from mechedit.cli import main
from mechedit.cli.tune import _windows_of
from mechedit.files import read_json


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


@pytest.fixture
def inputs(tmp_path: Path) -> list[object]:
    """Few requests and texts, as options."""
    requests, texts = tmp_path / "requests.json", tmp_path / "texts.txt"
    shipped = json.loads((files("mechedit.data") / "tiny" / "requests.json").read_text())
    requests.write_text(json.dumps(shipped[:4]))
    texts.write_text("\n".join(me.load_texts("tiny")[:200]))
    return ["--requests", requests, "--texts", texts]


def test_what_was_tuned_is_taken_by_itself_and_named(
    tmp_path: Path, inputs: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).touch())
    monkeypatch.setenv("MECHEDIT_TUNED", str(tmp_path / "cache"))
    tuning = ["tune", "tiny", *inputs, "--edits", 8, "--windows", "1-2,3-4", "--facts", 4, "--set", "steps=3"]
    tuning += ["--set", "generated_prefixes=0"]
    assert call(*tuning, "--json") == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    file = Path(summary["tuned"])
    assert file.is_relative_to(tmp_path / "cache"), "the shipped model's folder is not written to"
    assert "at most 8 edits" in printed.err
    assert f"wrote {file}: layers {summary['layers']}" in printed.err
    assert summary["edits"] == 8
    assert (file.parent / "search" / "figures" / "tuned_windows.pdf").is_file()
    section = read_json(file)["methods"]["memit"]
    assert (section["settings"]["steps"], section["hash"]) == (3, summary["hash"])

    edit = ["edit", *inputs[:2], "--moments", file.parent / "search", "--out", tmp_path / "edit.safetensors"]
    assert call(*edit) == 0
    said = capsys.readouterr().err
    assert f"from {file} ({summary['hash'][:12]})" in said
    claimed = [line.split(": ")[1].split(" from ")[0].split(", ") for line in said.splitlines() if " from " in line]
    names = [name for names in claimed for name in names]
    assert names[0] == "layers"
    assert len(names) == len(set(names)), "a setting comes from one file"
    manifest = me.Edit.load(tmp_path / "edit.safetensors").manifest
    assert manifest["layers"] == summary["layers"]
    assert manifest["settings"]["steps"] == 3
    assert manifest["settings_from"][0]["hash"] == summary["hash"]
    assert manifest["settings_from"][0]["settings"][0] == "layers"

    # The command line wins, and what it says is not the file's.
    assert call(*edit, "--layers", "1-2", "--set", "steps=2", "--overwrite") == 0
    assert "settings of memit: layers" not in capsys.readouterr().err
    manifest = me.Edit.load(tmp_path / "edit.safetensors").manifest
    assert (manifest["layers"], manifest["settings"]["steps"]) == ([1, 2], 2)
    assert not {"layers", "steps"} & set(manifest["settings_from"][0]["settings"])

    capsys.readouterr()
    assert call(*edit, "--no-tuned", "--overwrite") == 2
    assert (
        "nothing was published for memit on 'tiny', nor on a model of its architecture and size"
        in capsys.readouterr().err
    )
    assert call(*edit, "--no-tuned", "--tuned", file, "--overwrite") == 2
    assert "both --tuned and --no-tuned" in capsys.readouterr().err
    assert call(*edit, "--method", "emmet", "--tuned", file, "--overwrite") == 2
    assert "holds tuned settings of memit, expected 'emmet'" in capsys.readouterr().err


def test_a_budget_too_small_is_refused_before_anything_is_searched(
    tmp_path: Path, inputs: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call("tune", "tiny", *inputs, "--edits", 3, "--windows", "1-2,3-4", "--facts", 4, "--out", out) == 2
    assert "the budget is 3 edits, expected at least 8" in capsys.readouterr().err
    assert not (out / "tuned.json").exists()
    assert not (out / "targets").exists()
    assert call("tune", "tiny", *inputs, "--method", "ft", "--edits", 300) == 2
    assert "expected one of memit, emmet, alphaedit, pmet" in capsys.readouterr().err


@pytest.mark.parametrize(("there", "message"), [("tuned.json", "is a folder, a pipe"), ("figures", "is a file")])
def test_what_lies_where_results_go_is_refused_before_the_work(
    there: str, message: str, tmp_path: Path, inputs: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / there).mkdir() if message == "is a folder, a pipe" else (out / there).touch()
    assert call("tune", "tiny", *inputs, "--edits", 8, "--windows", "1-2,3-4", "--facts", 4, "--out", out) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [there]


def test_a_selection_of_another_model_is_refused_and_of_none_is_no_choice(
    tmp_path: Path, inputs: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    cell = {"kind": "state", "window": 1, "position": 2, "token": "a", "role": "subject_last", "metric": "probability"}
    scores = {"score": 0.1, "corrupted": 0.1, "clean": 0.9, "effect": 0.0, "samples": 1}
    effects = pd.DataFrame(
        [
            {**cell, **scores, "fact": fact, "sever": sever, "layer": layer}
            for fact in map(str, range(12))
            for sever in ("nothing", "mlp")
            for layer in range(10)
        ]
    )
    effects.attrs["provenance"] = {**me.load_model("tiny").provenance(), "weights_hash": "0" * 64}
    nothing = me.select_layers(effects)
    assert nothing.layers == ()
    nothing.save(tmp_path / "selection.json")
    tuning = ["tune", "tiny", *inputs, "--edits", 8, "--windows", "1-2,3-4", "--facts", 4, "--out", tmp_path / "out"]
    assert call(*tuning, "--trace", tmp_path) == 2
    line = capsys.readouterr().err
    assert f"the selection in '{tmp_path}'" in line
    assert "trace this model, or leave --trace out" in line
    assert _windows_of(nothing)[1] is None, "the likeliest range of a trace that selects nothing is not its selection"
    assert _windows_of(replace(nothing, layers=(1, 2)))[1] == (1, 2), "the control"
