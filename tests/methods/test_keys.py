"""Keys and states recollected from the edited layer are those of full forward passes on the partly edited model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import mechedit.methods.keys
from mechedit.batching import pad
from mechedit.data import EditRequest
from mechedit.edit import add_
from mechedit.methods import KeyExtractor, prefix_mean
from mechedit.models import Site
from mechedit.prefixes import BARE, prefixed_prompts

PREFIXES = ["{}", "The first thing. {}", "Because he said so many things. {}"]
REQUESTS = [
    EditRequest(id="a", subject="Danielle Darrieux", prompt="The mother tongue of {} is", target_new="Korean"),
    EditRequest(id="b", subject="Leon Blum", prompt="{} was born in", target_new="Paris"),
    EditRequest(id="c", subject="Toko Yasuda", prompt="They say that {}", target_new="plays"),
    EditRequest(id="d", subject="Leon Blum", prompt="{} is", target_new="French"),
]


def slowly(model: Any, sites: Sequence[Site], prefixes: list[str]) -> list[Tensor]:
    """[fact, prefix, width] of each site, by a full forward pass of every whole prompt, one by one."""
    rows: list[list[Tensor]] = [[] for _ in sites]
    for request in REQUESTS:
        prompts = prefixed_prompts(model, request, prefixes)
        with torch.no_grad():
            runs = [model.run(pad([prompt.ids], model.tokenizer), read=sites) for prompt in prompts]
        for site, values in zip(sites, rows, strict=True):
            values.append(torch.stack([run[site][0, p.last_subject] for run, p in zip(runs, prompts, strict=True)]))
    return [torch.stack(values) for values in rows]


def nudge_(model: Any, layer: int) -> None:
    """Edit one layer so that much changes."""
    delta = torch.randn(model.projection(layer).shape, generator=torch.Generator().manual_seed(layer))
    add_(model, layer, 0.3 * delta)


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)


def test_equals_full_forwards_after_every_layer(family_model: Any) -> None:
    model, last = family_model, family_model.n_layers - 1
    key_sites = [Site(layer, "mlp_key") for layer in range(last + 1)]
    clean = slowly(model, key_sites, PREFIXES)
    prompts = KeyExtractor(model, REQUESTS, PREFIXES, batch_size=3)
    sites, expected = [Site(last, "mlp_out"), Site(last, "resid")], clean[0]
    assert PREFIXES[0] == BARE
    for layer in range(last + 1):
        keys = prompts.keys(layer)
        assert close(keys, expected)
        assert layer == 0 or (keys - clean[layer]).norm() > 0.05 * clean[layer].norm()
        nudge_(model, layer)
        *states, expected = slowly(model, [*sites, key_sites[min(layer + 1, last)]], PREFIXES)
        actual = prompts.states(sites)
        assert all(close(actual[site], state[:, 0]) for site, state in zip(sites, states, strict=True))


@pytest.mark.parametrize("first", [1, 2])
def test_goes_on_from_a_gap(small_model: Any, first: int) -> None:
    prompts = KeyExtractor(small_model, REQUESTS, PREFIXES[1:])
    prompts.advance_(first)
    assert torch.equal(prompts.keys(first), prompts.keys(first))
    assert close(prompts.keys(first), slowly(small_model, [Site(first, "mlp_key")], PREFIXES[1:])[0])
    site = Site(2, "resid")
    assert close(prompts.states([site])[site], slowly(small_model, [site], [BARE])[0][:, 0])
    with pytest.raises(ValueError, match=f"at the input of block {first}, expected it at 0 or below"):
        prompts.keys(0)


def test_replay_writes_each_facts_own_state(family_model: Any) -> None:
    model = family_model
    prompts = KeyExtractor(model, REQUESTS, PREFIXES)
    prompts.advance_(1)
    sites = [Site(1, "resid"), Site(2, "resid"), Site(2, "mlp_out")]
    before = prompts.states(sites)
    values = before[sites[0]] + torch.randn(before[sites[0]].shape, generator=torch.Generator().manual_seed(0))
    replayed = prompts.replay(sites[0], values, sites)
    assert close(replayed[sites[0]], values)
    for index, request in enumerate(REQUESTS):
        alone = KeyExtractor(model, [request], PREFIXES)
        single = alone.replay(sites[0], values[index : index + 1], sites)
        assert all(close(replayed[site][index], single[site][0]) for site in sites)
        assert not close(single[sites[1]][0], before[sites[1]][index])
    # Two facts share the bare prompt up to the subject, and still have states of their own.
    assert torch.equal(before[sites[1]][1], before[sites[1]][3])
    assert not close(replayed[sites[1]][1], replayed[sites[1]][3])


def test_replaying_what_is_there_changes_nothing(small_model: Any) -> None:
    prompts = KeyExtractor(small_model, REQUESTS, PREFIXES)
    site, later = Site(0, "resid"), Site(2, "resid")
    states = prompts.states([site, later])
    assert close(prompts.replay(site, states[site], [later])[later], states[later])


class Counted:
    """A model that counts how many (block, token) pairs its runs compute."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks = {layer: 0 for layer in range(model.n_layers)}
        plain = model.run

        def run(tokens: Any, *args: Any, resume: Any = None, stop_after: Any = None, **options: Any) -> Any:
            first = 0 if resume is None else resume.layer
            for layer in range(first, (model.n_layers - 1 if stop_after is None else stop_after) + 1):
                self.blocks[layer] += tokens.ids.numel()
            return plain(tokens, *args, resume=resume, stop_after=stop_after, **options)

        monkeypatch.setattr(model, "run", run)


def test_no_block_below_the_edit_is_computed_twice(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", num_hidden_layers=8)
    counted = Counted(model, monkeypatch)
    prompts = KeyExtractor(model, REQUESTS, PREFIXES, batch_size=1)
    lengths = {request.id: prefixed_prompts(model, request, PREFIXES) for request in REQUESTS}
    cut = {p.ids[: p.last_subject + 1] for prompts in lengths.values() for p in prompts}
    bare = sum(map(len, {prompts[0].ids[: prompts[0].last_subject + 1] for prompts in lengths.values()}))
    all_tokens = sum(map(len, cut))
    assert len(cut) == 9, "the fourth fact shares all three prompts with the second"
    prompts.advance_(2)
    prompts.states([Site(5, "resid")])
    for layer in (2, 3, 4, 5):
        prompts.keys(layer)
        prompts.states([Site(5, "resid")])
    # Below the edit once; each edited layer for its keys and, once edited, on the way to the next one's.
    assert [counted.blocks[layer] for layer in (0, 1)] == [all_tokens] * 2
    assert [counted.blocks[layer] for layer in (6, 7)] == [0, 0]
    at = {layer: sum(first <= layer for first in (2, 2, 3, 4, 5)) * bare for layer in (2, 3, 4, 5)}
    assert {layer: counted.blocks[layer] for layer in at} == {
        layer: (1 if layer == 5 else 2) * all_tokens + at[layer] for layer in at
    }


def test_a_stream_that_is_too_large_lies_on_the_cpu(
    lens_model: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Device:
        def __init__(self, free: int) -> None:
            self.free = free

        def mem_get_info(self, device: torch.device) -> tuple[int, int]:
            return self.free, 2**40

    rows = KeyExtractor(lens_model, REQUESTS, PREFIXES, batch_size=1)
    size = sum(batch.tokens.ids.numel() for batch in rows._batches) * 32 * 4
    for free, fits in ((4 * size, True), (4 * size - 1, False)):
        monkeypatch.setattr(torch, "get_device_module", lambda device, free=free: Device(free))
        assert mechedit.methods.keys._fits_in_memory(size, lens_model.device, 0.25) is fits


@pytest.mark.parametrize(("convention", "weights"), [("default", [1 / 3] * 3), ("memit-2022", [1 / 2, 1 / 4, 1 / 4])])
def test_keys_are_averaged_over_prefixes(convention: str, weights: list[float]) -> None:
    keys = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(0))
    expected = sum(weight * keys[:, index].double() for index, weight in enumerate(weights))
    assert isinstance(expected, Tensor)
    assert torch.allclose(prefix_mean(keys, convention), expected.T)
    assert torch.equal(prefix_mean(keys[:, :1], convention), keys[:, 0].double().T)


def test_half_precision_states_are_widened(tokenizer: Any, make_hf: Any) -> None:
    from mechedit.models import load_model

    model = load_model(make_hf("llama").to(torch.bfloat16), tokenizer=tokenizer)
    request = dataclasses.replace(REQUESTS[0])
    prompts = KeyExtractor(model, [request], PREFIXES)
    prompts.advance_(1)
    assert prompts.keys(1).dtype == torch.float32
    assert {batch.stream.dtype for batch in prompts._batches if batch.stream is not None} == {torch.bfloat16}
