"""The residual is shared out over the layers as Algorithm 1 says, on a model that ends as it began."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import BACKENDS, SHAPES
from helpers.spreading import PREFIXES, REQUESTS, states
from torch import Tensor

from mechedit.edit import Edit, edited
from mechedit.errors import InputError
from mechedit.methods import KeyExtractor, Ridge, SpreadConfig, SpreadResult, edit_keys, prefix_mean
from mechedit.methods.spread import share_divisor, spread
from mechedit.models import Site, load_model
from mechedit.moments import MomentAccumulator
from mechedit.solve import Update
from mechedit.targets import TargetConfig, Targets, find_targets
from mechedit.targets.config import TargetPart


def moment(seed: int = 0) -> Tensor:
    keys = torch.randn(400, 96, generator=torch.Generator().manual_seed(seed))
    return MomentAccumulator(96).update(keys).finalize(0, {}).matrix


MOMENTS = {layer: moment(layer) for layer in range(3)}


def ridge(weight: float = 0.1) -> Ridge:
    return Ridge(moments=MOMENTS, weight=weight)


def targets_at(model: Any, layer: int, prefixes: list[str]) -> Targets:
    return find_targets(model, REQUESTS, layer, prefixes, TargetConfig(steps=3))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_layer_without_old_keys_reaches_the_targets(small_model: Any, layer: int) -> None:
    before = states(small_model, layer)
    z = before + torch.randn(before.shape, generator=torch.Generator().manual_seed(layer))
    targets = dataclasses.replace(targets_at(small_model, layer, ["{}"]), z=z)
    edit = spread(small_model, REQUESTS, targets, [layer], ridge(1e-7)).edit
    with edited(small_model, edit):
        after = states(small_model, layer)
    assert torch.allclose(after, targets.z, atol=1e-4)
    assert (before - targets.z).norm(dim=1).min() > 1
    assert edit.manifest["left"] == pytest.approx([0, 0, 0], abs=1e-4)


def test_reaches_the_targets_on_every_family(family_model: Any, family: str, backend: str) -> None:
    """Of each family, one part by each backend."""
    parts: tuple[TargetPart, ...] = ("resid", "mlp_out")
    part = parts[(list(SHAPES).index(family) + BACKENDS.index(backend)) % 2]
    before = states(family_model, 1, part)
    z = before + 0.3 * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    targets = dataclasses.replace(targets_at(family_model, 1, ["{}"]), z=z, part=part)
    moments = {1: moment(1)[: family_model.d_mlp, : family_model.d_mlp]}
    edit = spread(family_model, REQUESTS, targets, [1], Ridge(moments=moments, weight=1e-9)).edit
    with edited(family_model, edit):
        after = states(family_model, 1, part)
    missing = float((after - z).norm() / (before - z).norm())
    assert edit.manifest["residuals"][0]["after"] == pytest.approx(missing, abs=1e-5)
    # A norm after the down-projection fixes the length of what the MLP adds.
    assert missing < (0.5 if family_model.family.mlp_norm else 1e-4)


def test_old_keys_hold_the_update_back(lens_model: Any) -> None:
    targets = targets_at(lens_model, 1, ["{}"])
    residuals = [
        spread(lens_model, REQUESTS, targets, [1], ridge(weight)).edit.manifest["residuals"][0]["after"]
        for weight in (1e-6, 0.1, 1e6)
    ]
    assert residuals[0] < 0.01 < residuals[1] < 0.99 < residuals[2]


def drawn(model: Any, layer: int, prefixes: list[str], part: Any = "resid") -> Targets:
    """Not searched for: past the last block, only a subject that ends its prompt has a gradient."""
    before = states(model, layer, part)
    way = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(targets_at(model, 1, prefixes), layer=layer, z=before + way, part=part)


def test_manifest_tells_what_is_left(lens_model: Any) -> None:
    targets, before = drawn(lens_model, 2, PREFIXES), states(lens_model, 2)
    edit = spread(lens_model, REQUESTS, targets, [0, 1, 2], ridge()).edit
    with edited(lens_model, edit):
        end = targets.z - states(lens_model, 2)
    start, records = targets.z - before, edit.manifest["residuals"]
    assert [record["layer"] for record in records] == [0, 1, 2] == edit.layers
    assert records[0]["before"] == 1
    assert [record["after"] for record in records[:2]] == [record["before"] for record in records[1:]]
    assert [record["own"] for record in records] == pytest.approx([r["after"] / r["before"] for r in records])
    assert records[2]["after"] == pytest.approx(float(end.norm() / start.norm()), rel=1e-4)
    assert 0.01 < records[2]["after"] < records[0]["after"] < 1
    assert edit.manifest["left"] == pytest.approx((end.norm(dim=1) / start.norm(dim=1)).tolist(), rel=1e-4)
    assert all(record["error"] < 1e-6 and record["condition"] > 1 for record in records)
    assert edit.manifest["model"] == lens_model.provenance()
    assert edit.manifest["requests"] == ["a", "b", "c"]
    assert edit.manifest["facts"][1] == "Leon Blum was born in → Paris"
    assert edit.manifest["prefixes"] == PREFIXES
    assert all(edit.factors[layer].left.shape == (96, 3) for layer in edit.layers)


def test_nothing_to_do_changes_nothing(lens_model: Any) -> None:
    targets = targets_at(lens_model, 1, ["{}"])
    still = dataclasses.replace(targets, z=states(lens_model, 1))
    edit = spread(lens_model, REQUESTS, still, [0, 1], ridge()).edit
    assert all(edit.delta(layer).norm() < 1e-4 for layer in edit.layers)
    assert spread(lens_model, REQUESTS, targets, [0, 1], ridge()).edit.delta(0).norm() > 1e-2


def test_residual_is_divided_by_distance_or_by_place() -> None:
    for config, expected in (
        (SpreadConfig(), [6, 3, 1]),
        (SpreadConfig(convention="memit-2022"), [3, 2, 1]),
        (SpreadConfig(strategy="sqrt"), [6**0.5, 3**0.5, 1]),
        (SpreadConfig(strategy="sqrt", convention="memit-2022"), [3**0.5, 2**0.5, 1]),
        (SpreadConfig(strategy="forward-replay"), [1, 1, 1]),
    ):
        assert [share_divisor([3, 6, 8], index, config) for index in range(3)] == pytest.approx(expected)
    assert [share_divisor([3, 4, 5], index, SpreadConfig()) for index in range(3)] == [3, 2, 1]


def test_gaps_are_treated_by_convention(lens_model: Any) -> None:
    targets = drawn(lens_model, 2, PREFIXES[:1])
    first = {
        convention: spread(
            lens_model, REQUESTS, targets, [0, 2], ridge(), config=SpreadConfig(convention=convention)
        ).edit.delta(0)
        for convention in ("default", "memit-2022")
    }
    assert torch.allclose(3 * first["default"], 2 * first["memit-2022"], rtol=1e-6)


def with_strategy(model: Any, strategy: Any, targets: Targets, layers: list[int], rule: Any = None) -> Edit:
    return spread(model, REQUESTS, targets, layers, rule or ridge(), config=SpreadConfig(strategy=strategy)).edit


def test_sqrt_gives_the_first_layer_more(lens_model: Any) -> None:
    targets = drawn(lens_model, 2, PREFIXES)
    plain, more = (with_strategy(lens_model, name, targets, [0, 2]) for name in ("uniform", "sqrt"))
    assert torch.allclose(more.delta(0), 3**0.5 * plain.delta(0), rtol=1e-6)


def test_last_edits_the_last_layer_alone(lens_model: Any) -> None:
    targets = drawn(lens_model, 2, PREFIXES)
    edit, alone = (with_strategy(lens_model, "last", targets, layers) for layers in ([0, 1, 2], [2]))
    assert edit.layers == edit.manifest["layers"] == [2]
    assert torch.equal(edit.delta(2), alone.delta(2))


@pytest.mark.parametrize("part", ["resid", "mlp_out"])
def test_forward_replay_gives_each_layer_a_goal_that_fits_the_first(small_model: Any, part: Any) -> None:
    targets, start = drawn(small_model, 0, ["{}"], part), states(small_model, 2, part)
    site, later = Site(0, part), Site(2, part)
    goal = KeyExtractor(small_model, REQUESTS, ["{}"]).replay(site, targets.z, [later])[later]
    edit = with_strategy(small_model, "forward-replay", targets, [0, 1, 2], ridge(1e-7))
    with edited(small_model, edit):
        end = states(small_model, 2, part)
    assert (start - goal).norm(dim=1).min() > 0.1
    assert torch.allclose(end, goal, atol=1e-3)
    records = edit.manifest["residuals"]
    # With the first layer's goal reached the others' nearly are: only the subject's other tokens still differ.
    assert records[0]["after"] < 0.5
    assert records[2]["after"] < 1e-3
    assert records[0]["own"] < 1e-3


def test_forward_replay_fits_what_is_left_at_each_layer(lens_model: Any) -> None:
    targets = drawn(lens_model, 0, PREFIXES)
    goals = KeyExtractor(lens_model, REQUESTS, ["{}"]).replay(Site(0, "resid"), targets.z, [Site(1, "resid")])
    edit = with_strategy(lens_model, "forward-replay", targets, [0, 1])
    first = dataclasses.replace(edit, factors={0: edit.factors[0]})
    with edited(lens_model, first):
        before = (goals[Site(1, "resid")] - states(lens_model, 1)).norm()
    with edited(lens_model, edit):
        after = (goals[Site(1, "resid")] - states(lens_model, 1)).norm()
    record = edit.manifest["residuals"][1]
    assert record["own"] == pytest.approx(float(after / before), rel=1e-4)
    assert record["after"] == pytest.approx(record["own"] * record["before"], rel=1e-5)
    assert 0.01 < record["own"] < 0.99
    with pytest.raises(InputError, match="after layer 0; find them again"):
        with_strategy(lens_model, "forward-replay", drawn(lens_model, 1, PREFIXES), [0, 1])


def test_batches_do_not_matter(lens_model: Any) -> None:
    targets = drawn(lens_model, 2, PREFIXES)
    first, many = (
        spread(lens_model, REQUESTS, targets, [1, 2], ridge(), config=SpreadConfig(batch_size=size)).edit
        for size in (1, 64)
    )
    for layer in (1, 2):
        assert (first.delta(layer) - many.delta(layer)).norm() < 1e-4 * many.delta(layer).norm()


def test_later_layers_see_what_earlier_ones_did(lens_model: Any) -> None:
    targets = targets_at(lens_model, 1, PREFIXES)
    clean = prefix_mean(KeyExtractor(lens_model, REQUESTS, PREFIXES).keys(1))
    result = spread(lens_model, REQUESTS, targets, [0, 1], ridge())
    only_first = dataclasses.replace(result.edit, factors={0: result.edit.factors[0]})
    with edited(lens_model, only_first):
        moved_keys = prefix_mean(KeyExtractor(lens_model, REQUESTS, PREFIXES).keys(1))
    assert torch.allclose(result.keys[1], moved_keys, atol=1e-6)
    assert not torch.allclose(result.keys[1], clean, atol=1e-2)


@pytest.mark.parametrize("convention", ["default", "memit-2022"])
def test_the_keys_of_an_edit_are_found_again(lens_model: Any, tmp_path: Path, convention: Any) -> None:
    targets, config = targets_at(lens_model, 1, PREFIXES), SpreadConfig(convention=convention)
    result: SpreadResult = spread(lens_model, REQUESTS, targets, [0, 1], ridge(), config=config)
    result.edit.save(tmp_path / "edit.safetensors")
    actual = edit_keys(lens_model, REQUESTS, Edit.load(tmp_path / "edit.safetensors"))
    assert sorted(actual) == [0, 1]
    assert all(torch.allclose(actual[layer], result.keys[layer], atol=1e-6) for layer in actual)
    with pytest.raises(InputError, match="2 requests are not those of the edit"):
        edit_keys(lens_model, REQUESTS[:2], result.edit)


def test_half_precision_is_computed_in_full(make_hf: Any, tokenizer: Any) -> None:
    full, half = (
        load_model(make_hf("gpt2").to(dtype), tokenizer=tokenizer) for dtype in (torch.float32, torch.bfloat16)
    )
    targets = drawn(full, 1, PREFIXES)
    edit = spread(full, REQUESTS, targets, [1], ridge()).edit
    target = dataclasses.replace(targets, provenance={})
    rounded = spread(half, REQUESTS, target, [1], ridge()).edit
    assert rounded.factors[1].left.dtype == torch.float64
    assert (edit.delta(1) - rounded.delta(1)).norm() < 0.05 * edit.delta(1).norm()


class Failing:
    """A rule that works once and then raises, when the model is half edited."""

    def __init__(self, error: type[BaseException], check: Callable[[], bool]) -> None:
        self.error, self.check, self.calls = error, check, 0

    def update(self, layer: int, keys: Tensor, residuals: Tensor) -> Update:
        self.calls += 1
        if self.calls > 1:
            assert self.check()
            raise self.error
        return ridge().update(layer, keys, residuals)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_ends_as_it_began(small_model: Any, error: type[BaseException] | None) -> None:
    targets, before = targets_at(small_model, 1, ["{}"]), small_model.weights_hash()
    if error is None:
        spread(small_model, REQUESTS, targets, [0, 1], ridge())
    else:
        rule = Failing(error, lambda: small_model.weights_hash() != before)
        with pytest.raises(error):
            spread(small_model, REQUESTS, targets, [0, 1], rule)
    assert small_model.weights_hash() == before


@pytest.mark.parametrize("layers", [[], [1, 0], [1, 1], [0, 3], [-1, 1]])
def test_bad_layers_are_refused(lens_model: Any, layers: list[int]) -> None:
    targets = targets_at(lens_model, 1, ["{}"])
    with pytest.raises(InputError, match="expected some of 0 … 2"):
        spread(lens_model, REQUESTS, targets, layers, ridge())


def test_targets_of_something_else_are_refused(lens_model: Any, make_model: Any) -> None:
    targets = targets_at(lens_model, 1, ["{}"])
    for requests, layers in ((REQUESTS[::-1], [1]), (REQUESTS[:2], [1]), (REQUESTS, [0, 2])):
        with pytest.raises(InputError, match="find them again"):
            spread(lens_model, requests, targets, layers, ridge())
    broken = dataclasses.replace(targets, z=targets.z * torch.nan)
    with pytest.raises(InputError, match="the targets z hold 96 values"):
        spread(lens_model, REQUESTS, broken, [1], ridge())
    with pytest.raises(InputError, match="weights_hash"):
        spread(make_model("gpt2", seed=1), REQUESTS, targets, [1], ridge())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="batch_size is 0"):
        SpreadConfig(batch_size=0)
