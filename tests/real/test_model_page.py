"""The page on a model: what it says is what the run's files say, and its texts are the model's."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.edits import random_edit
from helpers.run_folder import write_run

import mechedit as me
from analyses.real_models import page as script
from analyses.real_models.page import Cost, free_text, page
from mechedit.edit import edited
from mechedit.evaluation.generation import generate
from mechedit.files import read_json, write_json

FINALS = {
    "n_requests": 60,
    "windows": [
        {"layers": [1, 2], "score": 70.5, "low": 60.0, "high": 80.0},
        {"layers": [2, 3, 4, 5], "score": 91.6, "low": 85.0, "high": 95.0},
    ],
}


def test_the_page_says_what_the_files_say(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "figures").mkdir()
    (tmp_path / "run" / "figures" / "roles.png").write_bytes(b"")
    selection = me.Selection.load(tmp_path / "run" / "selection.json")
    validation = {"by": "sweep", "score": "S", "n_requests": 20, "windows": FINALS["windows"][:1], "finals": FINALS}
    dataclasses.replace(selection, validation=validation).save(tmp_path / "run" / "selection.json")
    options = argparse.Namespace(model="smollm2", out=tmp_path)
    text = page(
        options,
        Cost(minutes=41.6, gib=3.21, calls=2),
        [["A prompt | with a bar\n\nand lines", "Rome", "Paris", "Rome it is"]],
    )
    summary = read_json(tmp_path / "run" / "summary.json")
    assert "**Layers 2–5.**" in text
    assert "42 minutes in 2 calls, at most 3.2 GiB" in text
    assert f"| ES | {summary['before']['ES']['mean']:.1f} [" in text
    assert "| 2–5 | 91.6 [85.0, 95.0] |\n| 1–2 | 70.5 [60.0, 80.0] |" in text, "the best window first"
    assert "| A prompt \\| with a bar and lines | Rome | Paris | Rome it is |" in text
    assert "run/figures/roles.png" in text
    assert "run/figures/sweep.png" not in text, "a figure that is not there"


def test_the_texts_are_those_of_the_model_before_and_after(lens_model: Any, tmp_path: Path) -> None:
    subjects = [f"Subject {number}" for number in range(script.WRITTEN)]
    requests = [
        me.EditRequest(
            id=name, subject=name, prompt="The home of {} is", target_new="Rome", paraphrases=(f"{name} lives in",)
        )
        for name in subjects
    ]
    edit = random_edit(lens_model)
    edit = dataclasses.replace(edit, manifest={**edit.manifest, "requests": subjects, "layers": list(edit.layers)})
    edit.save(tmp_path / "edit.safetensors")
    rows = free_text(lens_model, tmp_path, requests)
    assert len(rows) == 2 * script.WRITTEN
    prompts = [row[0] for row in rows]
    assert {prompt for prompt in prompts if prompt.startswith("The home of")} == {
        f"The home of {s} is" for s in subjects
    }
    before = [" ".join(text.split()) for text in generate(lens_model, prompts, tokens=script.TOKENS)]
    with edited(lens_model, edit):
        after = [" ".join(text.split()) for text in generate(lens_model, prompts, tokens=script.TOKENS)]
    assert [row[2] for row in rows] == before
    assert [row[3] for row in rows] == after
    assert before != after, "the edit changes nothing that is written"


def test_a_run_without_an_edit_is_an_error_and_what_it_took_adds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = script.read_arguments(["m", "--out", str(tmp_path), "--requests", "r.json", "--", "--samples", "2"])
    commands: list[list[str]] = []

    def failing(cost: Cost, command: list[str]) -> int:
        commands.append(command)
        cost.minutes, cost.calls = cost.minutes + 1.5, cost.calls + 1
        return 3

    monkeypatch.setattr(Cost, "add", failing)
    for _ in range(2):
        with pytest.raises(me.InputError, match="ended with 3, expected an edit"):
            script.run(options, "folder")
    assert commands[0][:4] == [sys.executable, "-m", "mechedit", "run"]
    assert commands[0][-4:] == ["--requests", "r.json", "--samples", "2"]
    assert read_json(tmp_path / "cost.json") == {"minutes": 3.0, "gib": 0.0, "calls": 2}
    write_json(tmp_path / "cost.json", {"minutes": 0.0, "gib": 0.0, "calls": 0})
    monkeypatch.setattr(Cost, "add", lambda cost, command: 0)
    assert script.run(options, "folder").calls == 0
