"""The quicker way through GPT-2's and GPT-Neo's blocks gives what their own forward gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_models import random_patch, random_tokens

import mechedit.models.backbone as backbone
from mechedit.models import Patch, Resume, Run, Site, Tokens

START = 4
WIDTH = 9
"""Longer than the local window of 3, and than the prefix."""


@pytest.fixture(params=["gpt2", "gpt_neo"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def both_ways(monkeypatch: pytest.MonkeyPatch, model: Any, *arguments: Any, **options: Any) -> tuple[Run, Run]:
    """The same run through the quicker way, which has to be taken, and through transformers' blocks."""
    taken = []

    def lean_run(*given: Any) -> Run:
        taken.append(given)
        return backbone_lean_run(*given)

    backbone_lean_run = backbone.lean_run
    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr(backbone, "lean_run", lean_run)
        quick = model.run(*arguments, **options)
        assert len(taken) == 1
        patched.setattr(backbone, "lean_fits", lambda *given: False)
        slow = model.run(*arguments, **options)
        assert len(taken) == 1
    return quick, slow


@pytest.mark.parametrize("start", [0, START])
@pytest.mark.parametrize("add", [False, True])
def test_written_logits_of_kept_positions(
    monkeypatch: pytest.MonkeyPatch, family_model: Any, start: int, add: bool
) -> None:
    tokens, last = random_tokens(batch=3, width=WIDTH), family_model.n_layers - 1
    with torch.no_grad():
        whole = family_model.run(tokens, read=[Site(0, "resid")], cache=True)
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
        "resume": Resume(1, whole[Site(0, "resid")][:, start:]),
        "keep": torch.tensor([4, 0, 2]),
        "prefix": whole.prefix.take(torch.arange(3), start, 1) if start else None,
    }
    quick, slow = both_ways(monkeypatch, family_model, later, patches, **options)
    torch.testing.assert_close(quick.logits, slow.logits, rtol=1e-5, atol=1e-5)
    for left_out in range(len(patches)):
        some = patches[:left_out] + patches[left_out + 1 :]
        other, _ = both_ways(monkeypatch, family_model, later, some, **options)
        assert (other.logits - quick.logits).abs().max() > 1e-3


@pytest.mark.parametrize("start", [0, START])
def test_states_after_a_stop(monkeypatch: pytest.MonkeyPatch, family_model: Any, start: int) -> None:
    tokens, site = random_tokens(batch=3, width=WIDTH), Site(2, "resid")
    with torch.no_grad():
        whole = family_model.run(tokens, read=[Site(0, "resid"), site], cache=True)
    resid = whole[Site(0, "resid")][:, start:]
    kept = resid.clone()
    quick, slow = both_ways(
        monkeypatch,
        family_model,
        Tokens(tokens.ids[:, start:], tokens.mask[:, start:]),
        read=[site],
        resume=Resume(1, resid),
        stop_after=2,
        prefix=whole.prefix.take(torch.arange(3), start, 1, 2) if start else None,
    )
    torch.testing.assert_close(quick[site], slow[site], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quick[site], whole[site][:, start:], rtol=1e-5, atol=1e-5)
    assert torch.equal(resid, kept), "the state that is resumed from was written over"


def test_padding_and_gradients_go_the_other_way(family_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lean_run(*given: Any) -> Run:
        raise AssertionError("taken")

    monkeypatch.setattr(backbone, "lean_run", lean_run)
    tokens, site = random_tokens(batch=2), Site(0, "resid")
    with torch.no_grad():
        resume = Resume(1, family_model.run(tokens, read=[site])[site])
        with pytest.raises(AssertionError, match="taken"):
            family_model.run(tokens, resume=resume, keep=torch.tensor([6]))
        padded = Tokens(tokens.ids, tokens.mask.clone().index_fill(1, torch.tensor([6]), 0))
        family_model.run(padded, resume=resume, keep=torch.tensor([5]))
        family_model.run(tokens, read=[Site(1, "mlp_key")], resume=resume, keep=torch.tensor([6]))
    family_model.run(tokens, resume=resume, keep=torch.tensor([6]))
