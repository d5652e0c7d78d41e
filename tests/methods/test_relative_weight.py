"""λ in units of the new keys' strength kᵀM⁻¹k: free of the scale of the keys and of the number of facts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.spreading import PREFIXES, REQUESTS
from torch import Tensor

from mechedit.cli.parsing import method_config
from mechedit.errors import InputError
from mechedit.methods import METHODS, MemitConfig, PmetConfig, Ridge, memit, pmet
from mechedit.methods.rules import key_strength
from mechedit.models import load_model
from mechedit.moments import SecondMoment
from mechedit.solve import factorize

WIDTH, OUTPUTS = 96, 32
WEIGHT = 0.25


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def moment() -> Tensor:
    """E[k kᵀ] of correlated keys of unequal sizes."""
    keys = drawn(400, WIDTH) @ (drawn(WIDTH, WIDTH, seed=1) / 10) + torch.linspace(0, 2, WIDTH, dtype=torch.float64)
    return keys.T @ keys / len(keys)


def written(rule: Ridge, keys: Tensor, residuals: Tensor) -> Tensor:
    """How much of each fact's residual its key gets: 1 for all of it."""
    outputs = rule.update(0, keys, residuals).delta.T @ keys
    return (outputs * residuals).sum(0) / residuals.square().sum(0)


def orthogonal_keys(moment: Tensor, strengths: Tensor) -> Tensor:
    """Keys, one per column, that are orthogonal in M⁻¹, with kᵀM⁻¹k as given."""
    basis = torch.linalg.qr(drawn(WIDTH, len(strengths), seed=2)).Q
    return torch.linalg.cholesky(moment) @ (basis * strengths.sqrt())


@pytest.mark.parametrize("scale", [1e-2, 50.0])
@pytest.mark.parametrize(("of_keys", "of_text"), [(1, 1), (1, 0), (0, 1)])
def test_the_scale_of_the_keys_does_not_matter(moment: Tensor, scale: float, of_keys: int, of_text: int) -> None:
    """With K → aK, with M → a²M, and with both, what is written stays."""
    keys, residuals = drawn(WIDTH, 7, seed=3), drawn(OUTPUTS, 7, seed=4)

    def change(weight: float, *, relative: bool) -> float:
        """The largest change of what a fact gets, by the scaling."""
        before, after = (
            written(
                Ridge(moments={0: a ** (2 * of_text) * moment}, weight=weight, relative=relative),
                a**of_keys * keys,
                residuals,
            )
            for a in (1.0, scale)
        )
        return float((before - after).abs().max())

    assert change(WEIGHT, relative=True) < 1e-8
    # The control: an absolute λ stands that only where the text's keys grow with the facts'.
    absolute = change(WEIGHT * key_strength(keys, factorize(moment)), relative=False)
    assert absolute < 1e-8 if of_keys == of_text else absolute > 0.1


@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_number_of_orthogonal_facts_does_not_matter(moment: Tensor, count: int) -> None:
    keys = orthogonal_keys(moment, torch.full((count,), 3e4, dtype=torch.float64))
    residuals = drawn(OUTPUTS, count, seed=5)
    part = written(Ridge(moments={0: moment}, weight=WEIGHT, relative=True), keys, residuals)
    assert part.tolist() == pytest.approx([1 / (1 + WEIGHT)] * count)
    # The control: λ in proportion to the number of facts writes less of each.
    proportional = written(Ridge(moments={0: moment}, weight=1e4 * count), keys, residuals)
    assert proportional.tolist() == pytest.approx([3e4 / (1e4 * count + 3e4)] * count)


@pytest.mark.parametrize("strength", [10.0, 1e6])
def test_the_strength_of_the_keys_does_not_matter(moment: Tensor, strength: float) -> None:
    """A model whose subjects lie far from the text's keys is edited as much as one whose subjects lie near them."""
    keys = orthogonal_keys(moment, torch.full((3,), strength, dtype=torch.float64))
    residuals = drawn(OUTPUTS, 3, seed=6)
    part = written(Ridge(moments={0: moment}, weight=WEIGHT, relative=True), keys, residuals)
    assert part.tolist() == pytest.approx([1 / (1 + WEIGHT)] * 3)
    # The control: the published 15,000 writes next to nothing of the one, and next to all of the other.
    published = written(Ridge(moments={0: moment}, weight=15_000.0), keys, residuals)
    assert published.tolist() == pytest.approx([strength / (15_000 + strength)] * 3)


def test_the_unit_is_the_median_and_has_the_mean_of_the_width(moment: Tensor) -> None:
    factor = factorize(moment)
    strengths = torch.tensor([1.0, 5.0, 1e5], dtype=torch.float64)
    assert key_strength(orthogonal_keys(moment, strengths), factor) == pytest.approx(5.0)
    drawn_like_text = torch.linalg.cholesky(moment) @ drawn(WIDTH, 4000, seed=7)
    assert key_strength(drawn_like_text, factor) == pytest.approx(WIDTH, rel=0.03)


def test_a_collected_moment_and_its_matrix_give_one_update(moment: Tensor) -> None:
    """Whether the factor is kept with the moment or made for the update."""
    keys, residuals = drawn(WIDTH, 5, seed=3), drawn(OUTPUTS, 5, seed=4)
    collected = SecondMoment(layer=0, matrix=moment, count=400, provenance={})
    for relative in (True, False):
        stored, bare = (
            Ridge(moments={0: source}, weight=WEIGHT, relative=relative).update(0, keys, residuals).delta
            for source in (collected, moment)
        )
        assert torch.allclose(stored, bare, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(
        bare, Ridge(moments={0: moment}, weight=WEIGHT, relative=True).update(0, keys, residuals).delta
    )


@pytest.mark.parametrize("method", [memit, pmet])
def test_a_method_takes_its_weight_in_that_unit(make_model: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gpt2", initializer_range=0.05)
    keys = drawn(400, WIDTH, seed=8)
    moments, strengths = {1: keys.T @ keys / len(keys)}, []

    def noted(keys: Tensor, factor: Any) -> float:
        strengths.append(key_strength(keys, factor))
        return strengths[-1]

    def edit(**weight: float) -> Tensor:
        return method(model, REQUESTS, [1], moments, PREFIXES, method.config(steps=2, **weight)).delta(1)

    monkeypatch.setattr("mechedit.methods.rules.key_strength", noted)
    relative = edit(relative_covariance_weight=WEIGHT)
    absolute = edit(covariance_weight=WEIGHT * strengths[0])
    assert len(strengths) == 1
    scale = float(relative.abs().max())
    assert torch.allclose(relative, absolute, rtol=0, atol=1e-6 * scale)
    assert float((relative - edit(covariance_weight=100 * WEIGHT * strengths[0])).abs().max()) > 0.1 * scale


def test_the_published_code_keeps_its_absolute_weight() -> None:
    for kind, weight in ((MemitConfig, 15_000.0), (PmetConfig, 6_000.0)):
        config: Any = kind(convention="memit-2022")
        assert config.covariance_weight == weight
        rule = config.rule({}, {})
        assert (rule.weight, rule.relative) == (weight, False)
        assert kind(convention="memit-2022", covariance_weight=2.0).covariance_weight == 2.0
        default: Any = kind()
        assert default.covariance_weight is None
        rule = default.rule({}, {})
        assert (rule.weight, rule.relative) == (default.relative_covariance_weight, True)
    assert {name for name, method in METHODS.items() if hasattr(method.config, "rule")} == {"memit", "pmet"}


@pytest.mark.parametrize("name", ["covariance_weight", "relative_covariance_weight"])
def test_a_weight_is_positive(name: str) -> None:
    for value, message in ((-1, "expected a number of at least 0 and at most"), (0, "expected a number above 0")):
        with pytest.raises(InputError, match=f"{name} is {value}, {message}"):
            MemitConfig(**{name: value})


def test_a_weight_in_two_units_is_refused() -> None:
    for config in (MemitConfig(covariance_weight=3.0), PmetConfig(convention="memit-2022")):
        with pytest.raises(InputError, match=r"relative_covariance_weight is 0\.7, expected one of the two"):
            dataclasses.replace(config, relative_covariance_weight=0.7)
        free: Any = dataclasses.replace(
            config, relative_covariance_weight=0.7, covariance_weight=None, convention="default"
        )
        assert free.rule({}, {}).weight == 0.7


def test_none_is_set_on_the_command_line() -> None:
    """So that what ships with a checkpoint in one unit can be had in the other."""
    model = load_model("tiny")
    shipped: Any = method_config("memit", model, 0, None)
    assert shipped.covariance_weight is not None
    config: Any = method_config("memit", model, 0, ["covariance_weight=none", "relative_covariance_weight=0.7"])
    assert (config.covariance_weight, config.relative_covariance_weight) == (None, 0.7)
    # What is named at all goes before what ships, also where that is in the other unit.
    assert method_config("memit", model, 0, ["relative_covariance_weight=0.7"]) == config
    with pytest.raises(InputError, match="expected one of the two"):
        method_config("memit", model, 0, ["relative_covariance_weight=0.7", "covariance_weight=3"])
    with pytest.raises(InputError, match="'none' is not a number"):
        method_config("memit", model, 0, ["clamp=none"])
