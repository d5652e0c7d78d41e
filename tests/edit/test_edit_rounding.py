"""In half precision an edit is neither rounded away nor rounded twice, and the same bits come out each time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.edits import LAYERS, identical, random_edit, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechedit.edit import Edit, Factors, add_, apply_, edited, restoring, undo_
from mechedit.edit.applied_edits import applied_edits
from mechedit.edit.weights import rounded_sum, stochastically_rounded
from mechedit.errors import InputError
from mechedit.models import load_model

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def half_model(make_hf: Any, tokenizer: Any) -> Any:
    return load_model(make_hf("gpt2").bfloat16(), tokenizer=tokenizer)


def rounded(value: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return stochastically_rounded(value, dtype, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", HALF)
def test_every_number_of_the_dtype_stays_as_it_is(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = numbers[numbers.isfinite()]
    assert len(finite) > 63_000
    assert torch.equal(rounded(finite.double()[None], dtype)[0], finite)


@given(
    mantissa=st.floats(1, 2, exclude_max=True),
    exponent=st.integers(-30, 14),
    seed=st.integers(0, 9),
    sign=st.booleans(),
)
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("dtype", HALF)
def test_a_number_goes_to_its_neighbors_and_on_average_nowhere(
    dtype: torch.dtype, mantissa: float, exponent: int, seed: int, sign: bool
) -> None:
    value = torch.full((200, 100), mantissa * 2.0**exponent * (-1 if sign else 1), dtype=torch.float64)
    actual = rounded(value, dtype, seed).double()
    nearest = value[0, 0].to(dtype)
    neighbors = {float(torch.nextafter(nearest, torch.tensor(end).to(dtype))) for end in (-torch.inf, torch.inf)}
    assert set(actual.unique().tolist()) <= neighbors | {float(nearest)}
    step = max(neighbors) - min(neighbors)
    assert float((actual - value).abs().max()) < step
    # 20,000 draws: five standard errors of a share.
    assert float((actual.mean() - value[0, 0]).abs()) <= 5 * step / 2 / 20_000**0.5


def test_large_matrices_are_rounded_in_pieces_that_draw_afresh() -> None:
    """Rounding whole and rounding 1,024 rows at a time is the same, and no two pieces share their draws."""
    base = torch.ones(3000, 2, dtype=torch.bfloat16)
    delta = torch.full((3000, 2), 2.0**-8, dtype=torch.float64)
    actual = rounded_sum(base, [delta], "here")
    assert torch.equal(actual, rounded_sum(base, [delta], "here"))
    up = actual > 1
    assert up.double().mean() == pytest.approx(0.5, abs=0.04)
    assert (up[:1024] != up[1024:2048]).double().mean() == pytest.approx(0.5, abs=0.05)
    # Two matrices draw differently.
    second = rounded_sum(2 * base, [2 * delta], "here")
    assert (up != (second > 2)).double().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("dtype", HALF)
def test_an_edit_far_below_one_unit_in_the_last_place_is_there(
    make_hf: Any, tokenizer: Any, dtype: torch.dtype
) -> None:
    """ΔW = k vᵀ of 0.05 units on average: nearest rounding loses it whole, ours writes it to a few per cent."""
    model = load_model(make_hf("gpt2", n_embd=64, n_inner=8192).to(dtype), tokenizer=tokenizer)
    unit = torch.finfo(dtype).eps / 2
    draw = torch.Generator().manual_seed(0)
    # All weights between 1/2 and 1, so that all have the same unit.
    start = torch.empty(8192, 64).uniform_(0.55, 0.95, generator=draw).to(dtype)
    with torch.no_grad():
        model.projection(1).copy_(start)
    signs = [(2 * torch.rand(size, generator=draw, dtype=torch.float64) - 1) for size in (8192, 64)]
    key, value = (sign.sign() * (0.5 + sign.abs()) for sign in signs)
    delta = torch.outer(key, value)
    delta *= 0.05 * unit / delta.abs().mean()
    assert torch.equal((start.double() + delta).to(dtype), start)
    edit = Edit(
        factors={1: Factors(left=key[:, None], right=(key @ delta / (key @ key))[None])},
        manifest={"model": model.provenance()},
    )
    assert torch.allclose(edit.delta(1), delta)
    with edited(model, edit):
        change = key @ (model.projection(1).double() - start.double())
    response = key @ delta
    assert float(change @ response / (response @ response)) == pytest.approx(1, abs=0.03)
    assert float((change - response).norm() / response.norm()) < 0.08


def test_the_same_edit_gives_the_same_bits(make_hf: Any, tokenizer: Any, half_model: Any) -> None:
    """On both backends, whatever was drawn before, while an edit is being made and when it is applied."""
    edit = random_edit(half_model)
    with edited(half_model, edit):
        expected = weights(half_model)
    torch.rand(7)
    second = load_model(make_hf("gpt2").bfloat16(), tokenizer=tokenizer, backend="nnsight")
    state = torch.get_rng_state()
    apply_(second, edit)
    assert identical(second, expected)
    assert torch.equal(torch.get_rng_state(), state)
    undo_(second, edit)
    with restoring(half_model, edit.layers):
        for layer in edit.layers:
            add_(half_model, layer, edit.delta(layer))
        assert identical(half_model, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_edits_in_a_row_are_rounded_from_the_exact_base(make_hf: Any, tokenizer: Any, dtype: torch.dtype) -> None:
    model = load_model(make_hf("llama").to(dtype), tokenizer=tokenizer)
    base = {layer: model.projection(layer).clone() for layer in range(3)}
    states, edits = [weights(model)], []
    for seed, layers in enumerate([(0, 2), (0, 1), (0, 1)]):
        edits.append(random_edit(model, seed, layers))
        apply_(model, edits[-1])
        states.append(weights(model))
    deltas = [edit.delta(0) for edit in edits]
    assert torch.equal(model.projection(0), rounded_sum(base[0], deltas, ""))
    stepwise = base[0]
    for delta in deltas:
        stepwise = rounded_sum(stepwise, [delta], "")
    assert not torch.equal(model.projection(0), stepwise)
    # One copy per layer, however many edits are on it.
    assert [sorted(entry.bases) for entry in applied_edits(model)] == [[0, 2], [1], []]
    for edit, before in zip(reversed(edits), reversed(states[:-1]), strict=True):
        undo_(model, edit)
        assert identical(model, before)
    assert applied_edits(model) == ()


def test_weights_that_something_else_changed_are_not_lost(half_model: Any) -> None:
    first = random_edit(half_model)
    apply_(half_model, first)
    with torch.no_grad():
        half_model.projection(0).mul_(2)
    tuned = weights(half_model)
    second = random_edit(half_model, 1)
    apply_(half_model, second)
    expected = rounded_sum(tuned["transformer.h.0.mlp.c_proj.weight"], [second.delta(0)], "")
    assert torch.equal(half_model.projection(0), expected)
    assert [sorted(entry.bases) for entry in applied_edits(half_model)] == [[0, 2], [0]]
    undo_(half_model, second)
    assert identical(half_model, tuned)


def test_an_undo_whose_sums_come_out_otherwise_is_refused(half_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = []
    for seed in range(2):
        edits.append(random_edit(half_model, seed))
        apply_(half_model, edits[-1])
    before, delta = weights(half_model), Edit.delta
    monkeypatch.setattr(Edit, "delta", lambda self, layer, mesh: 1.01 * delta(self, layer, mesh))
    with pytest.raises(InputError, match="number of threads"):
        undo_(half_model, edits[1])
    assert identical(half_model, before)
    monkeypatch.undo()
    undo_(half_model, edits[1])
    undo_(half_model, edits[0])


def test_the_ledger_follows_the_weights(half_model: Any) -> None:
    """What is applied within `edited` goes when it ends; a copied model can undo, without copies of the copies."""
    before, outer = weights(half_model), random_edit(half_model)
    with edited(half_model, outer):
        apply_(half_model, random_edit(half_model, 1))
    assert applied_edits(half_model) == ()
    assert identical(half_model, before)
    apply_(half_model, outer)
    copied = load_model(copy.deepcopy(half_model.hf), tokenizer=half_model.tokenizer)
    assert applied_edits(copied)[0].bases[0] is applied_edits(half_model)[0].bases[0]
    undo_(copied, outer)
    assert identical(copied, before)
    assert not identical(half_model, before)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1e3), (torch.float32, 1e36)])
def test_an_overflow_is_refused(make_hf: Any, tokenizer: Any, dtype: torch.dtype, size: float) -> None:
    model = load_model(make_hf("gpt2").to(dtype), tokenizer=tokenizer)
    before = weights(model)
    unit = size**0.5  # neither factor alone is out of bounds
    fits, bursts = (
        Edit(
            factors={
                layer: Factors(
                    left=torch.full((96, 1), scale / unit).double(), right=torch.full((1, 32), 60.0 * unit).double()
                )
                for layer, scale in zip(LAYERS, (1.0, last), strict=True)
            },
            manifest={"model": model.provenance()},
        )
        for last in (size, 10 * size)
    )
    with edited(model, fits):
        assert model.projection(2).isfinite().all()
    for change in (apply_, lambda model, edit: edited(model, edit).__enter__()):
        with pytest.raises(InputError, match=rf"3072 weights of layer 2 beyond what {dtype} holds"):
            change(model, bursts)
        assert identical(model, before)
    assert applied_edits(model) == ()
