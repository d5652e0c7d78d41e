"""Damping, and the warnings of edits: larger than their weights, from nearly singular systems, or hardly written."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import mechedit as me
from mechedit.cli.describe import describe_edit, format_description
from mechedit.errors import InputError
from mechedit.evaluation.summary_file import edit_record
from mechedit.methods import METHODS
from mechedit.methods.plausibility import MOST_CONDITION
from mechedit.methods.rules import damped_moment
from mechedit.moments.key_energy import TEXTS
from mechedit.solve import damped, factorize
from mechedit.solve.update import rounded_update

REPEATED = ["Miles Davis plays the trumpet in Seattle."] * 20
"""Tokens enough, but always the same few keys."""
REQUEST = me.EditRequest(id="1", subject="Miles Davis", prompt="{} plays the", target_new="guitar")
DAMPED = ["memit", "rome", "emmet", "pmet"]
"""The methods that invert E[k kᵀ]."""
SINGULAR = "ignore:the second moment of layer 1 is"
LARGER = "ignore:the update is larger"


@pytest.fixture(scope="module")
def moment(make_model: Any) -> me.SecondMoment:
    """Of layer 1 of a model like `lens_model`, over enough text."""
    return me.collect_moments(make_model("gpt2"), list(TEXTS), [1])[1]


def edit_with(method: str, model: Any, moment: Any, damping: float = 0.0, **changes: Any) -> me.Edit:
    config = dataclasses.replace(METHODS[method].config(damping=damping), steps=2, **changes)
    return METHODS[method](model, [REQUEST], [1], {1: moment}, ["{}"], config)


def test_damping_lifts_the_smallest_eigenvalue_and_bounds_the_condition() -> None:
    keys = torch.randn(40, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = keys @ keys.T
    with pytest.raises(InputError, match=r"not positive definite.*a larger weight does not help.*Damping \(such as"):
        factorize(matrix)  # ten keys in forty dimensions
    for damping in (1e-6, 1e-3, 1.0):
        values = torch.linalg.eigvalsh(damped(matrix, damping))
        mean = float(torch.linalg.eigvalsh(matrix).mean())
        assert float(values[0]) == pytest.approx(damping * mean, rel=1e-6)
        assert float(values[-1] / values[0]) <= len(matrix) / damping + 1
        factorize(damped(matrix, damping))
    assert damped(matrix, 0) is matrix
    for bad in (-1e-4, float("inf"), float("nan")):
        with pytest.raises(InputError, match="the damping"):
            damped(matrix, bad)


@pytest.mark.filterwarnings(LARGER)
@pytest.mark.parametrize("method", DAMPED)
def test_a_damped_edit_is_that_of_the_damped_moment(lens_model: Any, moment: Any, method: str) -> None:
    identity = torch.eye(len(moment.matrix), dtype=torch.float64)
    by_hand = moment.matrix + 0.3 * moment.matrix.trace() / len(moment.matrix) * identity
    plain = edit_with(method, lens_model, moment).delta(1)
    damped_delta = edit_with(method, lens_model, moment, 0.3).delta(1)
    expected = edit_with(method, lens_model, dataclasses.replace(moment, matrix=by_hand)).delta(1)
    torch.testing.assert_close(damped_delta, expected, rtol=1e-4, atol=1e-7)
    assert float((damped_delta - plain).norm()) > 0.02 * float(plain.norm())
    bare = edit_with(method, lens_model, moment.matrix, 0.3).delta(1)
    torch.testing.assert_close(bare, damped_delta, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings(LARGER)
@pytest.mark.parametrize("method", DAMPED)
def test_without_damping_nothing_is_copied_or_changed(lens_model: Any, moment: Any, method: str) -> None:
    assert damped_moment(moment, 0) is moment
    assert damped_moment(moment.matrix, 0.0) is moment.matrix
    edit = edit_with(method, lens_model, moment)
    assert METHODS[method].config().damping == 0 == edit.manifest["settings"]["damping"]
    assert edit_with(method, lens_model, moment, 1e-4).manifest["settings"]["damping"] == 1e-4


@pytest.mark.filterwarnings(SINGULAR, LARGER)
@pytest.mark.parametrize("method", DAMPED)
def test_damping_helps_where_a_weight_cannot(lens_model: Any, method: str) -> None:
    singular = me.collect_moments(lens_model, REPEATED, [1])[1]
    with pytest.raises(InputError, match="is not positive definite"):
        edit_with(method, lens_model, singular)
    edit = edit_with(method, lens_model, singular, 1e-3)
    assert edit.delta(1).any()
    assert edit.manifest["residuals"][0]["condition"] < MOST_CONDITION


def test_an_update_larger_than_its_weight_is_warned_of_with_numbers(
    lens_model: Any, moment: Any, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=r"larger than the weights .*layer 1: ‖ΔW‖ = .*, ‖W‖ = .*set damping"):
        large = edit_with("rome", lens_model, moment, clamp=1e6, relative_lr=1e5)
    norm, weight = float(large.delta(1).norm()), float(lens_model.projection(1).double().norm())
    assert norm > weight
    (line,) = large.manifest["warnings"]
    assert f"‖ΔW‖ = {norm:.3g}, ‖W‖ = {weight:.3g}" in line
    large.save(tmp_path / "edit.safetensors")
    description = describe_edit(me.Edit.load(tmp_path / "edit.safetensors"))
    assert description["warnings"] == [line]
    assert "warning   the update is larger" in format_description(tmp_path, description)
    assert edit_record(large) == {**(edit_record(large) or {}), "warnings": [line]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = edit_with("rome", lens_model, moment, clamp=1e-3)
    assert float(small.delta(1).norm()) < weight
    assert "warnings" not in small.manifest
    assert "warnings" not in (edit_record(small) or {})
    assert describe_edit(small)["warnings"] == []


@pytest.mark.filterwarnings(SINGULAR, LARGER)
def test_a_system_of_a_large_condition_is_warned_of_with_its_number(lens_model: Any, moment: Any) -> None:
    values, vectors = torch.linalg.eigh(moment.matrix)
    values[:3] = 1e-12 * values[-1]
    nearly = dataclasses.replace(moment, matrix=vectors @ values.diag() @ vectors.T)
    with pytest.warns(UserWarning, match=r"layer 1: condition about \d\.\de\+1[2-9]; above 1e\+12"):
        edit = edit_with("memit", lens_model, nearly)
    assert edit.manifest["residuals"][0]["condition"] > MOST_CONDITION
    assert any("condition about" in line for line in edit.manifest["warnings"])
    damped_edit = edit_with("memit", lens_model, nearly, 1e-6)
    assert not any("condition about" in line for line in damped_edit.manifest.get("warnings", []))
    assert json.dumps(edit.manifest["warnings"])


def test_residuals_that_are_hardly_written_are_warned_of_layer_by_layer(lens_model: Any, moment: Any) -> None:
    with pytest.warns(UserWarning, match=r"of half of the facts \d+% or more .*left after each layer: 1: \d+%\), so"):
        edit = edit_with("memit", lens_model, moment, relative_covariance_weight=50.0)
    (line,) = edit.manifest["warnings"]
    assert f"1: {edit.manifest['residuals'][0]['after']:.0%})" in line
    assert min(edit.manifest["left"]) > 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = edit_with("memit", lens_model, moment, relative_covariance_weight=0.01, clamp=0.1)
    assert "warnings" not in written.manifest
    assert max(written.manifest["left"]) < 0.5


def test_a_solution_that_overflows_is_not_told_to_raise_the_weight() -> None:
    column = torch.ones(3, 1, dtype=torch.float32)
    with pytest.raises(InputError, match=r"set damping \(such as 1e-4\).*a larger weight does not help") as error:
        rounded_update(torch.full((3, 1), 1e300, dtype=torch.float64), 0.0, 1e30, column, column)
    assert "raise the weight" not in str(error.value)
