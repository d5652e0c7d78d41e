"""What is written through a norm after the projection: the nearest point of an ellipsoid, by theorem and in models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.spreading import REQUESTS, states
from jaxtyping import Float
from torch import Tensor

import mechedit.methods.post_norm
import mechedit.methods.spread
from mechedit.edit import edited
from mechedit.methods import Ridge
from mechedit.methods.post_norm import change_before_norm, nearest_output
from mechedit.methods.spread import spread
from mechedit.moments import MomentAccumulator
from mechedit.targets import TargetConfig, find_targets

WIDTH = 24
FAMILIES = ["gemma2", "gemma3", "olmo2"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_ellipsoid(directions: Float[Tensor, "*batch d"], gain: Float[Tensor, " d"]) -> Tensor:
    return gain * directions * WIDTH**0.5 / directions.norm(dim=-1, keepdim=True)


GAINS = {"positive": drawn(WIDTH).exp(), "of both signs": drawn(WIDTH, seed=1) * 3}
LENGTH = torch.full((5,), WIDTH**0.5).double()


@pytest.mark.parametrize("kind", GAINS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_the_nearest_output_is_one_and_none_is_nearer(kind: str, size: float) -> None:
    gain, points = GAINS[kind], size * drawn(5, WIDTH, seed=3)
    nearest = nearest_output(points, gain, LENGTH)
    assert (nearest / gain).norm(dim=-1).tolist() == pytest.approx(LENGTH.tolist())
    distance = (nearest - points).norm(dim=-1)
    anywhere = on_ellipsoid(drawn(2000, 5, WIDTH, seed=4), gain)
    close = torch.cat(
        [on_ellipsoid(nearest / gain + step * drawn(500, 5, WIDTH, seed=5), gain) for step in (0.1, 1e-3)]
    )
    for outputs in (anywhere, close):
        assert ((outputs - points).norm(dim=-1) >= distance * (1 - 1e-9)).all()
    # The output in the point's own direction, which was once taken, is further away.
    parallel = on_ellipsoid(points / gain, gain)
    assert ((parallel - points).norm(dim=-1) > distance * (1 + 1e-6)).all()


def test_a_point_that_can_be_reached_is_its_own_nearest_output() -> None:
    for gain in GAINS.values():
        points = on_ellipsoid(drawn(5, WIDTH, seed=6), gain)
        assert torch.allclose(nearest_output(points, gain, LENGTH), points, atol=1e-9)


def test_with_one_gain_for_all_coordinates_it_lies_in_the_points_direction() -> None:
    points, gain = drawn(5, WIDTH, seed=7), torch.full((WIDTH,), 2.5).double()
    assert torch.allclose(nearest_output(points, gain, LENGTH), on_ellipsoid(points, gain))


def test_the_coordinate_of_least_gain_takes_what_the_others_leave() -> None:
    """The hard case: t has nothing along it, and all others together are too short."""
    gain, points = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([[0.0, 0.6, 0.3]]).double()
    nearest = nearest_output(points, gain, torch.tensor([2.0]).double())
    n = torch.cat([torch.zeros(1).double(), gain[1:] * points[0, 1:] / (gain[1:] ** 2 - 1)])
    n[0] = (4 - n.square().sum()).sqrt()
    assert torch.allclose(nearest[0], gain * n)


@pytest.fixture
def normed(make_model: Any, request: pytest.FixtureRequest) -> Any:
    """A model whose norm after the MLP of layer 1 has gains that differ as in trained ones."""
    model = make_model(request.param)
    name = next(n for n, _ in model.hf.named_parameters() if "layers.1.post_feedforward_layernorm" in n)
    weight = dict(model.hf.named_parameters())[name]
    with torch.no_grad():
        gain = 0.5 * drawn(len(weight), seed=8).exp()
        gain[3] = 0  # as in layer 3 of Gemma 3 270M
        weight.copy_(gain - (0 if request.param == "olmo2" else 1))
    return model


def written(model: Any, change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The MLP's outputs before, those asked for, and those after they were written without regard to old keys."""
    before = states(model, 1, "mlp_out")
    targets = find_targets(model, REQUESTS, 1, ["{}"], TargetConfig(steps=1))
    targets = dataclasses.replace(targets, z=before + change.to(before), part="mlp_out", initial=before)
    keys = drawn(400, model.d_mlp)
    moments = {1: MomentAccumulator(model.d_mlp).update(keys).finalize(0, {}).matrix}
    edit = spread(model, REQUESTS, targets, [1], Ridge(moments=moments, weight=1e-9)).edit
    with edited(model, edit):
        return before, targets.z, states(model, 1, "mlp_out")


@pytest.mark.parametrize("normed", FAMILIES, indirect=True)
def test_what_is_written_is_the_nearest_output(normed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    change = 0.8 * drawn(3, normed.d_model, seed=9)
    before, goal, after = written(normed, change)
    gain = normed.norm_gain(1)
    passed = gain != 0
    length = (before[:, passed] / gain[passed]).norm(dim=1)
    nearest = nearest_output(goal[:, passed], gain[passed], length)
    assert torch.allclose(after[:, passed], nearest, atol=2e-3 * float(nearest.abs().max()))
    assert torch.equal(after[:, ~passed], before[:, ~passed])
    missing = (after - goal).norm(dim=1)
    assert (missing < (before - goal).norm(dim=1)).all()

    def plain(model: Any, layer: int, keys: Any, change: Any) -> Any:
        """As if the output went through the norm's gain alone."""
        gain = model.output_gain(layer, keys).mean(1)
        return torch.where(gain == 0, 0, change / gain)

    monkeypatch.setattr(mechedit.methods.spread, "change_before_norm", plain)
    assert ((written(normed, change)[2] - goal).norm(dim=1) > 1.02 * missing).all()


@pytest.mark.parametrize("normed", FAMILIES, indirect=True)
def test_an_output_that_the_norm_can_give_is_written_exactly(normed: Any) -> None:
    before, gain = states(normed, 1, "mlp_out"), normed.norm_gain(1)
    unit = torch.where(gain == 0, 0, before / gain)
    turned = unit + 0.7 * drawn(3, normed.d_model, seed=10).float() * (gain != 0)
    goal = gain * turned * unit.norm(dim=1, keepdim=True) / turned.norm(dim=1, keepdim=True)
    _, _, after = written(normed, goal - before)
    assert float((after - goal).norm() / (before - goal).norm()) < 5e-3
    assert float((before - goal).norm() / goal.norm()) > 0.3


@pytest.mark.parametrize("normed", FAMILIES[:1], indirect=True)
def test_many_facts_are_taken_some_at_a_time(normed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, change = drawn(5, 2, normed.d_mlp, seed=13).float(), drawn(5, normed.d_model, seed=14).float()
    together = change_before_norm(normed, 1, keys, change)
    monkeypatch.setattr(mechedit.methods.post_norm, "_FACTS", 2)
    assert torch.allclose(change_before_norm(normed, 1, keys, change), together, rtol=1e-5, atol=1e-6)
    assert float(together.norm()) > 0.1


@pytest.mark.parametrize("normed", FAMILIES, indirect=True)
def test_no_change_asks_for_none(normed: Any) -> None:
    keys = drawn(3, 4, normed.d_mlp, seed=11).float()
    still = change_before_norm(normed, 1, keys, torch.zeros(3, normed.d_model))
    moved = change_before_norm(normed, 1, keys, torch.ones(3, normed.d_model))
    assert float(still.norm()) < 1e-5 * float(moved.norm())


def test_without_a_norm_the_change_is_only_scaled(make_model: Any) -> None:
    for family in ("gpt2", "llama"):
        model = make_model(family)
        assert model.norm_gain(1) is None
        change = drawn(3, model.d_model, seed=12).float()
        keys = drawn(3, 4, model.d_mlp, seed=11).float()
        assert torch.allclose(change_before_norm(model, 1, keys, change) * model.output_gain(1, keys)[:, 0], change)
        assert model.module_output(1, keys).shape == (3, 4, model.d_model)
