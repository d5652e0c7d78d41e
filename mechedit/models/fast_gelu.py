"""The tanh form of GELU as x·σ(2u), from faster kernels than torch's: half of its time on a CPU, and in place."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR
CHUNK = 2**18
"""Numbers that go through all operations together, so that they stay in the processor's cache."""
_FAST_DTYPES = (torch.float32, torch.float64)


class InPlaceGelu(nn.Module):
    """The tanh form of GELU, which overwrites its input where no gradient needs it.

    transformers computes the function by eight operations on tensors of the MLP's width, each as slow as the memory.
    """

    def forward(self, hidden: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_mlp"]:
        """GELU(x) ≈ x/2 · (1 + tanh(u)) = x·σ(2u), with u = √(2/π)·(x + 0.044715 x³)."""
        is_fast = hidden.device.type == "cpu" and hidden.dtype in _FAST_DTYPES and hidden.is_contiguous()
        if not torch.is_grad_enabled():
            return _overwrite(hidden) if is_fast else torch.ops.aten.gelu_(hidden, approximate="tanh")
        if is_fast and hidden.requires_grad:
            return _WithDerivative.apply(hidden)  # pyright: ignore[reportReturnType]
        return nn.functional.gelu(hidden, approximate="tanh")


class _WithDerivative(torch.autograd.Function):
    """Computes the derivative too, whose costly part is the same, and saves it instead of the input."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        """x·s with s = σ(2u); the derivative is s + x·2u′·s(1 − s)."""
        out, derivative = torch.empty_like(hidden), torch.empty_like(hidden)
        for x, product, slope in zip(_chunks(hidden), _chunks(out), _chunks(derivative), strict=True):
            twice = _twice_u(x)
            torch.sigmoid(twice, out=slope)
            torch.mul(x, slope, out=product)
            # x·2u′ = 3·2u − 2·LINEAR·x
            twice.mul_(3).sub_(x, alpha=2 * LINEAR)
            torch.ops.aten.sigmoid_backward.grad_input(twice, slope, grad_input=twice)
            slope.add_(twice)
        ctx.save_for_backward(derivative)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The chain rule: the incoming gradient times the derivative."""
        return grad * ctx.saved_tensors[0]


def _overwrite(hidden: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_mlp"]:
    for x in _chunks(hidden):
        x.mul_(_twice_u(x).sigmoid_())
    return hidden


def _twice_u(x: Float[Tensor, " chunk"]) -> Float[Tensor, " chunk"]:
    """2u = LINEAR·x + CUBIC·x³."""
    return torch.addcmul(x.new_full((), LINEAR), x, x, value=CUBIC).mul_(x)


def _chunks(values: Float[Tensor, "*batch d_mlp"]) -> tuple[Float[Tensor, " chunk"], ...]:
    return values.view(-1).split(CHUNK)
