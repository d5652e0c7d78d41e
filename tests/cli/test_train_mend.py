"""`mechedit train-mend`, and the edit that takes what it wrote."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest

import mechedit as me
from mechedit.cli import main


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


def test_an_editor_is_trained_and_edits_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MECHEDIT_TUNED", str(tmp_path / "tuned"))
    requests, texts = tmp_path / "requests.json", tmp_path / "texts.txt"
    shipped = json.loads((files("mechedit.data") / "tiny" / "requests.json").read_text())
    requests.write_text(json.dumps(shipped[:6]))
    texts.write_text("\n".join(me.load_texts("tiny")[:20]))
    training = ["train-mend", "tiny", "--requests", requests, "--texts", texts, "--layers", "1-2", "--steps", 2]
    training += ["--batch-size", 2, "--rank", 4, "--validate-every", 1]
    out = tmp_path / "mend.safetensors"
    assert call(*training, "--out", out, "--json") == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert [row["step"] for row in summary["curve"]] == [0, 1, 2]
    assert "5 requests to train with and 1 to validate with" in printed.err, "what it will take"
    assert "a step takes about" in printed.err
    edit = ["edit", "--method", "mend", "--requests", requests, "--out", tmp_path / "edit.safetensors"]
    assert call(*edit, "--set", f"editor={out}") == 0, "the layers are the editor's"
    manifest = me.Edit.load(tmp_path / "edit.safetensors").manifest
    assert (manifest["layers"], manifest["editor"]["steps"]) == ([1, 2], summary["steps"])
    capsys.readouterr()
    assert call(*training, "--out", out, "--lr", "0.1") == 2
    assert "pass --overwrite to train anew" in capsys.readouterr().err
    assert call(*edit, "--overwrite", "--set", f"editor={out}", "--layers", "3") == 2
    assert "was trained for the layers [1, 2], expected [3]" in capsys.readouterr().err
