"""The same algorithms write into attention's output projections when the model says so (MEMIT Fig. 12)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.edits import identical, logits, weights
from helpers.models import BACKENDS
from helpers.spreading import PREFIXES, REQUESTS, states
from torch import Tensor

from mechedit.edit import Edit, Factors, apply_, edited, merge, undo_
from mechedit.errors import InputError
from mechedit.methods import METHODS, MemitConfig, Ridge, memit, pmet
from mechedit.methods.spread import spread
from mechedit.models import Patch, Site, Tokens, load_model
from mechedit.models.families import FAMILIES
from mechedit.models.self_check import check_projection
from mechedit.moments import MomentAccumulator, MomentsConfig, SecondMoment, collect_moments, load_moments
from mechedit.targets import TargetConfig, find_targets

# Attention's output projection by the families' own names, from a block.
PLACES = {
    "gpt2": "attn.c_proj",
    "gpt_neo": "attn.attention.out_proj",
    "gptj": "attn.out_proj",
    "gpt_neox": "attention.dense",
}
TEXTS = ["The mother tongue of Leon Blum is French.", "The Eiffel Tower is located in the city of Paris."] * 12


def tokens() -> Tokens:
    ids = torch.randint(2, 300, (2, 7), generator=torch.Generator().manual_seed(3))
    return Tokens(ids, torch.ones_like(ids))


def moment(width: int, seed: int = 0) -> Tensor:
    keys = torch.randn(400, width, generator=torch.Generator().manual_seed(seed))
    return MomentAccumulator(width).update(keys).finalize(0, {}).matrix


def moments(model: Any) -> dict[int, Tensor]:
    return {layer: moment(model.d_key, layer) for layer in range(model.n_layers)}


def projection(model: Any, layer: int) -> Any:
    name = PLACES.get(model.hf.config.model_type, "self_attn.o_proj")
    return model.hf.get_submodule(f"{model.family.blocks}.{layer}.{name}")


def attention_edit(model: Any, seed: int = 0) -> Edit:
    draw = torch.Generator().manual_seed(seed)
    factors = Factors(
        left=torch.randn(model.d_key, 2, generator=draw, dtype=torch.float64),
        right=torch.randn(2, model.d_model, generator=draw, dtype=torch.float64),
    )
    return Edit(factors={1: factors}, manifest={"method": "test", "model": model.provenance()})


@torch.no_grad()
def test_the_output_is_the_key_times_the_projection(family_model: Any) -> None:
    """Keys by a plain torch hook on the plain model, outputs by the formula, for every family on both backends."""
    model, sites = family_model.writing("attn"), [Site(1, "attn_key"), Site(1, "attn_out")]
    seen: list[Tensor] = []
    module = projection(model, 1)
    handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.hf(input_ids=tokens().ids)
    handle.remove()
    run = model.run(tokens(), read=sites)
    key, out = (run[site] for site in sites)
    torch.testing.assert_close(key, seen[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.module_output(1, key), out, atol=1e-5, rtol=1e-4)
    bare = module(key)
    norm = model.family.attn_norm
    block = model.hf.get_submodule(f"{model.family.blocks}.1")
    torch.testing.assert_close(bare if norm is None else block.get_submodule(norm)(bare), out, atol=1e-5, rtol=1e-4)
    assert model.projection(1).shape == (model.d_key, model.d_model)
    assert model.projection(1).data_ptr() == module.weight.data_ptr()
    # A key of the MLP is another thing, and the model that was given still writes there.
    assert family_model.module == "mlp"
    assert family_model.d_key == family_model.d_mlp
    assert family_model.projection(1).data_ptr() != module.weight.data_ptr()
    assert model.down_projection(1).data_ptr() == family_model.projection(1).data_ptr()
    assert model.down_projection(1).shape == (model.d_mlp, model.d_model)


@torch.no_grad()
def test_a_written_key_is_seen_by_the_rest(family_model: Any) -> None:
    """A patch at `attn_key` gives the logits that a hook on the plain projection gives."""
    model, at = family_model, tokens()
    width = len(model.writing("attn").projection(1))
    value = torch.randn(2, 1, width, generator=torch.Generator().manual_seed(0))
    run = model.run(at, [Patch(Site(1, "attn_key"), torch.tensor([[4], [-1]]), value)], [Site(1, "attn_key")])

    def overwrite(module: Any, inputs: Any) -> Any:
        key = inputs[0].clone()
        key[0, 4] = value[0, 0]
        return (key,)

    handle = projection(model, 1).register_forward_pre_hook(overwrite)
    expected = model.hf(input_ids=at.ids).logits
    handle.remove()
    torch.testing.assert_close(run.logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(run[Site(1, "attn_key")][0, 4], value[0, 0])
    assert (run.logits[0, 4:] - model.run(at).logits[0, 4:]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="attn_key"):
        model.run(at, [Patch(Site(1, "attn_key"), torch.tensor([[4], [-1]]), value[..., 1:])])


def test_every_family_says_where_its_projection_is() -> None:
    assert all(family.attn_proj for family in FAMILIES)
    assert len({family.attn_proj for family in FAMILIES}) == 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_whose_attention_is_built_otherwise_is_refused(make_model: Any, backend: str) -> None:
    model = make_model("llama", backend)
    model.family = dataclasses.replace(model.family, attn_proj="self_attn.q_proj")
    with pytest.raises(InputError, match=r"output projection of layer 0 is found.*its attention is built otherwise"):
        model.writing("attn")
    with pytest.raises(InputError, match="module is 'both', expected one of mlp, attn"):
        model.writing("both")
    check_projection(model.writing("mlp"))


def test_a_quantized_projection_is_refused_with_its_name(make_model: Any) -> None:
    model = make_model("llama")
    model.family = dataclasses.replace(model.family, attn_proj="input_layernorm")
    with pytest.raises(InputError, match="output projection of attention of layer 0 is a LlamaRMSNorm"):
        model.writing("attn")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gptj", "qwen3"])
def test_one_layer_is_the_ten_line_computation(family_model: Any) -> None:
    """ΔW = R Kᵀ (λ M + K Kᵀ)⁻¹ with keys from plain hooks, one prompt at a time."""
    model = family_model.writing("attn")
    targets = find_targets(model, REQUESTS, 1, PREFIXES, TargetConfig(steps=3))
    matrices, weight = moments(model), 5.0
    edit = spread(model, REQUESTS, targets, [1], Ridge(moments=matrices, weight=weight)).edit
    keys = torch.stack([_mean_key(model, request) for request in REQUESTS], 1).double()
    residual = (targets.z - states(model, 1)).T.double()
    expected = torch.linalg.solve(weight * matrices[1] + keys @ keys.T, keys) @ residual.T
    torch.testing.assert_close(edit.delta(1), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-3)
    assert expected.norm() > 1e-3


@pytest.mark.parametrize("family", ["gptj", "pythia"])
def test_where_the_mlp_does_not_see_it_the_goal_is_reached(family_model: Any) -> None:
    """In parallel blocks the residual moves by just what attention's output does."""
    model = family_model.writing("attn")
    targets = find_targets(model, REQUESTS, 1, ["{}"], TargetConfig(steps=3, lr=0.5))
    edit = spread(model, REQUESTS, targets, [1], Ridge(moments=moments(model), weight=1e-9)).edit
    with edited(model, edit):
        torch.testing.assert_close(states(model, 1), targets.z, atol=1e-4, rtol=1e-4)
    assert (states(model, 1) - targets.z).norm(dim=1).min() > 0.1


def test_one_layers_own_output_is_reached(family_model: Any) -> None:
    """z as what attention adds (the search that ROME does): the edited projection gives it, on every family."""
    model = family_model.writing("attn")
    before = states(model, 1, "attn_out")
    targets = find_targets(model, REQUESTS, 1, ["{}"], TargetConfig(steps=3, part="mlp_out", lr=0.05))
    assert targets.part == "attn_out"
    assert torch.allclose(targets.initial, before, atol=1e-5)
    edit = spread(model, REQUESTS, targets, [1], Ridge(moments=moments(model), weight=1e-9)).edit
    with edited(model, edit):
        missing = float((states(model, 1, "attn_out") - targets.z).norm() / (before - targets.z).norm())
    assert missing < (0.5 if model.family.attn_norm else 1e-3)
    assert edit.manifest["residuals"][0]["after"] == pytest.approx(missing, abs=1e-3)
    with pytest.raises(InputError, match="states of attn_out, expected resid or mlp_out"):
        spread(family_model, REQUESTS, targets, [1], Ridge(moments=moments(family_model), weight=1.0))


def test_the_search_at_attention_sees_its_delta_in_the_mlp(small_model: Any) -> None:
    """The loss at the z found, against a run of whole prompts with z in attention's place."""
    model, config = (
        small_model.writing("attn"),
        TargetConfig(steps=12, part="mlp_out", kl_weight=0.0, weight_decay=0.0, clamp=4.0, lr=0.1),
    )
    request = [REQUESTS[0]]
    targets = find_targets(model, request, 1, ["{}"], config)
    ids = model.tokenizer(request[0].text + " " + request[0].target_new)["input_ids"]
    n_target = len(model.tokenizer(" " + request[0].target_new)["input_ids"])
    last = len(model.tokenizer("The mother tongue of Danielle Darrieux")["input_ids"]) - 1
    patch = Patch(Site(1, "attn_out"), torch.tensor([[last]]), targets.z[:, None])
    row = torch.tensor([ids])
    with torch.no_grad():
        log_probs = model.run(Tokens(row, torch.ones_like(row)), [patch]).logits[0].log_softmax(-1)
    spots = range(len(ids) - n_target, len(ids))
    nll = -sum(float(log_probs[spot - 1, ids[spot]]) for spot in spots) / n_target
    measured = targets.losses
    assert measured["nll"].iloc[-1] == pytest.approx(nll, abs=1e-4)
    assert measured["nll"].iloc[-1] < measured["nll"].iloc[0] - 0.01


def test_spreading_over_attention_reduces_the_residual_and_changes_nothing_else(small_model: Any) -> None:
    model, before = small_model.writing("attn"), weights(small_model)
    config = MemitConfig(steps=8, covariance_weight=0.01)
    edit = memit(model, REQUESTS, [0, 1, 2], moments(model), PREFIXES, config)
    assert identical(model, before)
    residuals = [record["after"] for record in edit.manifest["residuals"]]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 0.6
    with edited(model, edit):
        changed = [name for name, value in model.hf.named_parameters() if not torch.equal(value, before[name])]
        assert changed == [f"transformer.h.{layer}.attn.c_proj.weight" for layer in (0, 1, 2)]
    assert edit.module == "attn"
    assert edit.manifest["model"]["module"] == "attn"


@pytest.mark.parametrize("method", ["alphaedit", "emmet", "rome"])
def test_other_methods_write_there_too(lens_model: Any, method: str) -> None:
    model = lens_model.writing("attn")
    # AlphaEdit looks for directions that old keys hardly use.
    moment = torch.diag(torch.logspace(0, -4, model.d_key, dtype=torch.float64))
    edit = METHODS[method](model, REQUESTS, [1], {1: moment}, ["{}"])
    assert edit.factors[1].left.shape[0] == model.d_key
    before = logits(model)
    with edited(model, edit):
        assert (logits(model) - before).abs().max() > 1e-3


def test_pmet_is_refused(lens_model: Any) -> None:
    with pytest.raises(InputError, match="PMET's"):
        pmet(lens_model.writing("attn"), REQUESTS, [1], moments(lens_model.writing("attn")), ["{}"])


def test_an_edit_of_attention_never_reaches_the_mlps(make_model: Any, tmp_path: Any) -> None:
    # Keys as wide as the residual in both: no shape would tell.
    mlps = make_model("gpt2_square")
    model, before = mlps.writing("attn"), weights(mlps)
    edit = attention_edit(model)
    edit.save(tmp_path / "e.safetensors")
    loaded = Edit.load(tmp_path / "e.safetensors")
    for copy in (edit, loaded):
        for use in (apply_, lambda model, edit: edited(model, edit).__enter__()):
            with pytest.raises(InputError, match=r"made for the module 'attn', found .* 'mlp'.*writing\('attn'\)"):
                use(mlps, copy)
    assert identical(mlps, before)
    apply_(model, loaded)
    with pytest.raises(InputError, match="made for the module 'attn'"):
        undo_(mlps, edit)
    undo_(model, edit)
    assert identical(model, before)


def test_an_edit_without_the_field_is_one_of_mlps(make_model: Any) -> None:
    mlps = make_model("gpt2_square")
    edit = attention_edit(mlps)
    made_on = {name: value for name, value in edit.manifest["model"].items() if name != "module"}
    old = dataclasses.replace(edit, manifest={**edit.manifest, "model": made_on})
    assert old.module == "mlp"
    before = logits(mlps)
    with edited(mlps, old):
        assert not torch.equal(logits(mlps), before)
    with pytest.raises(InputError, match="made for the module 'mlp'"):
        apply_(mlps.writing("attn"), old)
    assert merge([old, edit]).module == "mlp"
    with pytest.raises(InputError, match="module = 'attn', expected 'mlp'"):
        merge([old, attention_edit(mlps.writing("attn"))])


def test_edits_of_both_modules_follow_one_another(make_model: Any) -> None:
    """Each module of a layer has its own base weights, and all come back bit for bit."""
    mlps = make_model("gpt2_square")
    attention, start, edits = mlps.writing("attn"), weights(mlps), []
    for model, seed in ((mlps, 0), (attention, 1), (mlps, 2), (attention, 3)):
        edits.append((model, attention_edit(model, seed), weights(mlps)))
        apply_(model, edits[-1][1])
    # Taken once from the first base: the sum of both deltas is rounded once.
    total = start["transformer.h.1.mlp.c_proj.weight"].double() + edits[0][1].delta(1) + edits[2][1].delta(1)
    assert torch.equal(mlps.projection(1), total.float())
    for model, edit, before in reversed(edits):
        assert not identical(mlps, before)
        undo_(model, edit)
        assert identical(mlps, before)
    assert identical(mlps, start)


def test_moments_of_attention_are_those_of_its_keys(small_model: Any, tmp_path: Any) -> None:
    model, config = small_model.writing("attn"), MomentsConfig(max_length=16)
    actual = collect_moments(model, TEXTS, [1], config, out=tmp_path)[1]
    total, count = torch.zeros(model.d_key, model.d_key, dtype=torch.float64), 0
    for text in TEXTS:
        ids = torch.tensor([model.tokenizer(text)["input_ids"][:16]])
        with torch.no_grad():
            keys = model.run(Tokens(ids, torch.ones_like(ids)), read=[Site(1, "attn_key")])[Site(1, "attn_key")][0]
        total, count = total + keys.double().T @ keys.double(), count + len(keys)
    assert actual.count == count
    torch.testing.assert_close(actual.matrix, total / count, atol=1e-6, rtol=1e-4)
    assert isinstance(load_moments(tmp_path, [1], model)[1], SecondMoment)
    with pytest.raises(InputError, match="module = 'attn', expected 'mlp'"):
        load_moments(tmp_path, [1], small_model)
    with pytest.raises(InputError, match="module = 'attn', expected 'mlp'"):
        collect_moments(small_model, TEXTS, [1], config, out=tmp_path)


def test_states_of_the_residual_are_shared_by_both_modules(lens_model: Any, tmp_path: Any) -> None:
    """z of the residual stream does not depend on what is written, so one search serves both; others do."""
    model, shared = lens_model.writing("attn"), TargetConfig(steps=2)
    first = find_targets(lens_model, REQUESTS, 1, ["{}"], shared, cache=tmp_path)
    files = set(tmp_path.iterdir())
    second = find_targets(model, REQUESTS, 1, ["{}"], shared, cache=tmp_path)
    assert torch.equal(first.z, second.z)
    assert set(tmp_path.iterdir()) == files
    of_module = TargetConfig(steps=2, part="mlp_out")
    parts = [find_targets(view, REQUESTS, 1, ["{}"], of_module, cache=tmp_path).part for view in (lens_model, model)]
    assert parts == ["mlp_out", "attn_out"]
    assert len(set(tmp_path.iterdir())) == len(files) + 2 * len(REQUESTS), "a file per request and module"


def test_a_model_is_loaded_to_write_there(tokenizer: Any, make_hf: Any) -> None:
    model = load_model(make_hf("qwen3"), tokenizer=tokenizer, module="attn")
    assert (model.module, model.d_key, model.d_mlp, model.d_model) == ("attn", 64, 96, 32)
    assert model.writing("mlp").d_key == 96
    with pytest.raises(InputError, match="module is 'mpl'"):
        load_model(make_hf("qwen3"), tokenizer=tokenizer, module="mpl")


def _mean_key(model: Any, request: Any) -> Tensor:
    """The mean over prefixes of the projection's input at the subject's last token, by a hook on the plain model."""
    seen: list[Tensor] = []
    handle = projection(model, 1).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0, -1]))
    for prefix in PREFIXES:
        cut = prefix.format(request.prompt[: request.prompt.index("{}")] + request.subject)
        with torch.no_grad():
            model.hf(input_ids=torch.tensor([model.tokenizer(cut)["input_ids"]]))
    handle.remove()
    return torch.stack(seen).double().mean(0)
