"""The fast engine gives what the plain engines give, through transformers' blocks, and notices where it does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.models import SHAPES, VOCAB, CountedProducts, hook_state, random_hf
from helpers.patches import random_tokens
from torch import Tensor
from transformers.models.llama import modeling_llama

from benchmarks.families.small_models import small_model
from benchmarks.families.steps import word_tokenizer
from mechedit.models import EMBED, KVCache, Patch, Resume, Run, Site, Tokens, load_model, packing
from mechedit.models.block_arguments import BlockArguments
from mechedit.models.engine_check import SWITCH
from mechedit.models.fast_engine import FastEngine
from mechedit.models.run_plan import RunPlan, plan_run
from mechedit.models.sites import PARTS

START = 4
WIDTH = 9
"""Longer than the windows of 3, and than the prefix."""
MEASURED = (
    "gemma3",
    "cohere",
    "glm4",
    "bloom",
    "mpt",
    "gpt_bigcode",
    "falcon",
    "opt",
    "granite",
    "deepseek_v3",
    "jamba",
    "mixtral",
)
"""Architectures that no table of ours names."""
CASES = [
    *((shape, "operations") for shape in SHAPES),
    *((shape, "modules") for shape in ("gpt2", "gpt_neo", "gptj", "llama", "gemma2")),
    *((f"small {model_type}", "modules") for model_type in MEASURED),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def model(request: pytest.FixtureRequest) -> Any:
    shape, way = request.param
    model_type = shape.removeprefix("small ")
    hf = random_hf(shape) if model_type == shape else small_model(model_type)
    model: Any = load_model(hf, tokenizer=word_tokenizer(), backend="nnsight")
    # A text model inside a model of images has known blocks, too.
    expected = "operations" if model_type == shape or model_type == "gemma3" else "modules"
    assert model.fast_engine.way == expected, model.fast_engine.reason
    assert model.fast_engine.prepare(way)
    return model


def both_ways(monkeypatch: pytest.MonkeyPatch, model: Any, *arguments: Any, **options: Any) -> tuple[Run, Run]:
    """The same run by the fast engine, which has to be used, and by another one, through transformers' blocks."""
    plans, run_fast = [], FastEngine.run
    with monkeypatch.context() as patched:
        patched.setattr(FastEngine, "run", lambda self, plan: plans.append(plan) or run_fast(self, plan))
        quick = model.run(*arguments, **options)
        assert len(plans) == 1
        patched.setattr(FastEngine, "can_run", lambda self, plan: False)
        slow = model.run(*arguments, **options)
        assert len(plans) == 1
    return quick, slow


def close(result: Tensor, expected: Tensor) -> None:
    """Equal up to 1e-5 of the largest number."""
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.detach().abs().max())))


def ragged(width: int = WIDTH) -> Tokens:
    """Rows of different lengths, padded at the right."""
    tokens = random_tokens(batch=3, width=width)
    return Tokens(tokens.ids, (torch.arange(width) < torch.tensor([[width], [2], [width - 3]])).long())


def parts_of(model: Any, layer: int) -> list[str]:
    """The parts of a block that can be read; a mixture of experts has no keys."""
    parts = model.family.parts(layer)
    absent = {name for name, path in (("mlp_key", parts.down), ("attn_key", parts.attn_proj)) if path is None}
    return [part for part in PARTS if part != "embed" and part not in absent]


def patch_at(model: Any, site: Site, positions: list[list[int]], *, add: bool = False, seed: int = 0) -> Patch:
    where, width = torch.tensor(positions), model.width(site)
    generator = torch.Generator().manual_seed(seed)
    return Patch(site, where, torch.randn(*where.shape, width, generator=generator), add)


@torch.no_grad()
def begun(model: Any, ends: Tensor) -> tuple[Tokens, KVCache, Tensor]:
    """Rows that go on for four positions after different ends, what came before them, and block 1's input there."""
    tokens = random_tokens(batch=len(ends), width=WIDTH)
    run = model.run(tokens, read=[Site(0, "resid")], use_cache=True)
    at = ends[:, None] + torch.arange(4)
    later = tokens.ids.take_along_dim(at, 1)
    resid = run[Site(0, "resid")].take_along_dim(at[..., None], 1)
    return Tokens(later, torch.ones_like(later)), run.kv_cache.before(ends), resid


@torch.no_grad()
def test_a_plain_run_of_padded_rows_and_the_positions_that_it_keeps(
    monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    tokens = ragged()
    real = tokens.mask.bool()
    quick, slow = both_ways(monkeypatch, model, tokens)
    close(quick.logits[real], slow.logits[real])
    for keep in (2, torch.tensor([1, 0]), torch.tensor([[8, 3], [1, 0], [5, 2]])):
        narrow, expected = both_ways(monkeypatch, model, tokens, logits_to_keep=keep)
        at = torch.tensor([7, 8]) if isinstance(keep, int) else keep
        is_real = real.gather(1, at.expand(3, -1))
        close(narrow.logits[is_real], expected.logits[is_real])
        close(narrow.logits[is_real], quick.logits.take_along_dim(at.expand(3, -1)[..., None], 1)[is_real])
        inputs, expected = both_ways(monkeypatch, model, tokens, logits_to_keep=keep, unembed=False)
        close(inputs.head_inputs[is_real], expected.head_inputs[is_real])
    assert quick.logits[real].std() > 1e-2


@torch.no_grad()
def test_reads_and_writes_at_every_part(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    tokens, last = ragged(), model.n_layers - 1
    real = tokens.mask.bool()
    sites = [EMBED, *(Site(layer, part) for layer in range(model.n_layers) for part in parts_of(model, layer))]
    patches = [patch_at(model, EMBED, [[1], [0], [-1]])]
    for layer in (1, last):
        for seed, part in enumerate(parts_of(model, layer)):
            # The residual is written where nothing else is, for it would hide what came before it there.
            places = [[6], [-1], [4]] if part == "resid" else [[seed, 5], [1, -1], [-1, 3]]
            patches.append(patch_at(model, Site(layer, part), places, add=part == "mlp_out", seed=seed))
    quick, slow = both_ways(monkeypatch, model, tokens, patches, sites)
    assert set(quick.values) == set(slow.values) == set(sites)
    for site in sites:
        close(quick[site][real], slow[site][real])
    close(quick.logits[real], slow.logits[real])
    for left_out in range(len(patches)):
        without = model.run(tokens, patches[:left_out] + patches[left_out + 1 :]).logits
        assert (without - quick.logits)[real].abs().max() > 1e-6 * quick.logits.abs().max(), patches[left_out].site


@torch.no_grad()
def test_stops_after_every_part(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    tokens = random_tokens(batch=3, width=WIDTH)
    for part in parts_of(model, 1):
        site = Site(1, part)
        quick, slow = both_ways(monkeypatch, model, tokens, read=[site], stop_after=1)
        close(quick[site], slow[site])
        assert quick.final_logits is None
        patch = patch_at(model, Site(0, "mlp_out"), [[0, 8], [1, -1], [4, -1]])
        changed, _ = both_ways(monkeypatch, model, tokens, [patch], [site], stop_after=1)
        assert (changed[site] - quick[site]).abs().max() > 1e-5


@pytest.mark.parametrize("add", [False, True], ids=["replace", "add"])
@torch.no_grad()
def test_written_logits_of_positions_that_all_rows_keep(monkeypatch: pytest.MonkeyPatch, model: Any, add: bool) -> None:
    """The last block computes the kept positions alone, and writes among them."""
    tokens, last = random_tokens(batch=3, width=WIDTH), model.n_layers - 1
    # Positions 1 and 3 are not kept.
    places = {"attn_out": [[0, 1], [-1, 3], [0, -1]], "mlp_out": [[2, 3], [2, -1], [-1, 1]], "resid": [[4], [-1], [4]]}
    patches = [patch_at(model, Site(last, part), where, add=add) for part, where in places.items()]
    keep = torch.tensor([4, 0, 2])
    quick, slow = both_ways(monkeypatch, model, tokens, patches, logits_to_keep=keep)
    close(quick.logits, slow.logits)
    for left_out in range(len(patches)):
        fewer = patches[:left_out] + patches[left_out + 1 :]
        without = model.run(tokens, fewer, logits_to_keep=keep).logits
        assert (without - quick.logits).abs().max() > 1e-5


def test_gradients_behind_prefixes_of_different_lengths(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    tokens, prefix, resid = begun(model, torch.tensor([5, 0, 2]))
    resid = resid.clone().requires_grad_()
    patch = patch_at(model, Site(1, "mlp_out"), [[1], [-1], [0]], add=True)
    patch = dataclasses.replace(patch, value=patch.value.requires_grad_())
    options = {"resume": Resume(1, resid), "kv_cache": prefix, "logits_to_keep": torch.tensor([[3, 1], [0, 2], [3, 2]])}
    quick, slow = both_ways(monkeypatch, model, tokens, [patch], **options)
    close(quick.logits, slow.logits)
    towards = torch.randn(quick.logits.shape, generator=torch.Generator().manual_seed(0))
    leaves = [resid, patch.value]
    gradients, expected = (torch.autograd.grad((run.logits * towards).sum(), leaves) for run in (quick, slow))
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(
            gradient, expected_gradient, rtol=0, atol=2e-5 * max(1.0, float(expected_gradient.abs().max()))
        )
        assert gradient.abs().max() > 1e-5
    if model.keeps_keys:
        longer = dataclasses.replace(prefix, lengths=torch.tensor([5, 1, 2]))
        further, _ = both_ways(monkeypatch, model, tokens, [patch], **{**options, "kv_cache": longer})
        assert (further.logits - quick.logits)[1].abs().max() > 1e-6, "a row's empty positions must matter here"


def test_gradients_of_padded_rows_behind_prefixes(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """What stands in place of padding has no part in anything, and gets no gradient."""
    tokens, prefix, resid = begun(model, torch.tensor([5, 0, 2]))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    real, tokens = mask.bool(), Tokens(tokens.ids, mask)
    patch = patch_at(model, Site(1, "mlp_out"), [[1, 3], [2, 0], [-1, 2]], add=True)
    for keep in (0, torch.tensor([1, 0]), torch.tensor([[3, 1], [0, 1], [2, 0]])):
        at = torch.arange(4).expand(3, -1) if isinstance(keep, int) else keep.expand(3, -1)
        leaves = [resid.clone().requires_grad_(), patch.value.clone().requires_grad_()]
        writes = [dataclasses.replace(patch, value=leaves[1])]
        options = {"resume": Resume(1, leaves[0]), "kv_cache": prefix, "logits_to_keep": keep}
        quick, slow = both_ways(monkeypatch, model, tokens, writes, **options)
        is_kept = real.gather(1, at)
        close(quick.logits[is_kept], slow.logits[is_kept])
        towards = torch.randn(quick.logits.shape, generator=torch.Generator().manual_seed(0)) * is_kept[..., None]
        gradients, expected = (torch.autograd.grad((run.logits * towards).sum(), leaves) for run in (quick, slow))
        for gradient, expected_gradient in zip(gradients, expected, strict=True):
            torch.testing.assert_close(
                gradient, expected_gradient, rtol=0, atol=2e-5 * max(1.0, float(expected_gradient.abs().max()))
            )
            assert gradient.abs().max() > 1e-5
        assert not gradients[0][~real].any()
    elsewhere = torch.where(real[..., None], resid, 7.0)
    changed = model.run(tokens, [patch], **{**options, "resume": Resume(1, elsewhere)})
    close(changed.logits[is_kept], quick.logits[is_kept].detach())
    unmasked = model.run(Tokens(tokens.ids, torch.ones_like(mask)), [patch], **options)
    close(unmasked.logits[is_kept], quick.logits[is_kept].detach())


@torch.no_grad()
def test_padding_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_model(random_hf("llama"), tokenizer=word_tokenizer(), backend="nnsight")
    assert model.skips_padding
    tokens = ragged()
    real = int(tokens.mask.sum())
    for read in ([], [Site(1, "mlp_key")]):
        with CountedProducts(model) as counts:
            model.run(tokens, read=read)
        assert set(counts.tokens.values()) == {real} != {tokens.mask.numel()}
    for keep, n_last in ((torch.tensor([[1], [0], [5]]), 3), (torch.tensor([[1, 2, 3, 4, 5, 6]]).repeat(3, 1), real)):
        with CountedProducts(model) as counts:
            model.run(tokens, logits_to_keep=keep)
        last = model.n_layers - 1
        assert counts.tokens == {**dict.fromkeys(range(last), real), last: n_last}
    # Where hardly anything is padding, moving tokens would take longer.
    monkeypatch.setattr(packing, "LEAST_PADDING", 0.5)
    model.fast_engine.prepare("operations")
    with CountedProducts(model) as counts:
        model.run(tokens)
    assert set(counts.tokens.values()) == {tokens.mask.numel()}
    for way in ("modules", "off"):
        model.fast_engine.prepare(way)
        assert not model.skips_padding


@torch.no_grad()
def test_writes_where_each_row_keeps_positions_of_its_own(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """In the last block, among the kept positions, before, between and behind them."""
    tokens, last = ragged(), model.n_layers - 1
    keep = torch.tensor([[8, 3], [1, 0], [5, 2]])
    real = tokens.mask.bool().gather(1, keep)
    bare = model.run(tokens, logits_to_keep=keep).logits
    for part in ("attn_out", "mlp_out", "resid"):
        for add in (False, True):
            patch = patch_at(model, Site(last, part), [[0, 3], [1, -1], [7, 5]], add=add)
            quick, slow = both_ways(monkeypatch, model, tokens, [patch], logits_to_keep=keep)
            close(quick.logits[real], slow.logits[real])
            changed = (quick.logits - bare).abs().amax(-1)
            assert min(changed[0, 1], changed[1, 0], changed[2, 0]) > 1e-3
            if part != "attn_out":
                assert max(changed[0, 0], changed[1, 1], changed[2, 1]) < 1e-5


@pytest.mark.parametrize(("n_keys", "spare"), [(8, 0), (9, 7), (15, 1), (16, 0), (24, 0), (27, 5)])
@torch.no_grad()
def test_keys_that_stand_for_none_change_nothing(
    monkeypatch: pytest.MonkeyPatch, model: Any, n_keys: int, spare: int
) -> None:
    """Rows behind prefixes of several lengths, over so many keys that others are put behind them."""
    ends = torch.tensor([n_keys - 4, 2, 0])
    whole = random_tokens(batch=3, width=n_keys)
    full = model.run(whole, use_cache=True)
    at = ends[:, None] + torch.arange(4)
    later = Tokens(whole.ids.take_along_dim(at, 1), torch.ones_like(at))
    masks, settled = [], BlockArguments._settled
    with monkeypatch.context() as patched:
        patched.setattr(BlockArguments, "_settled", lambda self, *a: masks.append(settled(self, *a)) or masks[-1])
        quick, slow = both_ways(monkeypatch, model, later, kv_cache=full.kv_cache.before(ends))
    close(quick.logits, slow.logits)
    close(quick.logits, full.logits.take_along_dim(at[..., None], 1))
    if model.fast_engine.way == "operations":
        counts = {mask.additive.shape[-1] - mask.spare: mask.spare for mask in masks if mask.additive is not None}
        # Behind a sliding window, fewer keys are seen.
        assert counts.get(n_keys, spare) == spare
        assert n_keys in counts or max(mask.first for mask in masks) > 0


@torch.no_grad()
def test_states_after_a_stop_behind_a_prefix(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    tokens, site = random_tokens(batch=3, width=WIDTH), Site(1, "resid")
    full = model.run(tokens, read=[Site(0, "resid"), site], use_cache=True)
    resid = full[Site(0, "resid")][:, START:]
    copy_of_resid = resid.clone()
    later = Tokens(tokens.ids[:, START:], tokens.mask[:, START:])
    options = {"read": [site], "resume": Resume(1, resid), "stop_after": 1}
    options |= {"kv_cache": full.kv_cache.take(torch.arange(3), START, 1, 1)}
    quick, slow = both_ways(monkeypatch, model, later, **options)
    close(quick[site], slow[site])
    close(quick[site], full[site][:, START:])
    assert torch.equal(resid, copy_of_resid), "the state that is resumed from was written over"
    # Other tokens and states behind the same mask: nothing of them may be remembered.
    quick, slow = both_ways(monkeypatch, model, later, **{**options, "resume": Resume(1, resid.flip(0))})
    close(quick[site], slow[site])
    assert (quick[site] - full[site][:, START:]).abs().max() > 1e-3


@torch.no_grad()
def test_the_cache_serves_a_later_run(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    tokens, prefix, _ = begun(model, torch.tensor([5, 0, 2]))
    quick, slow = both_ways(monkeypatch, model, tokens, kv_cache=prefix, use_cache=True)
    close(quick.logits, slow.logits)
    if model.keeps_keys:
        for (keys, values), (slow_keys, slow_values) in zip(quick.kv_cache.layers, slow.kv_cache.layers, strict=True):
            # Positions before a row's prefix hold anything.
            seen = quick.kv_cache.mask.bool()[:, None, :, None]
            close(keys[seen.expand_as(keys)], slow_keys[seen.expand_as(keys)])
            close(values[seen.expand_as(values)], slow_values[seen.expand_as(values)])
    assert torch.equal(quick.kv_cache.lengths, slow.kv_cache.lengths)
    tokens = random_tokens(batch=3, width=WIDTH)
    ends, at = torch.tensor([7, 1, 4]), torch.tensor([[7, 8], [1, 2], [4, 5]])
    later = Tokens(tokens.ids.take_along_dim(at, 1), torch.ones_like(at))
    behind, there = both_ways(monkeypatch, model, later, kv_cache=quick.kv_cache.before(ends))
    close(behind.logits, there.logits)
    close(behind.logits, model.run(tokens, logits_to_keep=at).logits)


def test_edits_in_place_are_seen(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    layer = next((layer for layer in range(model.n_layers) if model.family.parts(layer).down is not None), None)
    if layer is None:
        assert model.family.model_type == "mixtral"
        return
    tokens, matrix = random_tokens(batch=2, width=5), model.down_projection(layer)
    with torch.no_grad():
        before, _ = both_ways(monkeypatch, model, tokens)
        backup = matrix.clone()
        try:
            matrix.mul_(-1)
            after, slow = both_ways(monkeypatch, model, tokens)
        finally:
            matrix.copy_(backup)
    close(after.logits, slow.logits)
    assert (after.logits - before.logits).abs().max() > 1e-4


@pytest.mark.parametrize("shape", ["gpt2", "llama", "gemma2", "gptj", "olmo2"])
def test_half_precision_differs_by_its_own_rounding(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    hf = random_hf(shape).to(torch.bfloat16)
    model: Any = load_model(hf, tokenizer=word_tokenizer(), backend="nnsight")
    assert model.fast_engine.way == "operations", model.fast_engine.reason
    tokens, prefix, resid = begun(model, torch.tensor([5, 0, 2]))
    resid = resid.clone().requires_grad_()
    options = {"resume": Resume(1, resid), "kv_cache": prefix}
    quick, slow = both_ways(monkeypatch, model, tokens, **options)
    with torch.no_grad():
        exact = load_model(random_hf(shape), tokenizer=word_tokenizer(), backend="nnsight").run(
            tokens,
            resume=Resume(1, resid.float()),
            kv_cache=KVCache(tuple((k.float(), v.float()) for k, v in prefix.layers), prefix.lengths),
        )
    rounding = (slow.logits - exact.logits).norm()
    assert quick.logits.dtype == torch.bfloat16
    assert 0 < (quick.logits - exact.logits).norm() <= 1.5 * rounding
    assert (quick.logits - slow.logits).float().norm() <= 1.5 * rounding
    gradients = [torch.autograd.grad(run.logits.float().square().sum(), [resid])[0].float() for run in (quick, slow)]
    assert (gradients[0] - gradients[1]).norm() <= 0.05 * gradients[1].norm()


@torch.no_grad()
def test_a_block_that_computes_otherwise_runs_through_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_llama().fast_engine.way == "operations"
    rotate = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: rotate(q, k, cos, 1.05 * sin))
    model = load_llama()
    assert model.fast_engine.way == "modules"
    assert "operations: differs by" in model.fast_engine.reason
    quick, slow = both_ways(monkeypatch, model, random_tokens())
    close(quick.logits, slow.logits)


@torch.no_grad()
def test_blocks_that_are_given_the_tokens_run_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    run_model, attend = modeling_llama.LlamaModel.forward, modeling_llama.LlamaAttention.forward

    def with_ids(self: Any, input_ids: Tensor, **options: Any) -> Any:
        return run_model(self, input_ids=input_ids, **options, token_ids=input_ids)

    def by_ids(self: Any, hidden_states: Tensor, *args: Any, token_ids: Tensor, **options: Any) -> Any:
        return attend(self, hidden_states * (1 + token_ids[..., None] / VOCAB), *args, **options)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", with_ids)
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", by_ids)
    model = load_llama()
    assert model.fast_engine.way == "off"
    assert "modules: differs by" in model.fast_engine.reason
    tokens = random_tokens()
    close(model.run(tokens).logits, model.hf(input_ids=tokens.ids).logits)


@pytest.mark.parametrize("setting", ["plain", "modules"])
def test_the_way_can_be_chosen(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv(SWITCH, setting)
    engine = load_llama().fast_engine
    assert engine.way == {"plain": "off", "modules": "modules"}[setting]
    assert setting in engine.reason


@torch.no_grad()
def test_the_arguments_of_a_batch_are_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = load_llama(), []
    tokens = random_tokens(batch=3, width=WIDTH)
    resume = Resume(1, model.run(tokens, read=[Site(0, "resid")])[Site(0, "resid")])
    compute = modeling_llama.LlamaModel.forward
    monkeypatch.setattr(
        modeling_llama.LlamaModel, "forward", lambda self, *a, **k: calls.append(1) or compute(self, *a, **k)
    )
    for _ in range(3):
        model.run(tokens, resume=resume)
    assert not calls
    model.run(random_tokens(batch=2, width=WIDTH), resume=Resume(1, resume.resid[:2]))
    assert len(calls) == 1


@torch.no_grad()
def test_a_run_that_resumes_embeds_nothing(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    tokens, prefix, resid = begun(model, torch.tensor([3, 0, 5]))
    shape = model.hf.get_submodule(model.family.embedding).weight.shape
    embed, run, calls, by_run = torch.nn.Embedding.forward, FastEngine.run, [], []

    def counted(self: Any, ids: Tensor) -> Tensor:
        calls.append(self.weight.shape)
        return embed(self, ids)

    def counting(self: FastEngine, plan: RunPlan) -> Run:
        calls.clear()
        result = run(self, plan)
        by_run.append(calls.count(shape))
        return result

    monkeypatch.setattr(torch.nn.Embedding, "forward", counted)
    monkeypatch.setattr(FastEngine, "run", counting)
    site = Site(1, "resid")
    options = {"read": [site], "stop_after": 1}  # models whose logits are capped end with their own forward
    quick, slow = both_ways(monkeypatch, model, tokens, resume=Resume(1, resid), kv_cache=prefix, **options)
    close(quick[site], slow[site])
    quick, slow = both_ways(monkeypatch, model, random_tokens(batch=2, width=WIDTH), **options)
    close(quick[site], slow[site])
    assert by_run[0] == 0 < by_run[1]


def test_a_cache_without_the_first_layers_is_left_to_other_engines() -> None:
    model, tokens = load_llama(), random_tokens()
    resume = Resume(1, torch.zeros(*tokens.ids.shape, model.d_model))
    assert model.fast_engine.can_run(plan_run(model, tokens, resume=resume))
    assert not model.fast_engine.can_run(plan_run(model, tokens, resume=resume, use_cache=True))


def load_llama() -> Any:
    return load_model(random_hf("llama"), tokenizer=word_tokenizer(), backend="nnsight")


@pytest.mark.parametrize("way", ["operations", "modules"])
def test_nothing_is_left_in_the_modules_after_an_exception(way: Any) -> None:
    model, tokens = load_llama(), random_tokens()
    assert model.fast_engine.prepare(way)
    clean = model.run(tokens).logits

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt("stop here")

    handle = model.unhooked_copy.model.layers[1].mlp.down_proj.register_forward_pre_hook(fail)
    state = hook_state(model.unhooked_copy)
    with pytest.raises(KeyboardInterrupt, match="stop here"):
        model.run(tokens, [patch_at(model, Site(1, "attn_out"), [[1], [2]])], [Site(1, "mlp_out")])
    assert hook_state(model.unhooked_copy) == state
    handle.remove()
    close(model.run(tokens).logits, clean)
