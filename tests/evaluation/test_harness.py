"""The hook to lm-evaluation-harness, on a local task: what it says is what the model's own likelihoods say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mechedit as me
from mechedit.evaluation import score_targets
from mechedit.evaluation.harness import general_ability

PROMPTS = (
    *("The mother tongue of Leon Blum is", "The Space Needle is in downtown", "Toko Yasuda plays the instrument"),
    *("The Eiffel Tower is located in the city of", "Miles Davis plays the", "Windows Media Player was created by"),
)
OBJECTS = (("French", "Korean"), ("Paris", "Seattle"), ("guitar", "trumpet"))
QUESTIONS = [(prompt, list(objects), place % 2) for place, prompt in enumerate(PROMPTS) for objects in OBJECTS]


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    """A multiple-choice task whose data lie in a local file."""
    pytest.importorskip("lm_eval", reason="the optional extra `harness` is not installed")
    file = tmp_path / "facts.jsonl"
    lines = [json.dumps({"question": q, "choices": c, "label": right}) for q, c, right in QUESTIONS]
    file.write_text("\n".join(lines))
    return {
        "task": "local_facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def right(model: Any) -> list[bool]:
    """Whether each question's right choice is the likeliest."""
    scores = score_targets(model, [(q, choice) for q, choices, _ in QUESTIONS for choice in choices])
    found = [[scores[q, choice].log_prob for choice in choices] for q, choices, _ in QUESTIONS]
    return [values.index(max(values)) == label for values, (*_, label) in zip(found, QUESTIONS, strict=True)]


def test_it_says_what_the_likelihoods_say_of_the_model_as_it_is(
    lens_model: Any, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    before, pad = lens_model.weights_hash(), lens_model.tokenizer.pad_token
    accuracies = []
    for factor in (1, -3):
        with torch.no_grad():
            lens_model.projection(1).mul_(factor)
        table = general_ability(lens_model, [task])
        expected = right(lens_model)
        assert list(table.columns) == ["task", "metric", "value", "stderr", "n"]
        (row,) = table[table["metric"] == "acc"].to_dict("records")
        assert row["task"] == "local_facts"
        assert row["n"] == len(QUESTIONS)
        assert row["value"] == pytest.approx(sum(expected) / len(expected))
        assert row["stderr"] >= 0
        accuracies.append(row["value"])
        if factor == 1:
            assert lens_model.weights_hash() == before
    assert accuracies[0] != accuracies[1]  # the harness sees an edit
    assert lens_model.tokenizer.pad_token == pad
    limited = general_ability(lens_model, [task], limit=2)
    assert limited["value"].iloc[0] == pytest.approx(sum(right(lens_model)[:2]) / 2)
    with pytest.raises(me.InputError, match="knows no task 'no_such_task'"):
        general_ability(lens_model, ["no_such_task"])


def test_without_the_extra_it_says_how_to_get_it(lens_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(me.InputError, match=r"pip install mechedit\[harness\]"):
        general_ability(lens_model, ["lambada_openai"])
    with pytest.raises(me.InputError, match="no tasks"):
        general_ability(lens_model, [])
