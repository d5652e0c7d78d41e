"""`torch.set_default_dtype` is the user's: whatever it is, every step gives the numbers that it gives under float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import SENTENCES, random_hf
from helpers.scoring import CONFIG, REQUESTS

import mechedit as me

TEMPLATES = [
    f"{start} {{}} {end}" for start in ("The", "In", "Who", "Apple of") for end in ("is", "plays", "was created")
]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def known_fact(hf: Any, tokenizer: Any) -> me.Fact:
    """A fact whose object is the one token that a random model finds likeliest."""
    for template in TEMPLATES:
        text = template.replace("{}", "Leon Blum")
        with torch.no_grad():
            token = int(hf(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].argmax())
        word = tokenizer.decode([token])
        if word.strip() and tokenizer(text + word)["input_ids"] == [*tokenizer(text)["input_ids"], token]:
            joint = word[: len(word) - len(word.lstrip())]
            return me.Fact(id="1", subject="Leon Blum", prompt=template, object=word.strip(), joint=joint)
    raise AssertionError("every template ends in a token that is no text of its own")


def all_steps(hf: Any, tokenizer: Any, backend: str) -> dict[str, np.ndarray]:
    """Numbers of every step: trace, moments, targets, edit, training and evaluation."""
    model = me.load_model(hf, tokenizer=tokenizer, backend=backend)
    fact = known_fact(hf, tokenizer)
    results = {}
    for distribution in ("gaussian", "multivariate", "student", "uniform"):
        config = me.TraceConfig(
            samples=2, sever=("nothing", "mlp", "attn"), corruption=me.Corruption(distribution=distribution)
        )
        results[distribution] = me.trace_facts(model, [fact], config)["score"].to_numpy()
    collected = me.collect_moments(model, list(SENTENCES) * 2, [0, 1])
    # So few texts give singular moments.
    identity = torch.eye(model.d_mlp, dtype=torch.float64)
    moments = {layer: moment.matrix.double() + identity for layer, moment in collected.items()}
    results["moments"] = np.concatenate([moment.numpy().ravel() for moment in moments.values()])
    edit = me.memit(model, REQUESTS, [0, 1], moments, ["{}", "So. {}"], me.MemitConfig(steps=4))
    trained = me.ft(model, REQUESTS, [1], config=me.FineTuneConfig(steps=3))
    for name, made in (("memit", edit), ("ft", trained)):
        results[name] = np.concatenate([made.delta(layer).numpy().ravel() for layer in made.layers])
    with me.edited(model, edit):
        results["scores"] = (
            me.evaluate(model, REQUESTS, CONFIG, texts=["Edwin of Northumbria"]).table["value"].to_numpy()
        )
    return results


@pytest.mark.parametrize(
    ("family", "backend", "dtype"),
    [
        ("gpt2", "transformer_lens", torch.float64),
        ("gpt_neo", "transformer_lens", torch.bfloat16),
        ("gemma2", "nnsight", torch.float64),
        ("gpt2", "nnsight", torch.bfloat16),
    ],
)
def test_every_step_gives_the_same_numbers(family: str, backend: str, dtype: torch.dtype, tokenizer: Any) -> None:
    expected = all_steps(random_hf(family, 0), tokenizer, backend)
    hf = random_hf(family, 0)
    with default_dtype(dtype):
        assert torch.zeros(1).dtype == dtype, "control: the default is another one"
        results = all_steps(hf, tokenizer, backend)
    for name, values in expected.items():
        np.testing.assert_array_equal(results[name], values, err_msg=name)


@pytest.mark.parametrize(
    ("family", "backend"), [("gpt2", "transformer_lens"), ("gemma2", "nnsight"), ("llama", "nnsight")]
)
def test_a_model_in_float64_gives_the_same_numbers_but_for_rounding(family: str, backend: str, tokenizer: Any) -> None:
    expected = all_steps(random_hf(family, 0), tokenizer, backend)
    results = all_steps(random_hf(family, 0).double(), tokenizer, backend)
    for name, values in expected.items():
        assert np.linalg.norm(results[name] - values) <= 1e-4 * np.linalg.norm(values), name
    assert any((results[name] != values).any() for name, values in expected.items()), "control: another dtype ran"
