"""The fast engine of GPT-2 and GPT-Neo gives what transformers' blocks give."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.patches import random_patch, random_tokens
from torch import Tensor

from mechedit.models import EMBED, KVCache, Patch, Resume, Run, Site, Tokens
from mechedit.models.fast_gpt import FastGptEngine
from mechedit.models.run_plan import RunPlan

START = 4
WIDTH = 9
"""Longer than the local window of 3, and than the prefix."""


@pytest.fixture(params=["gpt2", "gpt_neo"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def both_ways(monkeypatch: pytest.MonkeyPatch, model: Any, *arguments: Any, **options: Any) -> tuple[Run, Run]:
    """The same run by the fast engine, which has to be used, and by another one, through transformers' blocks."""
    plans, run_fast = [], FastGptEngine.run
    with monkeypatch.context() as patched:
        patched.setattr(FastGptEngine, "run", lambda self, plan: plans.append(plan) or run_fast(self, plan))
        quick = model.run(*arguments, **options)
        assert len(plans) == 1
        patched.setattr(FastGptEngine, "can_run", lambda self, plan: False)
        slow = model.run(*arguments, **options)
        assert len(plans) == 1
    return quick, slow


def close(result: Tensor | None, expected: Tensor | None) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def ragged(batch: int = 3, width: int = WIDTH) -> Tokens:
    """Rows of different lengths, padded at the right."""
    tokens = random_tokens(batch=batch, width=width)
    return Tokens(tokens.ids, (torch.arange(width) < torch.tensor([[width], [2], [width - 3]])[:batch]).long())


@torch.no_grad()
def begun(model: Any, ends: Tensor) -> tuple[Tokens, KVCache]:
    """Rows that go on for four positions after different ends, and what came before them."""
    tokens = random_tokens(batch=len(ends), width=WIDTH)
    prefix = model.run(tokens, use_cache=True).kv_cache.before(ends)
    later = tokens.ids.take_along_dim(ends[:, None] + torch.arange(4), 1)
    return Tokens(later, torch.ones_like(later)), prefix


@pytest.mark.parametrize("start", [0, START])
@pytest.mark.parametrize("add", [False, True])
@torch.no_grad()
def test_written_logits_of_kept_positions(
    monkeypatch: pytest.MonkeyPatch, family_model: Any, start: int, add: bool
) -> None:
    tokens, last = random_tokens(batch=3, width=WIDTH), family_model.n_layers - 1
    full = family_model.run(tokens, read=[Site(0, "resid")], use_cache=True)
    later = Tokens(tokens.ids[:, start:], tokens.mask[:, start:])
    sites = [Site(layer, part) for layer in (1, last) for part in ("attn_out", "mlp_out", "resid")]
    # Positions 1 and 3 are not kept. The last block's state at 4 hides all that came before it there alone.
    places = {"attn_out": [[0, 1], [-1, 3], [0, -1]], "mlp_out": [[2, 3], [2, -1], [-1, 1]]}
    patches = [
        random_patch(family_model, site, places.get(site.part, [[1 if site.layer == 1 else 4], [-1], [4]]), seed)
        for seed, site in enumerate(sites)
    ]
    patches = [Patch(patch.site, patch.positions, patch.value, add) for patch in patches]
    options = {
        "resume": Resume(1, full[Site(0, "resid")][:, start:]),
        "logits_to_keep": torch.tensor([4, 0, 2]),
        "kv_cache": full.kv_cache.take(torch.arange(3), start, 1) if start else None,
    }
    quick, slow = both_ways(monkeypatch, family_model, later, patches, **options)
    close(quick.logits, slow.logits)
    for left_out in range(len(patches)):
        fewer = patches[:left_out] + patches[left_out + 1 :]
        without, _ = both_ways(monkeypatch, family_model, later, fewer, **options)
        assert (without.logits - quick.logits).abs().max() > 1e-3


@pytest.mark.parametrize("start", [0, START])
@torch.no_grad()
def test_states_after_a_stop(monkeypatch: pytest.MonkeyPatch, family_model: Any, start: int) -> None:
    tokens, site = random_tokens(batch=3, width=WIDTH), Site(2, "resid")
    full = family_model.run(tokens, read=[Site(0, "resid"), site], use_cache=True)
    resid = full[Site(0, "resid")][:, start:]
    copy_of_resid = resid.clone()
    quick, slow = both_ways(
        monkeypatch,
        family_model,
        Tokens(tokens.ids[:, start:], tokens.mask[:, start:]),
        read=[site],
        resume=Resume(1, resid),
        stop_after=2,
        kv_cache=full.kv_cache.take(torch.arange(3), start, 1, 2) if start else None,
    )
    close(quick[site], slow[site])
    close(quick[site], full[site][:, start:])
    assert torch.equal(resid, copy_of_resid), "the state that is resumed from was written over"


@pytest.mark.parametrize("end", ["attn_key", "mlp_key", "resid"])
@torch.no_grad()
def test_keys_and_states_from_the_first_block_on(monkeypatch: pytest.MonkeyPatch, family_model: Any, end: str) -> None:
    tokens, last = ragged(), Site(2, end)
    sites = [Site(0, "mlp_key"), Site(0, "resid"), Site(1, "attn_key"), Site(1, "mlp_key"), last]
    patch = random_patch(family_model, Site(1, "mlp_out"), [[0, 8], [1, -1], [4, -1]])
    quick, slow = both_ways(monkeypatch, family_model, tokens, [patch], sites, stop_after=2)
    real = tokens.mask.bool()
    assert set(quick.values) == set(slow.values) == set(sites)
    for site in sites:
        close(quick[site][real], slow[site][real])
    unpatched, _ = both_ways(monkeypatch, family_model, tokens, [], sites, stop_after=2)
    assert (unpatched[last] - quick[last])[real].abs().max() > 1e-3


@torch.no_grad()
def test_logits_of_padded_rows_at_their_own_positions(monkeypatch: pytest.MonkeyPatch, family_model: Any) -> None:
    tokens, keep = ragged(), torch.tensor([[8, 3], [1, 0], [5, 2]])
    quick, slow = both_ways(monkeypatch, family_model, tokens, logits_to_keep=keep)
    close(quick.logits, slow.logits)
    last = family_model.n_layers - 1
    # Where the last block is looked into, it computes all positions.
    seen, _ = both_ways(monkeypatch, family_model, tokens, read=[Site(last, "mlp_key")], logits_to_keep=keep)
    close(seen.logits, quick.logits)
    assert seen[Site(last, "mlp_key")].shape[1] == WIDTH
    patch = random_patch(family_model, Site(last, "mlp_out"), [[8, 4], [0, -1], [2, -1]])
    written, there = both_ways(monkeypatch, family_model, tokens, [patch], logits_to_keep=keep)
    close(written.logits, there.logits)
    assert (written.logits - quick.logits).abs().max() > 1e-3
    everywhere, all_of_them = both_ways(monkeypatch, family_model, tokens)
    close(everywhere.logits[tokens.mask.bool()], all_of_them.logits[tokens.mask.bool()])
    close(everywhere.logits.take_along_dim(keep[..., None], 1), quick.logits)


def test_gradients_behind_prefixes_of_different_lengths(monkeypatch: pytest.MonkeyPatch, family_model: Any) -> None:
    tokens, prefix = begun(family_model, torch.tensor([5, 0, 2]))
    generator = torch.Generator().manual_seed(0)
    resid = torch.randn(3, 4, family_model.d_model, generator=generator, requires_grad=True)
    patch = random_patch(family_model, Site(2, "resid"), [[1], [-1], [0]])
    patch = dataclasses.replace(patch, value=patch.value.requires_grad_(), add=True)
    options = {"resume": Resume(1, resid), "kv_cache": prefix, "logits_to_keep": torch.tensor([[3, 1], [0, 2], [3, 2]])}
    quick, slow = both_ways(monkeypatch, family_model, tokens, [patch], **options)
    close(quick.logits, slow.logits)
    towards = torch.randn(quick.logits.shape, generator=generator)
    leaves = [resid, patch.value]
    gradients, expected = (torch.autograd.grad((run.logits * towards).sum(), leaves) for run in (quick, slow))
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        close(gradient, expected_gradient)
        assert gradient.abs().max() > 1e-3
    longer = dataclasses.replace(prefix, lengths=torch.tensor([5, 1, 2]))
    further, _ = both_ways(monkeypatch, family_model, tokens, [patch], **{**options, "kv_cache": longer})
    assert (further.logits - quick.logits)[1].abs().max() > 1e-3, "positions before a row's cache must matter here"


@torch.no_grad()
def test_the_cache_serves_a_later_run(monkeypatch: pytest.MonkeyPatch, family_model: Any) -> None:
    tokens, prefix = begun(family_model, torch.tensor([5, 0, 2]))
    quick, slow = both_ways(monkeypatch, family_model, tokens, kv_cache=prefix, use_cache=True)
    close(quick.logits, slow.logits)
    for (keys, values), (slow_keys, slow_values) in zip(quick.kv_cache.layers, slow.kv_cache.layers, strict=True):
        # Positions before a row's prefix hold anything.
        seen = quick.kv_cache.mask.bool()[:, None, :, None].expand_as(keys)
        close(keys[seen], slow_keys[seen])
        close(values[seen], slow_values[seen])
    assert torch.equal(quick.kv_cache.lengths, slow.kv_cache.lengths)
    tokens = random_tokens(batch=3, width=WIDTH)
    ends, at = torch.tensor([7, 1, 4]), torch.tensor([[7, 8], [1, 2], [4, 5]])
    later = Tokens(tokens.ids.take_along_dim(at, 1), torch.ones_like(at))
    behind, there = both_ways(monkeypatch, family_model, later, kv_cache=quick.kv_cache.before(ends))
    close(behind.logits, there.logits)
    close(behind.logits, family_model.run(tokens, logits_to_keep=at).logits)


@torch.no_grad()
def test_other_runs_go_to_other_engines(family_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_fast(self: FastGptEngine, plan: RunPlan) -> Run:
        raise AssertionError("taken")

    monkeypatch.setattr(FastGptEngine, "run", run_fast)
    tokens = random_tokens(batch=2)
    with pytest.raises(AssertionError, match="taken"):
        family_model.run(tokens)
    family_model.run(tokens, read=[Site(1, "attn_out")])
    family_model.run(tokens, read=[EMBED])
    family_model.run(tokens, [random_patch(family_model, EMBED, [[0], [1]])])
    family_model.run(tokens, [random_patch(family_model, Site(1, "mlp_key"), [[0], [1]])])
