"""Moments that are singular or nearly so are warned of when they are collected, loaded and used."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import mechedit as me
from mechedit.errors import InputError
from mechedit.moments.key_energy import TEXTS
from mechedit.moments.second_moment import MOST_CONDITION

REPEATED = ["Miles Davis plays the trumpet in Seattle."] * 20
"""Tokens enough, but always the same few keys."""
REQUEST = me.EditRequest(id="1", subject="Miles Davis", prompt="{} plays the", target_new="guitar")
REMEDY = "Collect over more and more varied text, edit other layers, or use alphaedit"


def test_uniform_text_is_warned_of_and_varied_text_is_not(lens_model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        varied = me.collect_moments(lens_model, [f"{n} {text}" for n in range(9) for text in TEXTS], [1])[1]
    assert varied.factor.condition < MOST_CONDITION
    with pytest.warns(UserWarning, match=f"the second moment of layer 1 is singular: .* 96 dimensions.*{REMEDY}"):
        uniform = me.collect_moments(lens_model, REPEATED, [1])[1]
    # Products are float32's, so that what is zero is so to seven digits.
    assert torch.linalg.matrix_rank(uniform.matrix, rtol=1e-6) < uniform.matrix.shape[0] < uniform.count
    assert torch.linalg.matrix_rank(varied.matrix, rtol=1e-6) == varied.matrix.shape[0]


def test_parts_that_merge_to_a_singular_moment_are_warned_of(lens_model: Any, tmp_path: Path) -> None:
    for part in (0, 1):
        me.collect_shard(lens_model, 16 * REPEATED, [1], (part, 2), tmp_path)
    with pytest.warns(UserWarning, match="layer 1 is singular"):
        me.merge_moments(tmp_path)


def test_an_edit_with_a_nearly_singular_moment_is_warned_of(lens_model: Any) -> None:
    moment = me.collect_moments(lens_model, list(TEXTS), [1])[1]
    values, vectors = torch.linalg.eigh(moment.matrix)
    values[:3] = 1e-13 * values[-1]
    nearly = me.SecondMoment(
        layer=1, matrix=vectors @ values.diag() @ vectors.T, count=moment.count, provenance=moment.provenance
    )
    config = me.MemitConfig(steps=1, covariance_weight=1.0)
    with pytest.warns(UserWarning, match=r"layer 1 is nearly singular \(condition about \d\.\de\+1\d\)"):
        me.memit(lens_model, [REQUEST], [1], {1: nearly}, ["{}"], config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        me.memit(lens_model, [REQUEST], [1], {1: moment}, ["{}"], config)


@pytest.mark.filterwarnings("ignore:the second moment of layer 1 is singular")
def test_the_remedies_of_the_solve_work_and_a_larger_weight_does_not(lens_model: Any) -> None:
    singular = me.collect_moments(lens_model, REPEATED, [1])
    for weight in (1.0, 1e6, 1e12):
        config = me.MemitConfig(steps=1, covariance_weight=weight)
        with pytest.raises(InputError, match=r"more varied text, or edit other layers; a larger weight does not help"):
            me.memit(lens_model, [REQUEST], [1], singular, ["{}"], config)
    assert me.alphaedit(lens_model, [REQUEST], [1], singular, ["{}"], me.AlphaEditConfig(steps=1)).delta(1).any()
    enough = me.collect_moments(lens_model, list(TEXTS), [1])
    assert me.memit(lens_model, [REQUEST], [1], enough, ["{}"], me.MemitConfig(steps=1)).delta(1).any()


def test_files_of_other_settings_name_the_option_that_replaces_them(lens_model: Any, tmp_path: Path) -> None:
    me.collect_moments(lens_model, list(TEXTS), [1], out=tmp_path)
    with pytest.raises(InputError, match=r"made with texts = .*choose another --out, or pass --overwrite"):
        me.collect_moments(lens_model, [*TEXTS, "And so on."], [1], out=tmp_path)
    for part in (0, 1):
        me.collect_shard(lens_model, 30 * TEXTS, [1], (part, 2), tmp_path)
    with pytest.raises(InputError, match=r"made with texts = .*pass --overwrite"):
        me.merge_moments(tmp_path)
    assert me.merge_moments(tmp_path, overwrite=True)[1].count > len(TEXTS)
