"""The learning rate of the search for z, in units of the state: the course scales with the residual stream."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.spreading import PREFIXES, REQUESTS
from torch import Tensor

from mechedit.errors import InputError
from mechedit.methods import AlphaEditConfig, EmmetConfig, MemitConfig, PmetConfig, RomeConfig
from mechedit.targets import TargetConfig, Targets, find_targets

SCALE = 64.0
LAYER = 1
CONFIG = TargetConfig(steps=8, clamp=2.0)


@pytest.fixture(scope="module")
def models(make_model: Any) -> tuple[Any, Any]:
    """A model, and the same with a residual stream that is `SCALE` times as large: norms before each part undo it."""
    original, scaled = (make_model("llama", initializer_range=0.1, rms_norm_eps=1e-20) for _ in range(2))
    with torch.no_grad():
        scaled.hf.model.embed_tokens.weight *= SCALE
        for block in scaled.hf.model.layers:
            block.self_attn.o_proj.weight *= SCALE
            block.mlp.down_proj.weight *= SCALE
    return original, scaled


def search(model: Any, **changes: Any) -> Targets:
    return find_targets(model, REQUESTS, LAYER, PREFIXES, dataclasses.replace(CONFIG, **changes))


def typical(states: Tensor) -> Tensor:
    """The size of a typical coordinate of each state: half are smaller than 0.6745 of it, as of a normal variable."""
    return states.abs().sort(dim=1).values[:, (states.shape[1] - 1) // 2] / 0.6745


def mismatch(original: Targets, scaled: Targets) -> float:
    """How far δ of the scaled model is from `SCALE` times that of the original, relative to the latter."""
    expected = SCALE * (original.z - original.initial)
    return float((scaled.z - scaled.initial - expected).norm() / expected.norm())


def test_the_search_scales_with_the_residual_stream(models: tuple[Any, Any]) -> None:
    original, scaled = (search(model) for model in models)
    assert torch.allclose(SCALE * original.initial, scaled.initial, rtol=1e-5)
    assert mismatch(original, scaled) < 1e-3
    for term in ("loss", "probability", "margin", "norm_ratio"):
        assert original.summary[term].tolist() == pytest.approx(scaled.summary[term].tolist(), rel=1e-3, abs=1e-5)
    assert (original.summary["norm_ratio"] > 0.1).all(), "the search must move, else equality says nothing"


def test_an_absolute_learning_rate_does_not(models: tuple[Any, Any]) -> None:
    original, scaled = (search(model, lr=0.05) for model in models)
    assert (original.summary["norm_ratio"] > 3 * scaled.summary["norm_ratio"]).all()
    assert mismatch(original, scaled) > 0.5


def test_a_first_step_is_as_long_as_the_settings_say(models: tuple[Any, Any]) -> None:
    """Adam's first step has length lr in every coordinate."""
    model = models[0]
    relative = search(model, steps=1, relative_lr=0.03)
    lengths = (relative.z - relative.initial).norm(dim=1)
    steps = 0.03 * typical(relative.initial) * model.d_model**0.5
    assert lengths.tolist() == pytest.approx(steps.tolist(), rel=1e-3)
    absolute = search(model, steps=1, lr=0.03)
    lengths = (absolute.z - absolute.initial).norm(dim=1)
    assert lengths.tolist() == pytest.approx([0.03 * model.d_model**0.5] * len(REQUESTS), rel=1e-3)


def test_facts_that_share_a_delta_share_the_smallest_unit(models: tuple[Any, Any]) -> None:
    model = models[0]
    pair = [REQUESTS[0], dataclasses.replace(REQUESTS[0], id="x", prompt="They say that {} likes", target_new="guitar")]
    targets = find_targets(model, pair, LAYER, PREFIXES, dataclasses.replace(CONFIG, steps=1))
    lengths, units = (targets.z - targets.initial).norm(dim=1), typical(targets.initial) * model.d_model**0.5
    assert lengths.tolist() == pytest.approx([CONFIG.relative_lr * float(units.min())] * 2, rel=1e-3)
    assert float(units.max()) > 1.001 * float(units.min()), "else the smallest is not told from the other"


def test_a_massive_coordinate_does_not_lengthen_the_steps(make_model: Any) -> None:
    """One coordinate that is far larger than all others makes up most of ‖h‖, and carries nothing of a fact."""
    plain, massive = (make_model("llama", initializer_range=0.1) for _ in range(2))
    with torch.no_grad():
        massive.hf.model.embed_tokens.weight[:, 5] += 20_000 * float(plain.hf.model.embed_tokens.weight.abs().mean())
    searches = [search(model, steps=1) for model in (plain, massive)]
    norms = [float(targets.initial.norm(dim=1).mean()) for targets in searches]
    steps = [float((targets.z - targets.initial).norm(dim=1).mean()) for targets in searches]
    assert norms[1] > 20 * norms[0]
    assert steps[1] < 3 * steps[0]


def test_the_published_code_keeps_its_absolute_learning_rate(models: tuple[Any, Any]) -> None:
    published = {MemitConfig: 0.5, RomeConfig: 0.5, EmmetConfig: 0.5, AlphaEditConfig: 0.5, PmetConfig: 0.2}
    for kind, rate in published.items():
        config: Any = kind(convention="memit-2022")
        assert config.lr == config.targets.lr == config.targets.learning_rate == rate
        assert kind(convention="memit-2022", lr=3.0).targets.learning_rate == 3.0
        default: Any = kind()
        assert default.lr is None
        assert default.targets.learning_rate == default.relative_lr
    unnamed, named = (search(models[0], convention="memit-2022", **changes) for changes in ({}, {"lr": 0.5}))
    assert torch.equal(unnamed.z, named.z)
    # What decides is in the record.
    assert unnamed.provenance["settings"]["lr"] == 0.5


@pytest.mark.parametrize("name", ["lr", "relative_lr"])
def test_a_learning_rate_is_positive(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 0, expected a number above 0"):
        TargetConfig(**{name: 0})


def test_a_learning_rate_in_two_units_is_refused() -> None:
    """One of the two would be used, and a reader could not tell which."""
    for config in (RomeConfig(lr=0.1), MemitConfig(convention="memit-2022"), TargetConfig(lr=0.1)):
        with pytest.raises(
            InputError, match=r"relative_lr is 0\.7, expected one of the two; leave relative_lr out, or set"
        ):
            dataclasses.replace(config, relative_lr=0.7)
        assert dataclasses.replace(config, relative_lr=0.7, lr=None, convention="default").relative_lr == 0.7
