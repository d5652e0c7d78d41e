"""The quicker GELU is the tanh form, with its slope, and overwrites what nobody else needs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mechedit.models import fast_gelu as gelu
from mechedit.models.fast_gelu import InPlaceGelu


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that do not divide what they are taken from."""
    monkeypatch.setattr(gelu, "CHUNK", 7)


def sample(dtype: torch.dtype) -> torch.Tensor:
    """Large and small arguments of both signs."""
    generator = torch.Generator().manual_seed(0)
    return torch.cat([torch.linspace(-30, 30, 40), torch.randn(24, generator=generator)]).to(dtype).view(8, 8)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_it_is_the_tanh_form_and_writes_over_its_input(dtype: torch.dtype, bound: float) -> None:
    given = sample(dtype)
    wanted = functional.gelu(given.double(), approximate="tanh")
    with torch.no_grad():
        kept = given.clone()
        found = InPlaceGelu()(kept)
    assert found.data_ptr() == kept.data_ptr()
    assert (found.double() - wanted).abs().max() <= bound * 30
    if dtype != torch.bfloat16:
        assert (functional.gelu(given.double()) - wanted).abs().max() > 1e-4, "the other form is told apart"


def test_its_slope_is_that_of_the_tanh_form() -> None:
    given, towards = sample(torch.float64).requires_grad_(), sample(torch.float64).flip(0)
    before = given.detach().clone()
    out = InPlaceGelu()(given)
    assert torch.equal(given.detach(), before)
    (found,) = torch.autograd.grad(out, given, towards, retain_graph=True)
    (wanted,) = torch.autograd.grad(functional.gelu(given, approximate="tanh"), given, towards)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    (again,) = torch.autograd.grad(out, given, towards)
    assert torch.equal(again, found), "the way back can be taken twice"
    (other,) = torch.autograd.grad(functional.gelu(given), given, towards)
    assert (other - wanted).abs().max() > 1e-4


def test_columns_of_a_larger_matrix_are_taken_too() -> None:
    given = sample(torch.float64)
    part = given.clone()[:, 2:5]
    with torch.no_grad():
        found = InPlaceGelu()(part)
    torch.testing.assert_close(found, functional.gelu(given[:, 2:5], approximate="tanh"))
