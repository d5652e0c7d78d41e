"""Properties of single families: windows, scales, caps; and that tracing works with them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.models import BACKENDS, SHAPES, VOCAB, hook_state, random_hf
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from mechedit import Fact, InputError, TraceConfig
from mechedit.models import EMBED, Patch, Resume, Site, Tokens, load_model
from mechedit.models.families import FAMILIES
from mechedit.trace import run_clean_and_corrupted, tokenize_fact
from mechedit.trace.config import PART_OF_KIND
from mechedit.trace.restore import Cell, CellBatch, restore_cells, sever_patches
from mechedit.trace.runs import slice_patch

WINDOWED = ("gpt_neo", "mistral", "qwen2", "gemma2", "gemma3", "phi3")
# test_trace has GPT-2.
TRACED = (*WINDOWED, "qwen3", "gemma", "olmo2")
FACT = Fact(id="f", subject="Leon Blum", prompt="The mother tongue of {} is the", object="Korean guitar")


def tokens_of(width: int, batch: int = 2) -> Tokens:
    ids = torch.randint(VOCAB, (batch, width), generator=torch.Generator().manual_seed(0))
    return Tokens(ids, torch.ones_like(ids))


def close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def far(result: Tensor, expected: Tensor) -> None:
    assert (result - expected).abs().max() > 1e-2


def test_every_family_has_a_shape_that_the_tests_run_on() -> None:
    model_types = {random_hf(shape).config.model_type for shape in SHAPES}
    assert model_types == {family.model_type for family in FAMILIES}


@pytest.mark.parametrize("family", WINDOWED)
@torch.no_grad()
def test_a_prefix_longer_than_the_window_gives_the_same_numbers(family_model: Any, family: str, make_hf: Any) -> None:
    """A cache that keeps only what a window sees would be wrong here: the prefix is twice as long."""
    model, tokens, start = family_model, tokens_of(13), 7
    sites = [Site(layer, part) for layer in range(model.n_layers) for part in ("attn_out", "mlp_out", "resid")]
    patch = Patch(Site(0, "resid"), torch.full((2, 1), 9), torch.ones(2, 1, model.d_model))
    full = model.run(tokens, [patch], sites, use_cache=True)
    prefix = model.run(tokens, use_cache=True).kv_cache.take(torch.arange(2), start)
    later = Tokens(tokens.ids[:, start:], tokens.mask[:, start:])
    shifted_patch = Patch(patch.site, patch.positions - start, patch.value)
    for resume in (None, Resume(1, full[Site(0, "resid")][:, start:])):
        run = model.run(later, [] if resume else [shifted_patch], sites[3:], kv_cache=prefix, resume=resume)
        close(run.logits, full.logits[:, start:])
        for site in sites[3:]:
            close(run[site], full[site][:, start:])
    far(full.logits[:, start:], model.run(tokens).logits[:, start:])
    # The window is there: what lies far behind is seen otherwise by a model that has none.
    wide = make_hf(family, **{"window_size" if family == "gpt_neo" else "sliding_window": 64})
    far(wide(tokens.ids).logits[:, -1], model.run(tokens).logits[:, -1])


@pytest.mark.parametrize("family", WINDOWED)
@torch.no_grad()
def test_padding_longer_than_the_window_changes_no_real_position(family_model: Any) -> None:
    """The last padded positions see padding alone; nothing undefined may come of it."""
    model, tokens = family_model, tokens_of(12)
    mask = tokens.mask.clone()
    mask[1, 3:] = 0
    padded = model.run(Tokens(tokens.ids, mask)).logits
    assert padded.isfinite().all()
    close(padded[1:, :3], model.run(Tokens(tokens.ids[1:, :3], mask[1:, :3])).logits)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
@torch.no_grad()
def test_embed_comes_after_the_scale(family_model: Any) -> None:
    model, tokens = family_model, tokens_of(5)
    rows = model.hf.model.embed_tokens.weight[tokens.ids]
    run = model.run(tokens, read=[EMBED, Site(0, "resid"), Site(0, "attn_out"), Site(0, "mlp_out")])
    close(run[EMBED], rows * model.d_model**0.5)
    close(run[EMBED] + run[Site(0, "attn_out")] + run[Site(0, "mlp_out")], run[Site(0, "resid")])
    # What is written there is not scaled again.
    everywhere = torch.arange(5).expand(2, 5)
    close(model.run(tokens.rows(torch.tensor([1, 0])), [Patch(EMBED, everywhere, run[EMBED])]).logits, run.logits)


@pytest.mark.parametrize("family", ["gemma2"])
@torch.no_grad()
def test_caps_bind(family_model: Any, make_hf: Any) -> None:
    tokens = tokens_of(7)
    capped = family_model.run(tokens).logits
    assert capped.abs().max() < 1
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        far(make_hf("gemma2", **{cap: None})(tokens.ids).logits, capped)


@pytest.mark.parametrize("family", TRACED)
@torch.no_grad()
def test_severing_with_nothing_restored_is_the_corrupted_baseline(family_model: Any) -> None:
    config = TraceConfig(samples=3, sever=("mlp", "attn"))
    runs = run_clean_and_corrupted(family_model, [tokenize_fact(family_model, FACT)], 1.5, config, None)
    corrupted = runs.corrupted_scores["probability"]
    assert (corrupted / runs.clean_scores["probability"] - 1).abs().max() > 1e-2
    # Position 0 precedes the subject: it was never corrupted, so putting it back restores nothing.
    for sever in config.sever:
        score = restore_cells(runs, [Cell("state", sever, 0, 0, 0, 0, 1)])["probability"]
        torch.testing.assert_close(score, corrupted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", TRACED)
@torch.no_grad()
def test_restoring_from_prefix_and_residual_equals_full_runs(family_model: Any) -> None:
    config = TraceConfig(samples=3, kinds=("state", "mlp", "attn"), sever=("nothing", "mlp", "attn"))
    traced = tokenize_fact(family_model, FACT)
    runs = run_clean_and_corrupted(family_model, [traced], 1.5, config, None)
    rows, fact = torch.arange(3), torch.zeros(3, dtype=torch.long)
    position = traced.subject[-1]
    assert position > 3, "a prefix longer than the window"
    probabilities = []
    for kind, sever in [("state", "nothing"), ("state", "mlp"), ("state", "attn"), ("mlp", "attn"), ("attn", "mlp")]:
        site = Site(1, PART_OF_KIND[kind])
        cell = Cell(kind, sever, 1, 0, position, 1, 2)
        whole = dataclasses.replace(CellBatch.of(runs, [cell]), position=torch.zeros(3, dtype=torch.long))
        severed = [patch for layer in range(family_model.n_layers) for patch in sever_patches(whole, layer)]
        restored = Patch(site, torch.full((3, 1), position), runs.clean[site][fact, position, None])
        patches = [slice_patch(runs.corruption, rows, 0), *severed, restored]
        keep = torch.arange(len(traced.object_ids)) + traced.prompt_length - 1
        run = family_model.run(runs.tokens, patches, logits_to_keep=keep)
        full = runs.metric_values(run, fact)["probability"].mean(0, keepdim=True)
        fast = restore_cells(runs, [cell])["probability"]
        torch.testing.assert_close(fast, full, rtol=1e-4, atol=0)
        probabilities.append(float(fast))
    assert max(probabilities) / min(probabilities) > 1 + 1e-2, "restorations must differ, else equality says nothing"


@torch.no_grad()
def test_a_cap_that_one_backend_knows_and_the_other_does_not_is_refused(make_hf: Any, tokenizer: Any) -> None:
    """Gemma 3 in transformers has no cap on attention, whatever its config says; TransformerLens's has."""
    hf = make_hf("gemma3", attn_logit_softcapping=2.0)
    with pytest.raises(InputError, match=r"transformer_lens.*gives the model's own logits"):
        load_model(hf, tokenizer=tokenizer)
    model, tokens = load_model(hf, tokenizer=tokenizer, backend="nnsight"), tokens_of(7)
    logits = model.run(tokens).logits
    close(logits, hf(tokens.ids, attention_mask=tokens.mask, use_cache=False).logits)


def test_attention_that_looks_ahead_is_refused(make_hf: Any, tokenizer: Any, backend: str) -> None:
    """Prefixes are reused because nothing there depends on what comes later."""
    hf = make_hf("gemma3", use_bidirectional_attention=True)
    with pytest.raises(InputError, match=r"no position sees a later one.*not causal"):
        load_model(hf, tokenizer=tokenizer, backend=backend)


def test_loading_leaves_the_attention_of_the_callers_model_alone(make_hf: Any, tokenizer: Any) -> None:
    """TransformerLens computes some families' attention step by step, but only in its copy."""
    for shape in ("qwen3", "gemma3", "olmo2"):
        hf = make_hf(shape)
        before = (hook_state(hf), hf.config.to_dict(), hf.config._attn_implementation)
        load_model(hf, tokenizer=tokenizer).run(tokens_of(5))
        assert (hook_state(hf), hf.config.to_dict(), hf.config._attn_implementation) == before
        assert before[2] == "sdpa"


def test_the_language_model_inside_a_model_of_text_and_images(make_hf: Any, tokenizer: Any, tmp_path: Any) -> None:
    """It is found in place, and gives what the language model alone gives."""
    text = make_hf("gemma3").config
    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config={**small, "intermediate_size": 16, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_id=VOCAB - 1,
    )
    both = Gemma3ForConditionalGeneration(config).eval()
    both.save_pretrained(tmp_path)
    alone = Gemma3ForCausalLM(both.config.text_config)
    alone.model, alone.lm_head = both.model.language_model, both.lm_head
    tokens = tokens_of(7)
    assert not (tokens.ids == config.image_token_id).any()
    with torch.no_grad():
        expected = both(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False).logits
    sites = [Site(1, part) for part in ("attn_out", "mlp_key", "mlp_out", "resid")]
    for backend in BACKENDS:
        within = load_model(tmp_path, tokenizer=tokenizer, backend=backend, device="cpu").run(tokens, read=sites)
        run = load_model(alone, tokenizer=tokenizer, backend=backend).run(tokens, read=sites)
        close(run.logits, expected)
        close(within.logits, expected)
        for site in sites:
            close(within[site], run[site])
