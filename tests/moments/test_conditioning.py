"""Moments that are singular or nearly so are warned of when they are collected, loaded and used."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import mechedit as me
from mechedit.cli import main
from mechedit.cli.app import LONGEST_LINE
from mechedit.errors import InputError
from mechedit.moments.conditioning import MOST_CONDITION, SEEN, Conditioning, measure_conditioning, warn_if_singular
from mechedit.moments.key_energy import TEXTS

REPEATED = ["Miles Davis plays the trumpet in Seattle."] * 20
"""Tokens enough, but always the same few keys."""
REQUEST = me.EditRequest(id="1", subject="Miles Davis", prompt="{} plays the", target_new="guitar")
REMEDY = "collect over more varied text, edit other layers, set damping .*, or use alphaedit"


def test_uniform_text_is_warned_of_and_varied_text_is_not(lens_model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        varied = me.collect_moments(lens_model, [f"{n} {text}" for n in range(9) for text in TEXTS], [1])[1]
    assert varied.factor.condition < MOST_CONDITION
    with pytest.warns(
        UserWarning, match=f"the second moment of layer 1 is singular: .* keys' 96 dimensions .*never seen.*{REMEDY}"
    ):
        uniform = me.collect_moments(lens_model, REPEATED, [1])[1]
    # Products are float32's, so that what is zero is so to seven digits.
    assert torch.linalg.matrix_rank(uniform.matrix, rtol=1e-6) < uniform.matrix.shape[0] < uniform.count
    assert torch.linalg.matrix_rank(varied.matrix, rtol=1e-6) == varied.matrix.shape[0]


def test_directions_that_no_key_has_are_counted_and_the_tokens_that_are_needed() -> None:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(50, 4_000, generator=draw)
    seen_by_all = measure_conditioning((keys @ keys.T).double() / 4_000, layer=3, tokens=4_000)
    assert (seen_by_all.rank, seen_by_all.warning) == (50, None)
    assert "layer 3: 50 of 50 directions of the keys seen in 4,000 tokens" in seen_by_all.in_words()
    assert "better 100 · d_mlp = 5,000" in seen_by_all.in_words()
    keys = torch.randn(50, 30, generator=draw) @ torch.randn(30, 4_000, generator=draw)
    subspace = (keys @ keys.T).double() / 4_000
    for tokens, need in ((4_000, "5,000 tokens are needed"), (6_000, "such text shows no others")):
        in_subspace = measure_conditioning(subspace, layer=3, tokens=tokens)
        assert in_subspace.rank == 30
        assert "20 never seen" in in_subspace.in_words()
        assert need in in_subspace.in_words()
        assert in_subspace.warning is not None
        assert f"20 of its keys' 50 dimensions were never seen in {tokens:,} tokens" in in_subspace.warning
        assert need in in_subspace.warning


@pytest.mark.parametrize(("width", "rank"), [(40, 1), (64, 40), (100, 99), (200, 120)])
def test_directions_are_counted_as_by_all_eigenvalues(width: int, rank: int) -> None:
    draw = torch.Generator().manual_seed(width)
    keys = torch.randn(width, rank, generator=draw) @ torch.randn(rank, 3 * width, generator=draw)
    keys *= torch.logspace(0, -2, width)[:, None]
    moment = (keys @ keys.T).double()
    values = torch.linalg.eigvalsh(moment)
    seen = int((values > SEEN * values[-1]).sum())
    assert 0 < seen <= rank, "rounding is not counted, and very small directions are not seen"
    assert measure_conditioning(moment, layer=0, tokens=1, condition=math.inf).rank == seen
    # Control: the sum of the eigenvalues, which takes no iteration, is another bound, and here it counts fewer.
    assert (values > 1e3 * SEEN * values.sum()).sum() < seen or rank == 1


def test_of_a_moment_of_nothing_no_direction_is_seen() -> None:
    nothing = torch.zeros(8, 8, dtype=torch.float64)
    assert measure_conditioning(nothing, layer=0, tokens=1, condition=math.inf).rank == 0


def test_one_line_warns_of_all_layers_and_is_not_cut(lens_model: Any) -> None:
    with pytest.warns(UserWarning, match=f"of layers 0, 1 are singular or nearly so: of [01], .*{REMEDY}") as said:
        me.collect_moments(lens_model, REPEATED, [0, 1])
    assert len(said) == 1
    long = [
        Conditioning(layer=layer, width=28_672, rank=10_000, tokens=100_000_000, condition=math.inf)
        for layer in range(80)
    ]
    for count in (1, len(long)):
        with pytest.warns(UserWarning, match="singular") as said:
            warn_if_singular(*long[:count])
        assert len(f"mechedit: warning: {said[0].message}") < LONGEST_LINE


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


def test_the_command_says_at_its_end_what_was_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Miles Davis plays the trumpet in Seattle.\n\n" * 100)
    arguments = ["moments", "--layers", "1", "--texts", str(texts), "--out", str(tmp_path), "--json"]
    for _ in range(2):  # collected, and then read from their file
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        captured = capsys.readouterr()
        assert exit_info.value.code == 0
        (line,) = [line for line in captured.err.splitlines() if line.startswith("layer 1: ")]
        directions = json.loads(captured.out)["directions"]["1"]
        assert directions["rank"] < directions["of"] == 768
        assert f"{directions['rank']} of 768 directions of the keys seen" in line
        assert f"{768 - directions['rank']} never seen (100 · d_mlp = 76,800 tokens are needed)" in line
