"""A fact of a pretrained model that nobody made for this package: found, traced, edited, shipped, and said anew.

SmolLM2-135M-Instruct is made by `make real`, and by `make test` where there is a network.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import mechedit as me
from analyses.real_models.make import is_made

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not is_made("smollm2"), reason="SmolLM2-135M is not made: run `make real` with a network"),
]
PROMPT = "{} is located in the city of"
FACTS = [
    me.Fact(id="1", subject="The Eiffel Tower", prompt=PROMPT, object="Paris"),
    me.Fact(id="2", subject="The Colosseum", prompt=PROMPT, object="Rome"),
    me.Fact(id="3", subject="The Statue of Liberty", prompt=PROMPT, object="New York"),
]
REQUEST = me.EditRequest(id="1", subject="The Eiffel Tower", prompt=PROMPT, target_new="Rome", target_true="Paris")
LAYERS = [2, 3, 4, 5, 6]
CONFIG = me.MemitConfig(covariance_weight=300.0, lr=0.5, steps=20)
WRITE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
texts = []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    texts.append(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :]))
print(json.dumps(texts))
"""
"""A program that knows nothing of this package: it loads a folder with transformers and writes greedily."""


@pytest.fixture(scope="module")
def model(load_real: Any) -> Any:
    return load_real("smollm2")


@pytest.fixture(scope="module")
def effects(model: Any) -> pd.DataFrame:
    config = me.TraceConfig(kinds=("state", "mlp"), samples=1, roles=("subject_last", "last"))
    return me.trace_facts(model, FACTS, config)


def greedy(model: Any, prompt: str, length: int) -> tuple[str, float]:
    """What the transformers model itself writes after a prompt, and the probability of its steps together."""
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    start, log_probability = ids.shape[1], 0.0
    for _ in range(length):
        with torch.no_grad():
            scores = model.hf(ids).logits[0, -1].log_softmax(-1)
        log_probability += float(scores.max())
        ids = torch.cat([ids, scores.argmax()[None, None]], dim=1)
    return model.tokenizer.decode(ids[0, start:]), float(torch.tensor(log_probability).exp())


def test_objects_are_the_tokens_that_the_model_writes(model: Any, effects: pd.DataFrame) -> None:
    clean = effects.groupby("fact")["clean"].first()
    for fact in FACTS:
        words, probability = greedy(model, fact.prompt.format(fact.subject), len(fact.object.split()))
        assert words == f" {fact.object}"
        assert clean[fact.id] == pytest.approx(probability, rel=1e-4)
    assert clean.min() > 0.5


def test_the_trace_finds_where_facts_are_recalled(model: Any, effects: pd.DataFrame) -> None:
    """MEMIT's picture: MLPs of early layers at the subject's last token, then the last token in late ones."""
    means = effects.groupby(["kind", "role", "layer"])["effect"].mean()
    total = float((effects.groupby("fact")["clean"].first() - effects.groupby("fact")["corrupted"].first()).mean())
    assert total > 0.5, "corrupting the subject takes the fact away"
    early, late = range(model.n_layers // 2), range(4 * model.n_layers // 5, model.n_layers)
    mlp, state = means["mlp"]["subject_last"], means["state"]
    assert mlp.idxmax() in early
    assert mlp[list(early)].max() > 0.2 > 0.05 > mlp[list(late)].max()
    assert state["subject_last"].idxmax() in early
    assert state["subject_last"].max() > 0.2
    assert state["last"][list(late)].min() > 0.3
    assert state["last"][list(early)].max() < 0.05


def test_a_fact_is_edited_shipped_and_said_anew_in_a_fresh_process(model: Any, tmp_path: Path) -> None:
    subject_prompt = REQUEST.prompt.format(REQUEST.subject)
    others = ["The Colosseum is located in the city of", "The Statue of Liberty is located in the city of"]
    prompts = [subject_prompt, *others, "The capital of France is the city of"]
    before = [greedy(model, prompt, 3)[0] for prompt in prompts]
    assert [text.split()[0].strip(".,") for text in before] == ["Paris", "Rome", "New", "Paris"]
    moments = me.collect_moments(model, me.load_texts("tiny")[:400], LAYERS, me.MomentsConfig(tokens=3_000))
    untouched = model.weights_hash()
    edit = me.memit(model, [REQUEST], LAYERS, moments, ["{}"], CONFIG)
    edit.save(tmp_path / "edit.safetensors")
    assert model.weights_hash() == untouched
    me.export(model, me.Edit.load(tmp_path / "edit.safetensors"), tmp_path / "edited")
    assert model.weights_hash() == untouched
    command = [sys.executable, "-c", WRITE, str(tmp_path / "edited"), json.dumps(prompts)]
    after = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert after[0].startswith(" Rome")
    # About other subjects it says what it said, and about the country whose capital Paris is.
    assert [text.split()[0] for text in after[1:]] == [text.split()[0] for text in before[1:]]
    with me.edited(model, edit):
        assert greedy(model, subject_prompt, 3)[0] == after[0]
    assert greedy(model, subject_prompt, 3)[0] == before[0]
