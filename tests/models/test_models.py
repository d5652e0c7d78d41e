"""Both backends, on every family, do what plain torch hooks do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.models import BACKENDS, VOCAB, CountedProducts, hook_state, without_fast_engine
from helpers.patches import random_patch, random_tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

from mechedit.batching import pad
from mechedit.errors import InputError
from mechedit.models import EMBED, KVCache, Patch, Resume, Site, Tokens, load_model

LLAMA_PATHS = ("model.embed_tokens", "model.layers", "self_attn", "mlp.down_proj")
# The test's own idea of where things are: embedding, blocks, attention, down-projection.
PATHS = {
    "gpt2": ("transformer.wte", "transformer.h", "attn", "mlp.c_proj"),
    "gpt2_square": ("transformer.wte", "transformer.h", "attn", "mlp.c_proj"),
    "gpt_neo": ("transformer.wte", "transformer.h", "attn", "mlp.c_proj"),
    "gptj": ("transformer.wte", "transformer.h", "attn", "mlp.fc_out"),
    "neox": ("gpt_neox.embed_in", "gpt_neox.layers", "attention", "mlp.dense_4h_to_h"),
    "pythia": ("gpt_neox.embed_in", "gpt_neox.layers", "attention", "mlp.dense_4h_to_h"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2"), LLAMA_PATHS),
}
# Norms between what attention and MLP compute and the residual stream.
POST_NORMS = dict.fromkeys(("gemma2", "gemma3", "olmo2"), ("post_attention_layernorm", "post_feedforward_layernorm"))


def all_sites(model: Any) -> list[Site]:
    parts = ("attn_out", "mlp_key", "mlp_out", "resid")
    return [EMBED, *(Site(layer, part) for layer in range(model.n_layers) for part in parts)]


def naive_run(
    hf: Any, family: str, tokens: Tokens, patches: Sequence[Patch] = (), read: Sequence[Site] = ()
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Torch hooks that write one vector at a time."""
    embedding, blocks, attention, down = PATHS[family]
    adds_attention, adds_mlp = POST_NORMS.get(family, (attention, "mlp"))
    values: dict[Site, Tensor] = {}

    def visit(site: Site, activation: Tensor) -> Tensor:
        activation = activation.clone()
        for patch in (p for p in patches if p.site == site):
            for row, positions in enumerate(patch.positions.tolist()):
                for slot, position in enumerate(positions):
                    if position >= 0:
                        activation[row, position] = patch.value[row, slot]
        values[site] = activation
        return activation

    def on_output(site: Site) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (visit(site, output[0]), *output[1:])
            return visit(site, output)

        return hook

    def on_input(site: Site) -> Any:
        return lambda module, args: (visit(site, args[0]), *args[1:])

    handles = [hf.get_submodule(embedding).register_forward_hook(on_output(EMBED))]
    for layer, block in enumerate(hf.get_submodule(blocks)):
        handles += [
            block.get_submodule(adds_attention).register_forward_hook(on_output(Site(layer, "attn_out"))),
            block.get_submodule(down).register_forward_pre_hook(on_input(Site(layer, "mlp_key"))),
            block.get_submodule(adds_mlp).register_forward_hook(on_output(Site(layer, "mlp_out"))),
            block.register_forward_hook(on_output(Site(layer, "resid"))),
        ]
    try:
        logits = hf(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, {site: values[site] for site in read}


def close(result: Tensor | None, expected: Tensor | None) -> None:
    assert result is not None
    assert expected is not None
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def far(result: Tensor | None, expected: Tensor | None) -> None:
    """The effect that a test is about must be there to be found."""
    assert result is not None
    assert expected is not None
    assert (result - expected).abs().max() > 1e-2


def many_patches(model: Any) -> list[Patch]:
    """Every part, two patches on one site, rows with different numbers of positions; batch of two."""
    return [
        random_patch(model, EMBED, [[1, 2], [3, -1]], seed=1),
        random_patch(model, Site(0, "mlp_out"), [[0, 4], [1, 2]], seed=2),
        random_patch(model, Site(1, "attn_out"), [[-1], [4]], seed=3),
        random_patch(model, Site(1, "mlp_key"), [[5, 0], [-1, 6]], seed=4),
        random_patch(model, Site(1, "resid"), [[2, 3], [2, 5]], seed=5),
        random_patch(model, Site(1, "resid"), [[3], [-1]], seed=6),
        random_patch(model, Site(2, "mlp_out"), [[6], [6]], seed=7),
    ]


def test_reads_are_what_plain_hooks_see(family_model: Any, family: str) -> None:
    tokens, sites = random_tokens(batch=3), all_sites(family_model)
    run = family_model.run(tokens, read=sites)
    logits, values = naive_run(family_model.hf, family, tokens, read=sites)
    close(run.logits, logits)
    assert list(run.values) == sites
    for site in sites:
        close(run[site], values[site])
        assert run[site].std() > 1e-3
    with torch.no_grad():
        plain = family_model.hf(tokens.ids, attention_mask=tokens.mask, use_cache=False).logits
    close(run.logits, plain)


def test_patches_do_what_plain_hooks_do(family_model: Any, family: str) -> None:
    tokens, patches = random_tokens(), many_patches(family_model)
    sites = all_sites(family_model)
    run = family_model.run(tokens, patches, sites)
    logits, values = naive_run(family_model.hf, family, tokens, patches, sites)
    close(run.logits, logits)
    far(run.logits, family_model.run(tokens).logits)
    for site in sites:
        close(run[site], values[site])


def test_without_gradients_a_run_writes_in_place_and_gives_the_same(family_model: Any) -> None:
    tokens, patches, sites = random_tokens(), many_patches(family_model), all_sites(family_model)
    run = family_model.run(tokens, patches, sites, logits_to_keep=torch.tensor([6]))
    before = [patch.value.clone() for patch in patches]
    with torch.no_grad():
        for _ in range(2):  # nothing that a run keeps or was given may be written over
            again = family_model.run(tokens, patches, sites, logits_to_keep=torch.tensor([6]))
            close(again.logits, run.logits)
            for site in sites:
                close(again[site], run[site])
            alone = family_model.run(tokens, patches, logits_to_keep=torch.tensor([6]))
            close(alone.logits, run.logits)
            far(family_model.run(tokens, logits_to_keep=torch.tensor([6])).logits, run.logits)
    for patch, value in zip(patches, before, strict=True):
        assert torch.equal(patch.value, value)


def test_runs_without_hooks_equal_the_backends(family_model: Any, family: str) -> None:
    """Full, resumed and stopped runs, with keys and values cached and reused."""
    tokens, last = random_tokens(batch=3), Site(1, "resid")
    seen = family_model.run(tokens, read=all_sites(family_model), use_cache=True)
    with torch.no_grad():
        bare = family_model.run(tokens, use_cache=True)
        close(bare.logits, seen.logits)
        close(family_model.run(tokens, read=[last], stop_after=1)[last], seen[last])
        resume = Resume(1, seen[Site(0, "resid")])
        close(
            family_model.run(tokens, logits_to_keep=torch.tensor([6, 2]), resume=resume).logits, seen.logits[:, [6, 2]]
        )
        later = Tokens(tokens.ids[:, 3:], tokens.mask[:, 3:])
        with CountedProducts(family_model) as products:
            run = family_model.run(
                later,
                read=[last],
                resume=Resume(1, seen[Site(0, "resid")][:, 3:]),
                stop_after=1,
                kv_cache=bare.kv_cache.take(torch.arange(3), 3, 1, 1),
            )
        assert products.calls == {1: 1}
        close(run[last], seen[last][:, 3:])
        far(family_model.run(tokens, read=[last], resume=Resume(1, seen[last]), stop_after=1)[last], seen[last])


def test_each_patch_matters_and_order_does_not(small_model: Any) -> None:
    tokens, patches = random_tokens(), many_patches(small_model)
    logits = small_model.run(tokens, patches).logits
    # The two on one site (4, 5) keep their order: the later one is written last.
    shuffled = [patches[i] for i in (6, 4, 2, 0, 5, 3, 1)]
    close(small_model.run(tokens, shuffled).logits, logits)
    far(small_model.run(tokens, [patches[i] for i in (0, 1, 2, 3, 5, 4, 6)]).logits, logits)
    for dropped in range(len(patches)):
        far(small_model.run(tokens, patches[:dropped] + patches[dropped + 1 :]).logits, logits)


@torch.no_grad()
def test_a_window_is_how_far_back_a_token_sees(family_model: Any) -> None:
    tokens = random_tokens(width=12)
    entering = family_model.run(tokens, read=[Site(0, "resid")])[Site(0, "resid")]
    changed = torch.cat([entering[:, :1].flip(-1), entering[:, 1:]], 1)
    before, after = (
        family_model.run(tokens, read=[Site(1, "resid")], resume=Resume(1, resid), stop_after=1)[Site(1, "resid")]
        for resid in (entering, changed)
    )
    felt = ((before - after).abs().amax((0, 2)) > 1e-6).tolist()
    window = family_model.window(1)
    assert felt == [window is None or position < window for position in range(12)]


def test_gradients_reach_the_patch(family_model: Any, family: str) -> None:
    tokens = random_tokens()
    patches = [many_patches(family_model)[i] for i in (0, 3, 4)]
    leaves = [patch.value.requires_grad_() for patch in patches]
    direction = torch.randn(2, 7, VOCAB, generator=torch.Generator().manual_seed(9))
    run = family_model.run(tokens, patches, [Site(2, "resid")])
    expected, values = naive_run(family_model.hf, family, tokens, patches, [Site(2, "resid")])
    last = Site(2, "resid")
    pairs = ((run.logits * direction, expected * direction), (run[last], values[last]))
    for result, naive in pairs:
        ours = torch.autograd.grad(result.sum(), leaves, retain_graph=True)
        theirs = torch.autograd.grad(naive.sum(), leaves, retain_graph=True)
        for our, their in zip(ours, theirs, strict=True):
            assert their.abs().max() > 1e-2
            torch.testing.assert_close(our, their, atol=1e-4, rtol=1e-4)
        # A slot of −1 is not written, so nothing depends on it.
        assert not ours[0][1, 1].any()
    with torch.no_grad():
        assert not family_model.run(tokens, patches).logits.requires_grad
    assert not family_model.run(tokens).logits.requires_grad


def test_resuming_equals_the_full_run(family_model: Any, family: str) -> None:
    tokens = random_tokens(batch=3)
    patches = [random_patch(family_model, Site(2, "mlp_key"), [[1], [-1], [6]])]
    reads = [site for site in all_sites(family_model) if site.part != "embed" and site.layer >= 1]
    full = family_model.run(tokens, patches, [Site(0, "resid"), *reads])
    with CountedProducts(family_model) as products:
        resumed = family_model.run(tokens, patches, reads, resume=Resume(1, full[Site(0, "resid")]))
    assert products.calls == dict.fromkeys(range(1, family_model.n_layers), 1)
    close(resumed.logits, full.logits)
    for site in reads:
        close(resumed[site], full[site])
    # Another residual gives another result, and afterwards nothing is left of either.
    far(family_model.run(tokens, patches, resume=Resume(1, full[Site(1, "resid")])).logits, full.logits)
    with CountedProducts(family_model) as products:
        close(family_model.run(tokens, patches).logits, full.logits)
    assert products.calls == dict.fromkeys(range(family_model.n_layers), 1)


def test_a_prefix_stands_for_its_positions(family_model: Any, family: str) -> None:
    """Nothing before position 3 is patched: those positions need not be computed again, at any layer."""
    tokens = random_tokens(batch=3)
    patches = [
        random_patch(family_model, EMBED, [[4], [3], [-1]], seed=1),
        random_patch(family_model, Site(1, "mlp_key"), [[5, 3], [-1, -1], [6, 4]], seed=2),
    ]
    reads = all_sites(family_model)
    full = family_model.run(tokens, patches, reads, logits_to_keep=torch.tensor([5, 6]))
    base = family_model.run(tokens, read=[Site(0, "resid")], use_cache=True)
    assert base.kv_cache.length == 7
    prefix = base.kv_cache.take(torch.arange(3), 3)
    later = Tokens(tokens.ids[:, 3:], tokens.mask[:, 3:])
    shifted = [Patch(p.site, torch.where(p.positions < 0, -1, p.positions - 3), p.value) for p in patches]
    for _ in range(2):  # a run must not use the prefix up
        run = family_model.run(later, shifted, reads, logits_to_keep=torch.tensor([2, 3]), kv_cache=prefix)
        close(run.logits, full.logits)
        for site in reads:
            close(run[site], full[site][:, 3:])
    assert run.final_cache is None
    with pytest.raises(ValueError, match="no KV cache"):
        _ = run.kv_cache
    # With blocks skipped as well; and another row's prefix gives something else.
    resume = Resume(1, base[Site(0, "resid")][:, 3:])
    both = family_model.run(later, shifted[1:], resume=resume, kv_cache=prefix)
    close(both.logits, family_model.run(tokens, patches[1:]).logits[:, 3:])
    wrong = base.kv_cache.take(torch.tensor([1, 2, 0]), 3)
    far(family_model.run(later, shifted, kv_cache=wrong).logits[:, 2:], full.logits)
    with pytest.raises(ValueError, match="the KV cache has"):
        family_model.run(later, kv_cache=base.kv_cache.take(torch.arange(2), 3))


def test_rows_may_begin_at_positions_of_their_own(family_model: Any) -> None:
    """With its own prefix cached, each row runs on from its own start, also one that has none."""
    tokens, starts = random_tokens(batch=3), torch.tensor([4, 2, 0])
    full = family_model.run(tokens, read=[Site(1, "resid")], use_cache=True)
    base = family_model.run(tokens, read=[Site(0, "resid")])[Site(0, "resid")]
    rows = [torch.arange(int(start), 7) for start in starts]
    later = pad([tokens.ids[i, row].tolist() for i, row in enumerate(rows)], family_model.tokenizer)
    resid = torch.stack([torch.cat([base[i, row], base[i, :4][: 7 - len(row)]]) for i, row in enumerate(rows)])
    for resume, first in ((None, 0), (Resume(1, resid), 1)):
        run = family_model.run(
            later, read=[Site(1, "resid")], resume=resume, kv_cache=full.kv_cache.before(starts, first)
        )
        for i, row in enumerate(rows):
            close(run.logits[i, : len(row)], full.logits[i, row])
            close(run[Site(1, "resid")][i, : len(row)], full[Site(1, "resid")][i, row])
    # Counted as if all rows had the longest prefix, positions (or what is empty before a row) would be wrong.
    full_cache = full.kv_cache.before(starts)
    far(family_model.run(later, kv_cache=KVCache(full_cache.layers)).logits[1, :2], full.logits[1, 2:4])


def test_a_cache_before_ends_holds_each_rows_own_positions(family_model: Any) -> None:
    """Of chosen rows, in any order and more than once, and again of a cache whose rows are of several lengths."""
    cache = family_model.run(random_tokens(batch=3), use_cache=True).kv_cache
    index, ends = torch.tensor([2, 0, 2, 1]), torch.tensor([4, 0, 3, 5])
    chosen = cache.before(ends, index=index)
    again = chosen.before(ends - (ends > 3).long(), 1, 1, torch.arange(4))
    for layer in (0, 1):
        for source, first, second in zip(cache.layers[layer], chosen.layers[layer], again.layers[layer], strict=True):
            for row, (origin, end) in enumerate(zip(index.tolist(), ends.tolist(), strict=True)):
                assert torch.equal(first[row, :, 5 - end :], source[origin, :, :end])
                shorter = end - (end > 3)
                if layer == 1:
                    assert torch.equal(second[row, :, 4 - shorter :], source[origin, :, :shorter])
    assert torch.equal(chosen.mask.sum(1), ends)
    assert again.layers[0][0].untyped_storage().nbytes() < again.layers[1][0].untyped_storage().nbytes(), "unused"


def test_stopping_gives_the_same_reads(family_model: Any, family: str) -> None:
    tokens, patches = random_tokens(), many_patches(family_model)
    reads = [site for site in all_sites(family_model) if site.layer <= 1]
    full = family_model.run(tokens, patches, reads)
    for sites in (reads, reads[:1], []):
        with CountedProducts(family_model) as products:
            run = family_model.run(tokens, patches, sites, stop_after=1)
        assert products.calls == {0: 1, 1: 1}
        assert run.final_logits is None
        with pytest.raises(ValueError, match="no logits: it was stopped early"):
            _ = run.logits
        assert list(run.values) == sites
        for site in sites:
            close(run[site], full[site])
    resume = Resume(1, full[Site(0, "resid")])
    both = family_model.run(tokens, patches[2:-1], [Site(1, "resid")], resume=resume, stop_after=1)
    close(both[Site(1, "resid")], full[Site(1, "resid")])
    close(family_model.run(tokens, patches).logits, full.logits)


def test_right_padding_changes_no_real_position(family_model: Any) -> None:
    tokens, sites = random_tokens(), all_sites(family_model)
    mask = tokens.mask.clone()
    mask[1, 4:] = 0
    padded = family_model.run(Tokens(tokens.ids, mask), read=sites)
    alone = family_model.run(Tokens(tokens.ids[1:, :4], mask[1:, :4]), read=sites)
    close(padded.logits[1:, :4], alone.logits)
    close(padded.logits[:1], family_model.run(tokens.rows(slice(0, 1))).logits)
    for site in sites:
        close(padded[site][1:, :4], alone[site])


def test_rows_keep_positions_of_their_own(family_model: Any) -> None:
    tokens = random_tokens()
    logits = family_model.run(tokens).logits
    positions = torch.tensor([[5, 0], [3, 6]])
    close(family_model.run(tokens, logits_to_keep=positions).logits, logits.take_along_dim(positions[..., None], 1))
    assert not torch.allclose(logits[:, [5, 0]], logits.take_along_dim(positions[..., None], 1), atol=1e-3)
    for wrong in ([[5, 5], [3, 6]], [[5, 7], [3, 6]], [[5, 0]]):
        with pytest.raises(ValueError, match="rows of different ones below 7"):
            family_model.run(tokens, logits_to_keep=torch.tensor(wrong))


def test_gradients_reach_patches_through_kept_positions(family_model: Any) -> None:
    tokens, site = random_tokens(), Site(0, "resid")
    value = torch.randn(2, 1, family_model.d_model, generator=torch.Generator().manual_seed(0), requires_grad=True)
    patch = Patch(site, torch.tensor([[1], [2]]), value, add=True)
    positions = torch.tensor([[5, 2], [3, 6]])

    def slope(keep: Any) -> Tensor:
        logits = family_model.run(tokens, [patch], logits_to_keep=keep).logits
        logits = logits if keep is positions else logits.take_along_dim(positions[..., None], 1)
        return torch.autograd.grad(logits[..., :9].log_softmax(-1).sum(), value)[0]

    close(slope(positions), slope(0))
    assert slope(positions).norm() > 0.01


def test_patches_may_add(family_model: Any) -> None:
    tokens = random_tokens()
    clean = family_model.run(tokens, read=all_sites(family_model))
    for site in all_sites(family_model):
        patch = random_patch(family_model, site, [[1, 4], [2, -1]])
        there = clean[site].take_along_dim(patch.positions.clamp(min=0)[..., None], 1)
        added = family_model.run(tokens, [Patch(site, patch.positions, patch.value, add=True)]).logits
        close(added, family_model.run(tokens, [Patch(site, patch.positions, there + patch.value)]).logits)
        assert not torch.allclose(added, family_model.run(tokens, [patch]).logits, atol=1e-5)


def test_keep_picks_positions(family_model: Any) -> None:
    tokens = random_tokens()
    logits = family_model.run(tokens).logits
    positions = torch.tensor([5, 0])
    close(family_model.run(tokens, logits_to_keep=positions).logits, logits[:, positions])
    far(logits[:, 5], logits[:, 0])


def test_restoring_all_states_of_a_layer_restores_the_output(family_model: Any) -> None:
    tokens, everywhere = random_tokens(), torch.arange(7).expand(2, 7)
    sites = [Site(layer, "resid") for layer in range(family_model.n_layers)]
    noise = random_patch(family_model, EMBED, [[1, 2], [2, 3]])
    clean = family_model.run(tokens, read=sites)
    corrupted = family_model.run(tokens, [noise], sites)
    far(corrupted.logits, clean.logits)
    for site in sites:
        restored = family_model.run(tokens, [noise, Patch(site, everywhere, clean[site])], sites)
        close(restored.logits, clean.logits)
        for later in sites:
            close(restored[later], (corrupted if later.layer < site.layer else clean)[later])


def test_an_edit_in_place_is_seen_everywhere(make_hf: Any, tokenizer: Any, family: str) -> None:
    hf, tokens = make_hf(family), random_tokens()
    models = [load_model(hf, tokenizer=tokenizer, backend=backend) for backend in BACKENDS]
    key, out = Site(1, "mlp_key"), Site(1, "mlp_out")
    before = models[0].run(tokens, read=[key, out])
    block = hf.get_submodule(PATHS[family][1])[1]
    with torch.no_grad():
        projected = block.get_submodule(PATHS[family][3])(before[key])
    norm = block.get_submodule(POST_NORMS[family][1]) if family in POST_NORMS else lambda x: x
    close(before[out], norm(projected))
    hashes = {model.weights_hash() for model in models}
    assert len(hashes) == 1
    view = models[0].projection(1)
    assert view.shape == (models[0].d_mlp, models[0].d_model)
    delta = 0.1 * torch.randn(view.shape, generator=torch.Generator().manual_seed(3))
    view += delta
    with torch.no_grad():
        expected = hf(tokens.ids, attention_mask=tokens.mask).logits
    far(expected, before.logits)
    for model in models:
        run = model.run(tokens, read=[key, out])
        close(run[out], norm(projected + before[key] @ delta))
        close(run.logits, expected)
        close(model.projection(1), view)
        assert model.weights_hash() not in hashes


def test_a_wrapped_model_saves_and_reloads(make_hf: Any, tokenizer: Any, family: str, tmp_path: Any) -> None:
    hf, tokens = make_hf(family), random_tokens()
    names = list(hf.state_dict())
    models = [load_model(hf, tokenizer=tokenizer, backend=backend) for backend in BACKENDS]
    models[1].projection(0).mul_(1.5)
    hf.save_pretrained(tmp_path)
    assert list(hf.state_dict()) == names
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    reloaded, report = loaded
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        close(reloaded(tokens.ids, attention_mask=tokens.mask).logits, models[0].run(tokens).logits)
    assert hf.generate(tokens.ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 9)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(small_model: Any, error: type[BaseException]) -> None:
    tokens, sites = random_tokens(), all_sites(small_model)
    clean = small_model.run(tokens, read=sites)

    def fail(*_: Any) -> None:
        raise error("stop here")

    handle = small_model.hooked_copy.get_submodule(small_model.family.blocks)[2].register_forward_pre_hook(fail)
    state = hook_state(small_model.hooked_copy)
    patches = [random_patch(small_model, Site(1, "mlp_key"), [[1], [2]])]
    with without_fast_engine(small_model), pytest.raises(error, match="stop here"):
        small_model.run(tokens, patches, [Site(2, "resid")], resume=Resume(1, clean[Site(0, "resid")]))
    assert hook_state(small_model.hooked_copy) == state
    handle.remove()
    with CountedProducts(small_model) as products:
        close(small_model.run(tokens).logits, clean.logits)
    assert products.calls == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"read": [Site(3, "resid")]}, "outside the model"),
        ({"read": [Site(1, "embed")]}, "outside the model"),
        ({"read": [Site(2, "resid")], "stop_after": 1}, "cannot be read"),
        ({"stop_after": 3}, "expected a layer from 0 to 2"),
        ({"resume": Resume(0, torch.zeros(2, 7, 32))}, "cannot resume"),
        ({"resume": Resume(1, torch.zeros(1, 7, 32))}, "residual to resume from"),
        ({"resume": Resume(1, torch.zeros(2, 7, 32)), "read": [EMBED]}, "not computed"),
        ({"resume": Resume(2, torch.zeros(2, 7, 32)), "stop_after": 1}, "from 2 to 2"),
        ({"patches": [Patch(EMBED, torch.tensor([[7], [0]]), torch.zeros(2, 1, 32))]}, "outside −1 to 6"),
        ({"patches": [Patch(EMBED, torch.tensor([[0]]), torch.zeros(1, 1, 32))]}, "1 rows, expected 2"),
        ({"patches": [Patch(EMBED, torch.tensor([[0], [0]]), torch.zeros(2, 1, 31))]}, "expected (2, 1, 32)"),
        ({"patches": [Patch(EMBED, torch.tensor([[0, 0], [0, 1]]), torch.zeros(2, 2, 32))]}, "twice"),
    ],
)
def test_impossible_runs_are_refused(small_model: Any, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match.replace("(", r"\(").replace(")", r"\)")):
        small_model.run(random_tokens(), **arguments)


def test_states_after_the_last_block_unembed_to_the_logits(family_model: Any) -> None:
    tokens = random_tokens()
    last = Site(family_model.n_layers - 1, "resid")
    with torch.no_grad():
        run = family_model.run(tokens, read=[last])
    close(family_model.unembed(run[last][:, 4]), run.logits[:, 4])
    far(family_model.unembed(run[last][:, 3]), run.logits[:, 4])


def test_the_hash_outside_blocks_sees_only_what_lies_outside(lens_model: Any) -> None:
    def hashes() -> tuple[str, str]:
        return lens_model.weights_hash(), lens_model.weights_hash(blocks=False)

    start = hashes()
    with torch.no_grad():
        lens_model.projection(1).mul_(2)
    edited = hashes()
    assert edited[0] != start[0]
    assert edited[1] == start[1] != start[0]
    with torch.no_grad():
        lens_model.hf.transformer.ln_f.bias.add_(1)
    assert hashes()[1] != start[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_deep_copy_is_made_of_the_transformers_model(lens_model: Any, copied: Any) -> None:
    with pytest.raises(InputError, match=r"expected its transformers model: load_model\(copy.deepcopy\("):
        copied(lens_model)
    assert copied(lens_model.hf) is not None, "the control"
    assert copy.copy(lens_model).hf is lens_model.hf
