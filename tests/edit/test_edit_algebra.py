"""Edits add up, and are shortened as well as any matrix of that rank can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.edits import identical, random_edit, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from mechedit.edit import Edit, Factors, apply_, edited, merge, subtract, summarize, truncate, undo_
from mechedit.errors import InputError

BASE = {"model": "x", "weights_hash": "w", "tokenizer_hash": "t", "dtype": "float32", "backend": "transformer_lens"}


def drawn(seed: int, ranks: dict[int, int], manifest: dict[str, Any] | None = None, shape=(20, 12)) -> Edit:
    draw = torch.Generator().manual_seed(seed)
    return Edit(
        factors={
            layer: Factors(
                left=torch.randn(shape[0], rank, generator=draw, dtype=torch.float64),
                right=torch.randn(rank, shape[1], generator=draw, dtype=torch.float64),
            )
            for layer, rank in ranks.items()
        },
        manifest={"method": f"m{seed}", "model": BASE, **(manifest or {})},
    )


def total(edits: list[Edit], layer: int) -> torch.Tensor:
    return sum((edit.delta(layer) for edit in edits if layer in edit.layers), torch.zeros(20, 12).double())


@given(ranks=st.lists(st.dictionaries(st.integers(0, 3), st.integers(1, 15), min_size=1), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_a_merged_edit_is_the_sum_and_subtracting_takes_away(ranks: list[dict[int, int]]) -> None:
    edits = [drawn(seed, edit_ranks) for seed, edit_ranks in enumerate(ranks)]
    merged = merge(edits)
    assert merged.layers == sorted({layer for edit_ranks in ranks for layer in edit_ranks})
    for layer in merged.layers:
        torch.testing.assert_close(merged.delta(layer), total(edits, layer), rtol=1e-12, atol=1e-12)
        assert merged.factors[layer].rank == sum(edit_ranks.get(layer, 0) for edit_ranks in ranks)
        assert float(merged.delta(layer).norm()) > 0.1
    rest = merged
    for edit in edits:
        rest = subtract(rest, edit)
    for layer in merged.layers:
        assert float(rest.delta(layer).abs().max()) < 1e-12
    for layer, factors in truncate(rest, error=0).factors.items():
        assert float((factors.left @ factors.right).abs().max()) < 1e-12, layer


def test_what_was_combined_is_noted(tmp_path: Path) -> None:
    first = drawn(0, {1: 2}, {"requests": ["a", "b"], "facts": ["A → x", "B → y"]})
    second = drawn(1, {1: 1, 2: 1}, {"requests": ["c"], "facts": ["C → z"]})
    old = drawn(2, {0: 1}, {"requests": ["d"]})
    merged = merge([first, second])
    assert merged.manifest["method"] == "merge"
    assert merged.manifest["layers"] == [1, 2]
    assert merged.manifest["requests"] == ["a", "b", "c"]
    assert merged.manifest["facts"] == ["A → x", "B → y", "C → z"]
    assert merged.manifest["model"] == BASE
    assert merged.manifest["parts"] == [first.manifest, second.manifest]
    assert "facts" not in merge([first, old]).manifest
    less = subtract(merged, second)
    assert [part["method"] for part in less.manifest["parts"]] == ["merge", "m1"]
    less.save(tmp_path / "edit.safetensors")
    assert Edit.load(tmp_path / "edit.safetensors").manifest == json.loads(json.dumps(less.manifest))


@pytest.mark.parametrize("field", ["dtype", "weights_hash", "tokenizer_hash"])
def test_edits_for_other_weights_do_not_add_up(field: str) -> None:
    edit, foreign = drawn(0, {0: 1}), drawn(1, {0: 1}, {"model": {**BASE, field: "another"}})
    for combine in (lambda: merge([edit, edit, foreign]), lambda: subtract(edit, foreign)):
        with pytest.raises(InputError, match=rf"was made with {field} = 'another', expected '{BASE[field]}'"):
            combine()
    same = drawn(1, {0: 1}, {"model": {**BASE, "model": "another name", "backend": "nnsight"}})
    assert merge([edit, same]).layers == [0]
    with pytest.raises(InputError, match="no edits to merge"):
        merge([])
    with pytest.raises(InputError, match="does not name its weights"):
        merge([drawn(0, {0: 1}, {"model": {}})])


@given(seed=st.integers(0, 99), rank=st.integers(1, 15), terms=st.integers(1, 16))
@settings(max_examples=25, deadline=None)
def test_truncation_is_the_best_of_its_rank(seed: int, rank: int, terms: int) -> None:
    edit = drawn(seed, {3: rank})
    short = truncate(edit, terms)
    delta, actual = edit.delta(3), short.delta(3)
    values = torch.linalg.svdvals(delta)
    tail = float(values[terms:].norm())
    assert short.factors[3].rank == min(terms, rank, 12) == torch.linalg.matrix_rank(actual)
    assert float((delta - actual).norm()) == pytest.approx(tail, abs=1e-9)
    record = short.manifest["truncated"][0]
    assert record["error"] == pytest.approx(tail / float(delta.norm()), abs=1e-9)
    assert (record["layer"], record["rank"], record["of"]) == (3, min(terms, rank, 12), min(rank, 12))
    if terms >= min(rank, 12):
        torch.testing.assert_close(actual, delta, rtol=1e-11, atol=1e-11)
        assert record["error"] < 1e-9


@given(seed=st.integers(0, 99), error=st.floats(0.01, 0.9))
@settings(max_examples=25, deadline=None)
def test_truncation_by_error_keeps_no_more_than_it_must(seed: int, error: float) -> None:
    edit = drawn(seed, {0: 9, 2: 3})
    short = truncate(edit, error=error)
    for layer, record in zip((0, 2), short.manifest["truncated"], strict=True):
        relative = (edit.delta(layer) - short.delta(layer)).norm() / edit.delta(layer).norm()
        assert float(relative) == pytest.approx(record["error"], abs=1e-9)
        assert record["error"] <= error
        if record["rank"] > 1:
            less = truncate(edit, record["rank"] - 1).manifest["truncated"][edit.layers.index(layer)]
            assert less["error"] > error


def test_an_edit_of_nothing_can_be_truncated() -> None:
    nothing = Edit(factors={0: Factors(left=torch.zeros(5, 2), right=torch.ones(2, 4))}, manifest={"model": BASE})
    for short in (truncate(nothing, 1), truncate(nothing, error=0.1)):
        assert short.factors[0].rank == 1
        assert short.manifest["truncated"][0]["error"] == 0
        assert not short.delta(0).any()


@pytest.mark.parametrize("choice", [{}, {"rank": 1, "error": 0.1}, {"rank": 0}, {"error": -0.1}, {"error": 1.5}])
def test_truncation_needs_one_sensible_bound(choice: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        truncate(drawn(0, {0: 2}), **choice)


def test_a_merged_edit_on_a_model_is_both(lens_model: Any) -> None:
    """The same bits as adding both deltas at once, and as two edits in a row."""
    first, second = random_edit(lens_model, 0), random_edit(lens_model, 1, (0, 1))
    before, start = weights(lens_model), lens_model.projection(0).double()
    merged = merge([first, second])
    with edited(lens_model, merged):
        torch.testing.assert_close(
            lens_model.projection(0).double(), start + first.delta(0) + second.delta(0), rtol=1e-7, atol=1e-7
        )
        both = weights(lens_model)
    apply_(lens_model, first)
    follower = Edit(factors=second.factors, manifest={"model": lens_model.provenance()})
    apply_(lens_model, follower)
    close = [torch.allclose(value, both[name], atol=1e-6) for name, value in lens_model.hf.named_parameters()]
    assert all(close)
    undo_(lens_model, follower)
    undo_(lens_model, first)
    assert identical(lens_model, before)


def test_the_summary_has_what_each_layer_gets(lens_model: Any, small_model: Any) -> None:
    edit = random_edit(lens_model, layers=(0, 2), ranks=(3, 5))
    records = [{"layer": 0, "before": 1.0, "after": 0.5, "error": 1e-15, "condition": 7.0}]
    edit = Edit(factors=edit.factors, manifest={**edit.manifest, "residuals": records})
    frame = summarize(edit, lens_model)
    assert list(frame.columns) == [
        "layer", "rank", "norm", "relative", "left", "error", "condition", "truncation",
    ]  # fmt: skip
    assert frame["layer"].tolist() == [0, 2]
    assert frame["rank"].tolist() == [3, 5]
    norms = [float(edit.delta(layer).norm()) for layer in (0, 2)]
    np.testing.assert_allclose(frame["norm"], norms)
    sizes = [float(lens_model.projection(layer).double().norm()) for layer in (0, 2)]
    np.testing.assert_allclose(frame["relative"], np.divide(norms, sizes))
    np.testing.assert_array_equal(frame["left"], [0.5, np.nan])
    assert summarize(edit)["relative"].isna().all()
    short = summarize(truncate(edit, 2))
    assert short["rank"].tolist() == [2, 2]
    assert (short["truncation"] > 0.05).all()
    assert short["left"][0] == 0.5
    with edited(lens_model, edit), pytest.raises(InputError, match="undo other edits"):
        summarize(edit, lens_model)


@pytest.mark.parametrize("rank", [1, 11, 12, 40])
def test_the_norm_is_that_of_the_product_with_fewer_and_with_more_terms_than_its_width(rank: int) -> None:
    edit = drawn(rank, {0: rank})
    (norm,) = summarize(edit)["norm"]
    np.testing.assert_allclose(norm, float(edit.delta(0).norm()), rtol=1e-12)
    assert norm > 1
