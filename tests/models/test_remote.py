"""A model behind nnsight's remote traces (here in this process) gives what the loaded one gives; nothing writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.edits import logits, random_edit
from helpers.models import random_hf, small_tokenizer

import mechedit as me
from mechedit.batching import pad
from mechedit.errors import InputError
from mechedit.models import KVCache, Patch, Resume, Site
from mechedit.trace.cells import trace_group
from mechedit.trace.traced_fact import tokenize_fact

FACT = me.Fact(id="f", subject="Leon Blum", prompt="The mother tongue of {} is the", object="Korean")
REQUEST = me.EditRequest(id="a", subject="Leon Blum", prompt="The mother tongue of {}", target_new="Korean")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    random_hf(request.param).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Any, Any]:
    """The model behind remote traces, and in memory."""
    return me.load_model(folder, remote="local"), me.load_model(folder)


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-5, atol=1e-5)


def test_reads_and_patches_are_those_of_the_model_in_memory(pair: tuple[Any, Any]) -> None:
    texts = ["The mother tongue of Leon Blum is", "The Eiffel Tower"]
    tokens = pad([pair[1].tokenizer(text)["input_ids"] for text in texts], pair[1].tokenizer)
    sites = [Site(0, "embed"), Site(1, "attn_out"), Site(1, "mlp_key"), Site(1, "mlp_out"), Site(2, "resid")]
    with torch.no_grad():
        clean, expected = (model.run(tokens, read=sites) for model in pair)
        real = tokens.mask.bool()
        for site in sites:
            assert close(clean[site][real], expected[site][real]), site
        assert close(clean.logits[real], expected.logits[real])
        last = tokens.lengths - 1
        at = torch.stack([last - 1, last], 1)
        patches = [
            Patch(Site(0, "mlp_out"), torch.tensor([[2], [1]]), torch.ones(2, 1, pair[0].d_model)),
            Patch(Site(1, "mlp_key"), torch.tensor([[-1], [2]]), torch.ones(2, 1, pair[0].d_mlp), add=True),
        ]
        patched, as_expected = (model.run(tokens, patches, logits_to_keep=at) for model in pair)
        assert close(patched.logits, as_expected.logits)
        assert not close(patched.logits[0, -1], clean.logits[0, last[0]])
        resume = Resume(2, expected[Site(2, "resid")])
        stopped, as_expected = (
            model.run(tokens, [], [Site(2, "attn_out")], resume=resume, stop_after=2) for model in pair
        )
        assert close(stopped[Site(2, "attn_out")][real], as_expected[Site(2, "attn_out")][real])
        ended, as_expected = (model.run(tokens, unembed=False, logits_to_keep=at) for model in pair)
        assert close(ended.head_inputs, as_expected.head_inputs)
        caches = [model.run(tokens.rows(torch.tensor([0])), use_cache=True).kv_cache for model in pair]
        assert all(isinstance(cache, KVCache) for cache in caches)


def test_a_trace_is_that_of_the_model_in_memory(pair: tuple[Any, Any]) -> None:
    config = me.TraceConfig(
        metrics=("log_probability",),
        kinds=("state", "mlp"),
        sever=("nothing", "mlp"),
        samples=2,
        roles=("subject_last",),
    )
    effects = [trace_group(model, [tokenize_fact(model, FACT)], 1.0, config)["effect"].to_numpy() for model in pair]
    assert close(*map(torch.tensor, effects))
    assert effects[1].std() > 1e-3


def test_writing_is_refused_with_the_reason(pair: tuple[Any, Any]) -> None:
    model, loaded = pair
    moments = {1: torch.eye(model.d_mlp, dtype=torch.float64)}
    for write in (
        lambda: me.memit(model, [REQUEST], [1], moments, prefixes=["{}"]),
        lambda: me.apply_(model, random_edit(loaded)),
        lambda: model.projection(0).add_(1),
        lambda: model.save_pretrained("anywhere"),
    ):
        with pytest.raises(InputError, match=r"runs on a server|was made for"):
            write()
    with pytest.raises(InputError, match="gives no gradients"):
        me.find_targets(model, [REQUEST], 1, ["{}"])
    assert close(logits(model), logits(loaded))


def test_what_does_not_go_with_a_server_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="together with device, tp, expected alone"):
        me.load_model(folder, remote=True, device="cpu", tp=True)
    with pytest.raises(InputError, match="expected a hub name with remote"):
        me.load_model(random_hf("gpt2"), tokenizer=small_tokenizer(), remote=True)
