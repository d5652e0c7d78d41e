"""The fast GELU is the tanh form, with its derivative, and overwrites its input where no gradient needs it."""

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
    inputs = sample(dtype)
    expected = functional.gelu(inputs.double(), approximate="tanh")
    with torch.no_grad():
        overwritten = inputs.clone()
        result = InPlaceGelu()(overwritten)
    assert result.data_ptr() == overwritten.data_ptr()
    assert (result.double() - expected).abs().max() <= bound * 30
    if dtype != torch.bfloat16:
        assert (functional.gelu(inputs.double()) - expected).abs().max() > 1e-4, "the other form is told apart"


def test_its_derivative_is_that_of_the_tanh_form() -> None:
    inputs, towards = sample(torch.float64).requires_grad_(), sample(torch.float64).flip(0)
    before = inputs.detach().clone()
    out = InPlaceGelu()(inputs)
    assert torch.equal(inputs.detach(), before)
    (result,) = torch.autograd.grad(out, inputs, towards, retain_graph=True)
    (expected,) = torch.autograd.grad(functional.gelu(inputs, approximate="tanh"), inputs, towards)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    (again,) = torch.autograd.grad(out, inputs, towards)
    assert torch.equal(again, result), "the backward pass can be run twice"
    (erf_gradient,) = torch.autograd.grad(functional.gelu(inputs), inputs, towards)
    assert (erf_gradient - expected).abs().max() > 1e-4


def test_columns_of_a_larger_matrix_are_taken_too() -> None:
    inputs = sample(torch.float64)
    part = inputs.clone()[:, 2:5]
    with torch.no_grad():
        result = InPlaceGelu()(part)
    torch.testing.assert_close(result, functional.gelu(inputs[:, 2:5], approximate="tanh"))
