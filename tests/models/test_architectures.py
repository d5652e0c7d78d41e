"""Architectures that no table names: their parts are measured, and every step works on them or is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import BACKENDS, SHAPES, random_hf
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import mechedit as me
from benchmarks.families.small_models import WIDTH, small_model
from benchmarks.families.steps import Outcome, outcome_of, word_tokenizer
from benchmarks.families.table import PAGE, editable_types, page, read_results, traceable_types
from mechedit import InputError
from mechedit.models import EMBED, KVCache, Patch, Resume, Site, Tokens, UnsupportedModelError, load_model
from mechedit.models.discovery import find_family
from mechedit.models.families import FAMILIES
from mechedit.models.unsupported import CATEGORIES

ARCHETYPES = {
    "gemma3": "the language model inside a model of text and images, with norms after modules",
    "cohere": "attention and MLP side by side, behind one norm",
    "glm4": "norms before and after modules",
    "jamba": "state spaces and attention, some blocks with experts",
    "recurrent_gemma": "recurrences and attention with a window",
    "bloom": "modules that add to the residual stream themselves, a norm after the embedding, ALiBi",
    "mpt": "an MLP that adds to the residual stream itself, ALiBi, no limit of positions",
    "gpt_bigcode": "one head of keys and values for all queries",
    "falcon": "attention and MLP side by side, queries, keys and values in one matrix",
    "opt": "learned positions, an MLP that is not a module of its own and joins rows",
    "granite": "a multiplier between modules and the residual stream",
    "deepseek_v3": "latent attention, experts in all blocks but the first",
}
EXPERTS = "mixtral"


def tokens_of(width: int, batch: int = 2) -> Tokens:
    ids = torch.randint(2, 384, (batch, width), generator=torch.Generator().manual_seed(0))
    return Tokens(ids, torch.ones_like(ids))


def close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def far(result: Tensor, expected: Tensor) -> None:
    assert (result - expected).abs().max() > 1e-2


def load(model_type: str, backend: str, **changes: Any) -> Any:
    return load_model(small_model(model_type, **changes), tokenizer=word_tokenizer(), backend=backend)


@pytest.mark.parametrize(
    ("model_type", "backend"),
    [(model_type, BACKENDS[number % 2]) for number, model_type in enumerate(ARCHETYPES)],
)
def test_every_step_works_and_moves_something(model_type: str, backend: str) -> None:
    """Loaded, traced, severed, edited, undone, exported and reloaded; `steps` has a control for each.

    The backends take turns: `make families` takes every type through both.
    """
    assert outcome_of(model_type, backend) == Outcome(backend, True, True, True)


def test_experts_are_traced_and_severed_and_writing_is_refused(backend: str) -> None:
    outcome = outcome_of(EXPERTS, backend)
    assert (outcome.traced, outcome.severed, outcome.edited) == (True, True, False)
    assert outcome.category == "mixture of experts"
    model = load(EXPERTS, backend)
    request = me.EditRequest(id="r", subject="word2 word3", prompt="word4 {} word5", target_new="word6")
    with pytest.raises(UnsupportedModelError, match=r"down-projection of layer 1 .* mixture of experts.*trace it"):
        me.memit(model, [request], [1], moments={1: torch.eye(WIDTH)})
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        model.run(tokens_of(4), read=[Site(1, "mlp_key")])
    # Attention of the same blocks has its matrix.
    assert model.writing("attn").projection(1).shape == (WIDTH, WIDTH)


def test_blocks_without_experts_beside_blocks_with_experts_can_be_written(backend: str) -> None:
    model = load("deepseek_v3", backend)
    assert model.projection(0).shape == (model.d_mlp, WIDTH)
    with pytest.raises(UnsupportedModelError, match=r"layer 2 .* choose among layers \[0\]"):
        model.projection(2)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_measured_is_what_our_table_says(shape: str) -> None:
    hf = random_hf(shape)
    measured = find_family(hf)
    (entry,) = (family for family in FAMILIES if family.model_type == hf.config.model_type)
    names = ("blocks", "embedding", "attn", "mlp", "down", "attn_proj", "attn_norm", "mlp_norm", "tuple_items")
    assert {name: getattr(measured, name) for name in names} == {name: getattr(entry, name) for name in names}
    assert not measured.other_blocks


@pytest.mark.parametrize("model_type", ["phi", "glm4", "falcon", "starcoder2", "olmo_hybrid", "gpt_bigcode"])
def test_what_is_measured_is_what_transformer_lens_names(model_type: str) -> None:
    """Two sources that know nothing of each other: the measurement, and the adapters' component mapping."""
    model = load(model_type, "transformer_lens")
    mapping = model._engines[-1].bridge.adapter.component_mapping
    block = mapping["blocks"].submodules
    names = {block["mlp"].name: model.family.mlp, mapping["blocks"].name: model.family.blocks}
    names[mapping["embed"].name] = model.family.embedding
    names[f"{block['mlp'].name}.{block['mlp'].submodules['out'].name}"] = model.family.down
    if "attn" in block:
        attention = model.family if model_type != "olmo_hybrid" else model.family.parts(1)
        names[block["attn"].name] = attention.attn
        names[f"{block['attn'].name}.{block['attn'].submodules['o'].name}"] = attention.attn_proj
    assert len(names) >= 4
    assert all(theirs == ours for theirs, ours in names.items()), names


@pytest.mark.parametrize("model_type", ["jamba", "recurrent_gemma", "olmo_hybrid"])
@torch.no_grad()
def test_a_run_behind_a_prefix_of_a_hybrid_stack_gives_the_same_numbers(model_type: str, backend: str) -> None:
    """What is kept of the prefix is each block's input, and the prefix is run again."""
    model, tokens, start = load(model_type, backend), tokens_of(11), 6
    assert not model.keeps_keys
    sites = [Site(layer, part) for layer in range(model.n_layers) for part in ("attn_out", "mlp_out", "resid")]
    patch = Patch(Site(0, "resid"), torch.full((2, 1), 8), torch.ones(2, 1, model.d_model))
    full = model.run(tokens, [patch], sites)
    cache = model.run(tokens, use_cache=True).kv_cache
    later = Tokens(tokens.ids[:, start:], tokens.mask[:, start:])
    shifted = Patch(patch.site, patch.positions - start, patch.value)
    for resume in (None, Resume(1, full[Site(0, "resid")][:, start:])):
        run = model.run(
            later, [] if resume else [shifted], sites[3:], kv_cache=cache.take(torch.arange(2), start), resume=resume
        )
        close(run.logits, full.logits[:, start:])
        for site in sites[3:]:
            close(run[site], full[site][:, start:])
    # Rows whose prefixes end at different positions, and a cache that goes on from another one.
    ends = torch.tensor([3, 7])
    at = ends[:, None] + torch.arange(4)
    later = Tokens(tokens.ids.gather(1, at), torch.ones_like(at))
    clean = model.run(tokens)
    run = model.run(later, kv_cache=cache.before(ends), use_cache=True, logits_to_keep=torch.tensor([1, 3]))
    close(run.logits, clean.logits.take_along_dim(at[:, [1, 3], None], 1))
    # Row 0 has positions 0 to 6 by now: its last 7 of the 11 columns.
    close(
        model.run(
            Tokens(tokens.ids[:1, 7:9], tokens.mask[:1, 7:9]),
            kv_cache=KVCache(tuple((states[:1], ids[:1]) for states, ids in run.kv_cache.layers), torch.tensor([7])),
        ).logits,
        clean.logits[:1, 7:9],
    )
    far(full.logits[:, start:], clean.logits[:, start:])
    far(model.run(later).logits[:, -1], clean.logits.take_along_dim(at[:, [3], None], 1)[:, 0])


@torch.no_grad()
def test_a_multiplier_belongs_to_what_is_added(backend: str) -> None:
    """attn_out is what attention adds, and what is written there is added as it is."""
    model, tokens, layer = load("granite", backend), tokens_of(5), 1
    outputs: list[Tensor] = []
    handle = model.hf.model.layers[layer].self_attn.register_forward_hook(
        lambda module, args, out: outputs.append(out[0])
    )
    model.hf(tokens.ids, attention_mask=tokens.mask, use_cache=False)
    handle.remove()
    site, before, after = Site(layer, "attn_out"), Site(layer - 1, "resid"), Site(layer, "resid")
    run = model.run(tokens, read=[site, before, after, Site(layer, "mlp_out")])
    close(run[site], 0.4 * outputs[0])
    far(run[site], outputs[0])
    positions, value = torch.arange(5).expand(2, 5), torch.randn(2, 5, WIDTH)
    written = model.run(tokens, [Patch(site, positions, value)], [site, after, Site(layer, "mlp_out")])
    close(written[site], value)
    close(run[before] + value + written[Site(layer, "mlp_out")], written[after])
    # And what the matrix is held to give is what is added.
    keys = model.run(tokens, read=[Site(layer, "mlp_key")])[Site(layer, "mlp_key")]
    close(model.module_output(layer, keys), run[Site(layer, "mlp_out")])


@torch.no_grad()
def test_the_embedding_may_be_scaled_and_normed_behind_its_module(backend: str) -> None:
    model, tokens = load("bloom", backend), tokens_of(5)
    run = model.run(tokens, read=[EMBED])
    close(run[EMBED], model.hf.transformer.word_embeddings(tokens.ids))
    everywhere = torch.arange(5).expand(2, 5)
    swapped = model.run(tokens.rows(torch.tensor([1, 0])), [Patch(EMBED, everywhere, run[EMBED])])
    close(swapped.logits, run.logits)


def test_why_an_architecture_is_refused() -> None:
    """The reason is measured too: each of these has other blocks than attention and an MLP on one stream."""
    cases = {
        "bart": ("norm on the residual stream", "final_layer_norm"),
        "mamba": ("no MLP of its own", "add 'mixer' alone"),
        "hrm_text": ("blocks that do not add up", "more than once"),
        "deepseek_v4": ("several residual streams", "an axis more"),
    }
    for model_type, (category, reason) in cases.items():
        with pytest.raises(UnsupportedModelError, match=reason) as caught:
            find_family(small_model(model_type))
        assert caught.value.category == category


def test_a_backend_that_has_no_adapter_is_refused_and_the_other_works() -> None:
    hf, tokenizer = small_model("biogpt"), word_tokenizer()
    with pytest.raises(UnsupportedModelError, match=r"no adapter for BioGptForCausalLM.*backend='nnsight'"):
        load_model(hf, tokenizer=tokenizer)
    assert load_model(hf, tokenizer=tokenizer, backend="nnsight").family.down == "fc2"


def test_a_model_that_fails_on_plain_text_is_refused() -> None:
    hf = small_model("phi")
    hf.model.layers[1].mlp.fc1 = nn.Linear(3, 3)
    with pytest.raises(InputError, match="does not run on ids and a mask alone"):
        find_family(hf)


def test_the_page_of_models_is_that_of_the_results() -> None:
    """The table is made by its script; README and page count alike."""
    results = read_results()
    assert set(results) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert PAGE.read_text() == page(results)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert re.findall(r"(\d+) of the (\d+) model types", readme) == [
        (str(len(editable_types(results))), str(len(results)))
    ]
    categories = {outcome["category"] for outcomes in results.values() for outcome in outcomes}
    assert categories <= {"", "no small model", "not saved whole by transformers", *CATEGORIES}, (
        "no crash, and no reason without a category"
    )
    assert len(editable_types(results)) >= 60
    assert len(traceable_types(results)) > len(editable_types(results))
    assert {backend: any(outcome["edited"] for outcomes in results.values() for outcome in outcomes
            if outcome["backend"] == backend) for backend in BACKENDS} == dict.fromkeys(BACKENDS, True)  # fmt: skip
