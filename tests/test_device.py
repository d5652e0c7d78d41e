"""The device is never assumed: every step works where torch's default device holds no data, and gives the same numbers.

What is made there without a device of its own is a tensor of device `meta`, and computing with it and the model fails,
as it would between a CPU and a GPU.
"""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import mechedit as me
from mechedit.evaluation import EvaluationConfig
from mechedit.session import EditSession

TEXTS = 20


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before)


def all_steps(model: me.Model) -> dict[str, np.ndarray]:
    """Numbers of every step on the tiny model."""
    facts, requests, texts = me.load_facts("known")[:5], me.load_requests("tiny")[:2], me.load_texts("tiny")[:TEXTS]
    config = me.TraceConfig(samples=1, sever=("nothing", "mlp", "attn"), roles=("subject_last",))
    effects = me.trace_facts(model, facts, config)
    selection = me.select_layers(effects, config=me.SelectConfig(min_facts=5))
    layers, prefixes = [2, 3], ["{}", "So. {}"]
    moments = me.collect_moments(model, texts, layers)
    targets = me.find_targets(model, requests, layers[-1], prefixes, me.TargetConfig(steps=3))
    memit = me.MemitConfig(steps=3)
    edit = me.memit(model, requests, layers, moments, prefixes, memit)
    scoring = EvaluationConfig(generation_tokens=4, generation_prompts=1, answer_tokens=2, plus=False, resamples=10)
    before = model.projection(layers[0]).clone()
    baseline = me.measure_baseline(model, requests, scoring, texts=texts[:2])
    with me.edited(model, edit):
        scores = me.evaluate(model, requests, baseline=baseline, texts=texts[:2])
    me.apply_(model, edit)
    assert not torch.equal(model.projection(layers[0]), before)
    me.undo_(model, edit)
    assert torch.equal(model.projection(layers[0]), before)
    with EditSession(model, layers, moments, "memit", memit, prefixes=prefixes, texts=texts[:2]) as session:
        session.write(requests[:1])
        session_scores = session.scores
    trained = me.ft(model, requests, layers[:1], config=me.FineTuneConfig(steps=2))
    return {
        "trace": effects["score"].to_numpy(),
        "selection": np.array(selection.stability),
        "moments": moments[2].matrix.numpy(),
        "targets": targets.z.numpy(),
        "edit": edit.delta(2).numpy(),
        "scores": scores.table["value"].to_numpy(),
        "session": session_scores["value"].to_numpy(),
        "ft": trained.delta(2).numpy(),
    }


def test_every_step_names_its_device() -> None:
    model = me.load_model("tiny", device="cpu")
    expected = all_steps(model)
    with default_device("meta"):
        results = all_steps(model)
    assert results.keys() == expected.keys()
    for name, values in expected.items():
        assert values.size, name
        np.testing.assert_allclose(results[name], values, rtol=1e-6, atol=1e-9, err_msg=name)


def _trace(model: me.Model) -> object:
    return me.trace_facts(model, me.load_facts("known")[:1], me.TraceConfig(samples=1, kinds=("state",)))


def _moments(model: me.Model) -> object:
    return me.collect_moments(model, me.load_texts("tiny")[:20], [1])


@pytest.mark.parametrize(
    ("place", "step"),
    [
        ("mechedit.trace.traced_fact.tokenize_fact", _trace),
        ("mechedit.moments.text_pass.KeyReader.read", _moments),
    ],
)
def test_a_tensor_of_no_device_is_noticed(
    place: str, step: Callable[[me.Model], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in a step, and computed with."""
    model = me.load_model("tiny", device="cpu")
    original = pkgutil.resolve_name(place)

    def planted(*arguments: Any, **options: Any) -> Any:
        assert float((torch.zeros(3) + model.projection(1)[0, :3]).norm()) > 0
        return original(*arguments, **options)

    monkeypatch.setattr(place, planted)
    step(model)
    with default_device("meta"), pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step(model)
