"""The published schedules run on any family and give our numbers: what the benchmarks compare is the same thing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import SENTENCES

import mechedit as me
from benchmarks.plain_model import PlainModel
from benchmarks.published import PublishedEditing
from benchmarks.published_tracing import PublishedTracing
from benchmarks.trace import TraceComparison
from mechedit.batching import pad
from mechedit.methods import KeyExtractor, prefix_mean
from mechedit.models import Site
from mechedit.trace import window_span
from mechedit.trace.cells import trace_group
from mechedit.trace.traced_fact import tokenize_fact

FAMILIES = ("llama", "gemma3", "gptj", "pythia", "gpt2")
PREFIXES = ("{}", "The city. {}", "A band of guitar. {}")
REQUESTS = (
    me.EditRequest(id="1", subject="The Eiffel Tower", prompt="{} is located in the city of", target_new="Seattle"),
    me.EditRequest(id="2", subject="Miles Davis", prompt="The mother tongue of {} is", target_new="French"),
)
CONFIG = me.TargetConfig(convention="memit-2022", threshold=0.0, steps=4, lr=0.1)
LAYER = 1


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, make_model: Callable[..., Any]) -> Any:
    return make_model(request.param)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_z_is_ours(model: Any) -> None:
    # In the last block of the Gemma the window is too short for δ of the block before to reach the object.
    targets = me.find_targets(model, REQUESTS, 0, PREFIXES, CONFIG)
    published = PublishedEditing(model, PREFIXES)
    results_of_theirs = [published.target(request, 0, CONFIG) for request in REQUESTS]
    ours, theirs = targets.z - targets.initial, torch.stack([z - initial for initial, z in results_of_theirs])
    assert relative(ours, theirs) < 1e-4
    # Control: the facts' δ are not alike, and another layer's is another.
    assert relative(theirs[0], theirs[1]) > 0.1
    elsewhere = published.target(REQUESTS[0], LAYER, CONFIG)
    assert relative(elsewhere[1] - elsewhere[0], theirs[0]) > 0.1


def test_keys_and_states_are_ours(model: Any) -> None:
    published, prompts = PublishedEditing(model, PREFIXES), KeyExtractor(model, REQUESTS, PREFIXES)
    site = Site(model.n_layers - 1, "resid")
    keys, states = prefix_mean(prompts.keys(LAYER), "memit-2022").T, prompts.states([site])[site]
    assert relative(keys, published.keys(REQUESTS, LAYER).double()) < 1e-5
    assert relative(states, published.states(REQUESTS, site.layer)) < 1e-5
    assert relative(keys, published.keys(REQUESTS, LAYER + 1).double()) > 0.1


@pytest.mark.parametrize("full_passes", [False, True])
def test_moments_are_ours(model: Any, full_passes: bool) -> None:
    texts = [*SENTENCES, *(f"{text} {other}" for text in SENTENCES for other in SENTENCES[:3])]
    ours = me.collect_moments(model, texts, [0, LAYER])
    theirs = PublishedEditing(model, PREFIXES).moment(texts, LAYER, full_passes=full_passes).double()
    assert relative(ours[LAYER].matrix, theirs) < 1e-5
    assert relative(ours[0].matrix, theirs) > 0.1


def test_special_tokens_are_counted_in_neither_moment(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    plain = [text for text in SENTENCES for _ in range(3)]
    with_special = [f"{text}<|endoftext|>{text}" for text in plain]
    for texts in (plain, with_special):
        ours = me.collect_moments(model, texts, [LAYER])[LAYER]
        theirs = PublishedEditing(model, PREFIXES).moment(texts, LAYER).double()
        assert relative(ours.matrix, theirs) < 1e-5
    # Control: the texts with the special token do hold it.
    ids = model.tokenizer(with_special[0])["input_ids"]
    assert set(ids) & set(model.tokenizer.all_special_ids)


def test_every_cell_is_ours(model: Any) -> None:
    fact = me.Fact(id="1", subject="Leon Blum", prompt="The mother tongue of {} is", object="French")
    traced = tokenize_fact(model, fact)
    config = me.TraceConfig(kinds=("state", "mlp", "attn"), sever=("nothing", "mlp", "attn"), samples=2, window=2)
    std = 0.5
    effects = trace_group(model, [traced], std, config)
    published = PublishedTracing(model, traced, config, std)
    some_cells = effects[(effects.position.isin([traced.subject[-1], len(traced.roles) - 1]))]
    theirs = torch.tensor(
        [
            published.cell(kind, sever, window_span(kind, layer, model.n_layers, config.window), position)
            for kind, sever, layer, position in some_cells[["kind", "sever", "layer", "position"]].itertuples(
                index=False
            )
        ]
    )
    ours = torch.tensor(some_cells.score.to_numpy())
    error = float((ours - theirs).abs().max() / theirs.max())
    assert error < 1e-5
    # Control: restoring and severing change the score.
    spread_of_scores = {name: rows.score.std() for name, rows in some_cells.groupby("sever")}
    assert min(spread_of_scores.values()) > 100 * error * float(theirs.max())
    by_sever = some_cells.pivot_table(index=["kind", "layer", "position"], columns="sever", values="score")
    for module in ("mlp", "attn"):
        assert (by_sever["nothing"] - by_sever[module]).abs().max() > 100 * error * float(theirs.max())


@pytest.mark.parametrize(("family", "direct"), [("llama", True), ("gptj", True), ("gpt2", True), ("gemma2", False)])
def test_states_after_the_last_block_are_unembedded_as_the_model_does(
    make_model: Callable[..., Any], family: str, direct: bool
) -> None:
    model = make_model(family)
    plain = PlainModel(model)
    assert (plain.final_norm is not None) == direct, "only logits with caps need the model's own forward"
    tokens = pad([model.tokenizer(text)["input_ids"] for text in SENTENCES[:2]], model.tokenizer)
    run = model.run(tokens, read=[Site(model.n_layers - 1, "resid")])
    states = run[Site(model.n_layers - 1, "resid")].clone().requires_grad_()
    logits = plain.logits(states)
    torch.testing.assert_close(logits, run.logits, rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    assert states.grad is not None
    assert states.grad.abs().max() > 0
    # Control: without the final norm the logits are others.
    assert not torch.allclose(model.hf.get_output_embeddings()(states), run.logits, atol=1e-2)


def test_what_differs_is_held_against_float64(model: Any) -> None:
    fact = me.Fact(id="1", subject="Leon Blum", prompt="The mother tongue of {} is", object="French")
    group, config = [tokenize_fact(model, fact)], me.TraceConfig(kinds=("state",), samples=2)
    weights, timed = model.weights_hash(), SimpleNamespace(model=model, device="cpu")
    by_tolerance = {}
    for tolerance in (1.0, 0.0):
        comparison = TraceComparison()
        comparison.add(timed, group, config, 0.5, 1.0, tolerance)
        by_tolerance[tolerance] = comparison
    assert by_tolerance[1.0].held == 0
    assert by_tolerance[1.0].errors[1] == 0
    assert 0 < by_tolerance[0.0].held <= by_tolerance[0.0].drawn
    ours, published, effect = by_tolerance[0.0].errors
    assert 0 < published < 1e-5
    assert ours < 1e-5
    assert effect > 1e-3, "the control: there is something to compare"
    assert model.weights_hash() == weights
