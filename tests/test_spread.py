"""The residual is shared out over the layers as Algorithm 1 says, on a model that ends as it began."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mechedit.spread
from mechedit.edit import edited
from mechedit.errors import InputError
from mechedit.facts import EditRequest
from mechedit.models import Site
from mechedit.moments import MomentFitter, SecondMoment
from mechedit.prompts import tokenize_prompt
from mechedit.spread import SpreadConfig, at_subjects, mean_keys, shares_left, spread, states
from mechedit.targets import TargetConfig, Targets, find_targets

PREFIXES = ["{}", "The first thing. {}", "Because he said so many things. {}"]
REQUESTS = [
    EditRequest(id="a", subject="Danielle Darrieux", prompt="The mother tongue of {} is", target_new="Korean"),
    EditRequest(id="b", subject="Leon Blum", prompt="{} was born in", target_new="Paris"),
    EditRequest(id="c", subject="Toko Yasuda", prompt="They say that {}", target_new="plays"),
]


def moment(seed: int = 0) -> Tensor:
    keys = torch.randn(400, 96, generator=torch.Generator().manual_seed(seed))
    return MomentFitter(96).update(keys).result(0, {}).matrix


MOMENTS = {layer: moment(layer) for layer in range(3)}


def targets_at(model: Any, layer: int, prefixes: list[str]) -> Targets:
    return find_targets(model, REQUESTS, layer, prefixes, TargetConfig(steps=3))


def hooked(model: Any, module: Any, texts: list[tuple[str, str]]) -> Tensor:
    """The input of a module at the subject's last token of each (template, subject), by a plain hook."""
    caught: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    rows = []
    for template, subject in texts:
        prompt = tokenize_prompt(model.tokenizer, template, subject)
        with torch.no_grad():
            model.hf(torch.tensor([prompt.ids]))
        rows.append(caught.pop()[0, prompt.last_subject])
    handle.remove()
    return torch.stack(rows)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_layer_without_old_keys_reaches_the_targets(small_model: Any, layer: int) -> None:
    before = states(small_model, REQUESTS, layer, 8)
    z = before + torch.randn(before.shape, generator=torch.Generator().manual_seed(layer))
    targets = dataclasses.replace(targets_at(small_model, layer, ["{}"]), z=z)
    config = SpreadConfig(covariance_weight=1e-7)
    edit = spread(small_model, REQUESTS, targets, [layer], MOMENTS, config=config)
    with edited(small_model, edit):
        after = states(small_model, REQUESTS, layer, 8)
    assert torch.allclose(after, targets.z, atol=1e-4)
    assert (before - targets.z).norm(dim=1).min() > 1
    assert edit.manifest["left"] == pytest.approx([0, 0, 0], abs=1e-4)


def test_old_keys_hold_the_update_back(lens_model: Any) -> None:
    targets = targets_at(lens_model, 1, ["{}"])
    left = [
        spread(lens_model, REQUESTS, targets, [1], MOMENTS, config=SpreadConfig(covariance_weight=weight)).manifest[
            "residuals"
        ][0]["after"]
        for weight in (1e-6, 0.1, 1e6)
    ]
    assert left[0] < 0.01 < left[1] < 0.99 < left[2]


def test_manifest_tells_what_is_left(lens_model: Any) -> None:
    before = states(lens_model, REQUESTS, 2, 8)
    # Drawn and not searched: past the last block, only a subject that ends its prompt has a gradient.
    start = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    targets = dataclasses.replace(targets_at(lens_model, 1, PREFIXES), layer=2, z=before + start)
    edit = spread(lens_model, REQUESTS, targets, [0, 1, 2], MOMENTS, config=SpreadConfig(covariance_weight=0.1))
    with edited(lens_model, edit):
        end = targets.z - states(lens_model, REQUESTS, 2, 8)
    records = edit.manifest["residuals"]
    assert [record["layer"] for record in records] == [0, 1, 2] == edit.layers
    assert records[0]["before"] == 1
    assert [record["after"] for record in records[:2]] == [record["before"] for record in records[1:]]
    assert records[2]["after"] == pytest.approx(float(end.norm() / start.norm()), rel=1e-4)
    assert 0.01 < records[2]["after"] < records[0]["after"] < 1
    assert edit.manifest["left"] == pytest.approx((end.norm(dim=1) / start.norm(dim=1)).tolist(), rel=1e-4)
    assert all(record["error"] < 1e-6 and record["condition"] > 1 for record in records)
    assert edit.manifest["model"] == lens_model.provenance()
    assert edit.manifest["requests"] == ["a", "b", "c"]
    assert edit.manifest["prefixes"] == PREFIXES
    assert all(edit.factors[layer].left.shape == (96, 3) for layer in edit.layers)


def test_nothing_to_do_changes_nothing(lens_model: Any) -> None:
    targets = targets_at(lens_model, 1, ["{}"])
    still = dataclasses.replace(targets, z=states(lens_model, REQUESTS, 1, 64))
    edit = spread(lens_model, REQUESTS, still, [0, 1], MOMENTS)
    assert all(not edit.delta(layer).any() for layer in edit.layers)
    assert edit.manifest["left"] == [0, 0, 0]


@pytest.mark.parametrize(("convention", "weights"), [("default", [1 / 3] * 3), ("memit-2022", [1 / 2, 1 / 4, 1 / 4])])
def test_keys_are_averaged_over_prefixes(small_model: Any, convention: Any, weights: list[float]) -> None:
    config = SpreadConfig(convention=convention, batch_size=2)
    found = mean_keys(small_model, REQUESTS, 1, PREFIXES, config)
    module = small_model.hf.transformer.h[1].mlp.c_proj
    for place, request in enumerate(REQUESTS):
        texts = [(prefix.replace("{}", request.prompt), request.subject) for prefix in PREFIXES]
        keys = hooked(small_model, module, texts)
        wanted = (torch.tensor(weights)[:, None] * keys).sum(0)
        assert torch.allclose(found[:, place].float(), wanted, atol=1e-5)
        assert not torch.allclose(keys[0], keys[1], atol=1e-2)


@pytest.mark.parametrize("convention", ["default", "memit-2022"])
def test_one_prefix_is_its_own_mean(lens_model: Any, convention: Any) -> None:
    config = SpreadConfig(convention=convention)
    keys = at_subjects(lens_model, REQUESTS, Site(1, "mlp_key"), ["{}"], 64)[:, 0]
    assert torch.equal(mean_keys(lens_model, REQUESTS, 1, ["{}"], config).T.float(), keys)


def test_residual_is_divided_by_distance_or_by_place() -> None:
    for config, wanted in (
        (SpreadConfig(), [6, 3, 1]),
        (SpreadConfig(convention="memit-2022"), [3, 2, 1]),
    ):
        assert [shares_left([3, 6, 8], place, config) for place in range(3)] == wanted
        assert [shares_left([3, 4, 5], place, config) for place in range(3)] == [3, 2, 1]


def test_gaps_are_treated_by_convention(lens_model: Any) -> None:
    targets = targets_at(lens_model, 2, ["{}"])
    first = {
        convention: spread(
            lens_model, REQUESTS, targets, [0, 2], MOMENTS, config=SpreadConfig(convention=convention)
        ).delta(0)
        for convention in ("default", "memit-2022")
    }
    assert torch.allclose(3 * first["default"], 2 * first["memit-2022"], rtol=1e-6)


def test_batches_do_not_matter(lens_model: Any) -> None:
    targets = targets_at(lens_model, 2, PREFIXES)
    one, many = (
        spread(
            lens_model,
            REQUESTS,
            targets,
            [1, 2],
            MOMENTS,
            config=SpreadConfig(covariance_weight=0.1, batch_size=size),
        )
        for size in (1, 64)
    )
    for layer in (1, 2):
        assert (one.delta(layer) - many.delta(layer)).norm() < 1e-4 * many.delta(layer).norm()


def test_later_layers_see_what_earlier_ones_did(lens_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    plain = mechedit.spread.mean_keys

    def spy(*args: Any) -> Tensor:
        seen.append(plain(*args))
        return seen[-1]

    targets, config = targets_at(lens_model, 1, ["{}"]), SpreadConfig(covariance_weight=0.1)
    clean = plain(lens_model, REQUESTS, 1, ["{}"], config)
    monkeypatch.setattr(mechedit.spread, "mean_keys", spy)
    edit = spread(lens_model, REQUESTS, targets, [0, 1], MOMENTS, config=config)
    only_first = dataclasses.replace(edit, factors={0: edit.factors[0]})
    with edited(lens_model, only_first):
        moved = plain(lens_model, REQUESTS, 1, ["{}"], config)
    assert torch.allclose(seen[1], moved, atol=1e-6)
    assert not torch.allclose(seen[1], clean, atol=1e-2)


def failing_late(error: type[BaseException], check: Callable[[], bool]) -> Callable[..., Any]:
    """`ridge_update` that works once and then raises, when the model is half edited."""
    calls: list[int] = []
    plain = mechedit.spread.ridge_update

    def solve(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            assert check()
            raise error
        return plain(*args)

    return solve


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_ends_as_it_began(
    small_model: Any, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    targets, before = targets_at(small_model, 1, ["{}"]), small_model.weights_hash()
    if error is None:
        spread(small_model, REQUESTS, targets, [0, 1], MOMENTS)
    else:
        solve = failing_late(error, lambda: small_model.weights_hash() != before)
        monkeypatch.setattr(mechedit.spread, "ridge_update", solve)
        with pytest.raises(error):
            spread(small_model, REQUESTS, targets, [0, 1], MOMENTS)
    assert small_model.weights_hash() == before


@pytest.mark.parametrize("layers", [[], [1, 0], [1, 1], [0, 3], [-1, 1]])
def test_bad_layers_are_refused(lens_model: Any, layers: list[int]) -> None:
    targets = targets_at(lens_model, 1, ["{}"])
    with pytest.raises(InputError, match="expected some of 0 … 2"):
        spread(lens_model, REQUESTS, targets, layers, MOMENTS)


def test_targets_of_something_else_are_refused(lens_model: Any) -> None:
    targets = targets_at(lens_model, 1, ["{}"])
    for given, layers in ((REQUESTS[::-1], [1]), (REQUESTS[:2], [1]), (REQUESTS, [0, 2])):
        with pytest.raises(InputError, match="find them again"):
            spread(lens_model, given, targets, layers, MOMENTS)
    broken = dataclasses.replace(targets, z=targets.z * torch.nan)
    with pytest.raises(InputError, match="the targets z hold 96 values"):
        spread(lens_model, REQUESTS, broken, [1], MOMENTS)


def test_bad_moments_are_refused(lens_model: Any, make_model: Any) -> None:
    targets = targets_at(lens_model, 1, ["{}"])

    def refused(given: dict[int, Any], match: str) -> None:
        with pytest.raises(InputError, match=match):
            spread(lens_model, REQUESTS, targets, [0, 1], given)

    refused({1: MOMENTS[1]}, "no second moment for layer 0")
    refused({**MOMENTS, 0: torch.eye(32)}, r"is \(32, 32\), expected \(96, 96\)")
    refused({**MOMENTS, 0: MOMENTS[0] * torch.inf}, "not finite")
    refused({**MOMENTS, 0: torch.zeros(96, 96)}, "not positive definite")
    foreign = {"layer": 0, **make_model("gpt2", seed=1).provenance()}
    own = {"layer": 1, **lens_model.provenance()}
    for provenance, match in ((foreign, "weights_hash"), (own, "layer = 1, expected 0")):
        refused({**MOMENTS, 0: SecondMoment(layer=0, matrix=MOMENTS[0], count=400, provenance=provenance)}, match)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="covariance_weight is 0"):
        SpreadConfig(covariance_weight=0.0)
