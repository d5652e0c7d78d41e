"""RMS norms in few passes over memory, forward and backward; their weights get no gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Norm = Callable[[Tensor], Tensor]
_ROWS = 4
"""Rows on which a norm is compared with the module that it stands for."""


@dataclass(frozen=True, eq=False)
class RmsNorm:
    """g·x / √(mean(x²) + ε) with g the module's weight, or 1 + weight, computed in float32."""

    module: Any
    epsilon: float
    adds_one: bool
    """Whether the gain is 1 + weight, and the rounding comes after it (Gemma's)."""

    def __call__(self, states: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Norm the states; the weight is read at each call, because it may be edited."""
        weight = self.module.weight.detach()
        gain = 1.0 + weight.float() if self.adds_one else weight
        return _RmsNorm.apply(states, gain, self.epsilon)  # pyright: ignore[reportReturnType]


def fast_norm(module: nn.Module | None) -> Norm | None:
    """A faster function for an RMS norm, if one gives what the module gives; else the module."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    # A norm of torch's own is one kernel already.
    is_rms = "RMSNorm" in type(module).__name__ and getattr(module, "bias", None) is None
    if module is None or not is_rms or not isinstance(weight, Tensor) or not isinstance(epsilon, float):
        return module
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(_ROWS, weight.shape[-1], generator=generator).to(weight)
    with torch.no_grad():
        expected = module(states)
        for adds_one in (False, True):
            norm = RmsNorm(module, epsilon, adds_one)
            tolerance = 8 * torch.finfo(weight.dtype).eps
            if torch.allclose(norm(states), expected, rtol=tolerance, atol=tolerance):
                return norm
    return module


class _RmsNorm(torch.autograd.Function):
    """Saves the input and one number a row."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        """x·r·g with r = 1/√(mean(x²) + ε)."""
        wide = states.float() if states.dtype.itemsize < 4 else states
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(wide.shape[-1])
        inverse = mean_square.add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, gain, inverse)
        normed = wide * inverse
        if gain.dtype == states.dtype and normed.dtype != states.dtype:
            return normed.to(states.dtype).mul_(gain)
        return normed.mul_(gain).to(states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """r·(g·y − x·r²·mean(g·y·x)) for the incoming gradient y."""
        states, gain, inverse = ctx.saved_tensors
        wide = states.float() if states.dtype.itemsize < 4 else states
        scaled = grad * gain if grad.dtype == wide.dtype else grad.float() * gain
        mean = torch.linalg.vecdot(scaled, wide)[..., None].div_(wide.shape[-1])
        scaled.mul_(inverse).addcmul_(wide, mean.mul_(inverse.pow(3)), value=-1)
        return scaled.to(states.dtype), None, None
