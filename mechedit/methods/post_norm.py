"""What a projection can write through a norm that follows it, as in Gemma 2, Gemma 3 and OLMo 2.

The norm sends the projection's output x to y = g ⊙ x/rms(x). So y/g has the length √d_model whatever x is, and y lies
on an ellipsoid: most outputs can only be approached, and the nearest one is not in their direction where g varies.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.models import Model


def change_before_norm(
    model: Model, layer: int, keys: Float[Tensor, "fact prefix d_key"], change: Float[Tensor, "fact d_model"]
) -> Float[Tensor, "fact d_model"]:
    """The change of the projection's output that moves the edited module's output by `change`, or as near as can be.

    Without a norm the two differ by a factor at most. With one, the output behind each prefix is to be the point of the
    ellipsoid that is nearest to y + change (`nearest_output`), the length of x stays as it is, and the changes of x are
    averaged over the prefixes, as the keys are (MEMIT Eq. 19).
    """
    gain, norm = model.output_gain(layer, keys), model.norm_gain(layer)
    if norm is None:
        gain = gain.mean(1)
        return torch.where(gain == 0, 0, change.to(gain) / gain)
    outputs = model.module_output(layer, keys)
    nearest = nearest_output(outputs + change.to(outputs)[:, None], norm)
    # x/rms(x) and rms(x), by the coordinate that the norm passes best; what it does not pass at all stays as it is.
    seen, best = norm != 0, int(norm.abs().argmax())
    unit = torch.where(seen, outputs / norm.where(seen, 1), 0)
    aim = torch.where(seen, nearest / norm.where(seen, 1), 0)
    return ((aim - unit) * (norm[best] / gain[..., best : best + 1])).mean(1)


def nearest_output(points: Float[Tensor, "*batch d_model"], gain: Float[Tensor, " d_model"]) -> Tensor:
    """The output y = g ⊙ n with ‖n‖ = √d_model that is nearest to each point.

    Where the derivative of ‖g ⊙ n − t‖² − μ(d_model − ‖n‖²) vanishes, nᵢ = gᵢtᵢ/(gᵢ² + μ); the least distance has the μ
    above −min gᵢ² (Moré and Sorensen, 1983), and ‖n‖ falls in μ there, so that it is found by bisection.

    Args:
        points: t.
        gain: g, not all zero.

    Returns:
        Points [*batch, d_model] of the ellipsoid, in the points' dtype.
    """
    weight, squared = gain.double() * points.double(), gain.double().square()
    above, length = squared - squared.min(), points.shape[-1] ** 0.5
    low, high = torch.zeros_like(weight[..., :1]), weight.norm(dim=-1, keepdim=True) / length
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        long = (weight / (above + middle)).norm(dim=-1, keepdim=True) > length
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    nearest = weight / (above + high).clamp_min(torch.finfo(torch.float64).tiny)
    # Where t has nothing along the coordinate of least gain, n need not be long enough without it.
    lack = (length**2 - nearest.square().sum(-1)).clamp_min(0).sqrt()
    least = int(squared.argmin())
    nearest[..., least] += torch.where(nearest[..., least] < 0, -1, 1) * lack.where(lack > 1e-6 * length, 0)
    nearest *= length / nearest.norm(dim=-1, keepdim=True)
    return (gain.double() * nearest).to(points)


_HALVINGS = 100
"""Steps of the bisection: the bracket ends smaller than float64 can tell."""
