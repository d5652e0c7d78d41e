"""Options that nothing would read, because of what others say, are refused before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.commands import complaint

import mechedit as me

TUNE = ["tune", "--requests=tiny"]
IDLE = [
    (["edit", "--show=edit.safetensors"], ["--layers=1"], []),
    (["edit", "--show=edit.safetensors"], ["--requests=tiny"], []),
    (["edit", "--show=edit.safetensors"], ["--set=steps=1"], []),
    (["edit", "--show=edit.safetensors"], ["--without=1"], []),
    (["edit", "--show=edit.safetensors"], ["--with=more.json"], []),
    (["edit", "--show=edit.safetensors"], ["--merge"], []),
    (["edit", "--show=edit.safetensors"], ["--targets-only"], []),
    (["trace"], ["--largest=3"], ["--approximate"]),
    (["trace"], ["--least-correlation=0.5"], ["--approximate"]),
    (["moments", "--layers=1"], ["--weight=3"], ["--convergence"]),
    (["evaluate"], ["--max-texts=3"], ["--texts=tiny"]),
    (["run", "--layers=1"], ["--by=sweep"], []),
    (["run", "--layers=1"], ["--accept-unsettled"], []),
    ([*TUNE, "--moments=run"], ["--texts=tiny"], []),
    ([*TUNE, "--moments=run"], ["--tokens=500"], []),
    (["plan", "--rate=1e9"], ["--device=cpu"], []),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; whoever loads a model or an edit is refused with another line."""

    def refuse(*arguments: object, **options: object) -> None:
        raise me.InputError("a file was asked for")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mechedit.cli.options.load_quietly", refuse)
    monkeypatch.setattr("mechedit.cli.edit.Edit.load", refuse)
    monkeypatch.setattr("mechedit.cli.plan.ModelShapes.of_config", refuse)
    return tmp_path


@pytest.mark.parametrize(("words", "idle", "needed"), IDLE, ids=lambda words: " ".join(words) or "-")
def test_an_option_that_nothing_reads_is_refused(
    folder: Path, capsys: Any, words: list[str], idle: list[str], needed: list[str]
) -> None:
    option = idle[0].partition("=")[0]
    assert complaint(capsys, *words, *idle).startswith((f"mechedit: {option} is ", f"mechedit: {option} says "))
    assert list(folder.iterdir()) == []
    for control in ([*words, *needed], [*words, *needed, *idle]) if needed else ([*words],):
        assert complaint(capsys, *control) == "mechedit: a file was asked for"
