"""A run that ends before the unembedding returns what the unembedding would have multiplied, on every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import hook_state, random_hf
from helpers.patches import random_patch, random_tokens
from torch import Tensor

from benchmarks.families.small_models import small_model
from benchmarks.families.steps import word_tokenizer
from mechedit.models import Patch, Resume, Site, Tokens, load_model

WIDTH = 7


def logits_of(model: Any, head_inputs: Tensor) -> Tensor:
    """The unembedding's own product, and the cap that the config states."""
    logits = model.hf.get_output_embeddings()(head_inputs)
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize(
    "keep", [0, 2, torch.tensor([4, 1]), torch.tensor([[3, 6], [0, 1], [5, 2]])], ids=["all", "last", "same", "per_row"]
)
@pytest.mark.parametrize("read", [(), (Site(1, "mlp_out"), Site(2, "resid"))], ids=["unread", "read"])
@torch.no_grad()
def test_their_product_with_the_unembedding_is_the_logits(family_model: Any, keep: Any, read: tuple[Site, ...]) -> None:
    tokens, before = random_tokens(batch=3, width=WIDTH), hook_state(family_model.hooked_copy)
    full = family_model.run(tokens, read=read, logits_to_keep=keep)
    short = family_model.run(tokens, read=read, logits_to_keep=keep, unembed=False)
    torch.testing.assert_close(logits_of(family_model, short.head_inputs), full.logits, atol=1e-5, rtol=1e-5)
    assert full.logits.std() > 0.1, "logits must differ for this to say anything"
    assert set(short.values) == set(read)
    assert hook_state(family_model.hooked_copy) == before
    with pytest.raises(ValueError, match="ended before the unembedding"):
        _ = short.logits
    with pytest.raises(ValueError, match="unembed=False"):
        _ = full.head_inputs


def test_a_cap_on_logits_matters_here() -> None:
    model = load_model(random_hf("gemma2"), tokenizer=word_tokenizer(), backend="nnsight")
    run = model.run(random_tokens(batch=3, width=WIDTH), unembed=False)
    raw = model.hf.get_output_embeddings()(run.head_inputs)
    assert (raw - logits_of(model, run.head_inputs)).abs().max() > 0.1


def test_gradients_reach_what_is_patched(family_model: Any) -> None:
    tokens = random_tokens(batch=3, width=WIDTH)
    resid = family_model.run(tokens, read=[Site(0, "resid")])[Site(0, "resid")].detach()
    patch = random_patch(family_model, Site(1, "resid"), [[1], [-1], [0]])
    patch = Patch(patch.site, patch.positions, patch.value.requires_grad_(), add=True)
    options = {"resume": Resume(1, resid), "logits_to_keep": torch.tensor([[3], [6], [5]])}
    full = family_model.run(tokens, [patch], **options)
    short = family_model.run(tokens, [patch], **options, unembed=False)
    towards = torch.randn(full.logits.shape, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad((full.logits * towards).sum(), [patch.value])
    (gradient,) = torch.autograd.grad((logits_of(family_model, short.head_inputs) * towards).sum(), [patch.value])
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "jamba"])
@torch.no_grad()
def test_behind_a_prefix_whether_its_keys_serve_or_it_is_run_again(model_type: str, backend: str) -> None:
    model = load_model(small_model(model_type), tokenizer=word_tokenizer(), backend=backend)
    assert model.keeps_keys == (model_type == "llama")
    tokens, ends = random_tokens(batch=3, width=WIDTH), torch.tensor([3, 1, 2])
    cache = model.run(tokens, use_cache=True, unembed=False).kv_cache.before(ends)
    at = ends[:, None] + torch.arange(4)
    later = Tokens(tokens.ids.gather(1, at), torch.ones_like(at))
    keep = torch.tensor([[3], [0], [1]])
    run = model.run(later, kv_cache=cache, logits_to_keep=keep, unembed=False)
    expected = model.run(tokens).logits.take_along_dim(at.gather(1, keep)[..., None], 1)
    torch.testing.assert_close(logits_of(model, run.head_inputs), expected, atol=1e-4, rtol=1e-4)


def test_a_run_that_stops_in_a_block_has_none(family_model: Any) -> None:
    run = family_model.run(random_tokens(), stop_after=1, unembed=False)
    with pytest.raises(ValueError, match="no head inputs"):
        _ = run.head_inputs
