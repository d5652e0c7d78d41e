"""What a projection can write through a norm that follows it, as in Gemma 2, Gemma 3 and OLMo 2.

The norm sends the projection's output x to y = g ⊙ x/rms(x). So y/g has the length √d_model whatever x is, and y lies
on an ellipsoid: most outputs can only be approached, and the nearest one is not in their direction where g varies.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.models import Model
from mechedit.split_tensors import is_split, part_here, split_in_columns


def change_before_norm(
    model: Model, layer: int, keys: Float[Tensor, "fact prefix d_key"], change: Float[Tensor, "fact d_model"]
) -> Float[Tensor, "fact d_model"]:
    """The change of the projection's output that moves the edited module's output by `change`, or as near as can be.

    Without a norm the two differ by a factor at most. With one, the output behind each prefix is to be the point of the
    ellipsoid that is nearest to y + change (`nearest_output`), the length of x stays as it is, and the changes of x are
    averaged over the prefixes, as the keys are (MEMIT Eq. 19).

    Where keys are split over processes, outputs are computed for some facts at a time, in sums over the processes.
    """
    if is_split(keys):
        key_parts = [split_in_columns(part, keys.device_mesh) for part in part_here(keys).split(_FACTS)]
        parts = zip(key_parts, change.split(_FACTS), strict=True)
        return torch.cat([_change_before_norm(model, layer, *part) for part in parts])
    return _change_before_norm(model, layer, keys, change)


def _change_before_norm(
    model: Model, layer: int, keys: Float[Tensor, "fact prefix d_key"], change: Float[Tensor, "fact d_model"]
) -> Float[Tensor, "fact d_model"]:
    """The same for all facts at once."""
    gain, norm = model.output_gain(layer, keys), model.norm_gain(layer)
    if norm is None:
        gain = gain.mean(1)
        return torch.where(gain == 0, 0, change.to(gain) / gain)
    # What the norm does not pass at all stays as it is, and so does the length of what it passes.
    passed = norm != 0
    norm, gain, outputs = norm[passed], gain[..., passed], model.module_output(layer, keys)[..., passed]
    unit = outputs / norm
    points, lengths = outputs + change.to(outputs)[:, None, passed], unit.norm(dim=-1)
    # Some facts at a time, as each step of the search holds several float64 copies of them.
    parts = zip(points.split(_FACTS), lengths.split(_FACTS), strict=True)
    nearest = torch.cat([nearest_output(of_some, norm, length) for of_some, length in parts])
    best = int(norm.abs().argmax())
    before_norm = change.new_zeros(*change.shape).to(unit)
    before_norm[:, passed] = ((nearest / norm - unit) * (norm[best] / gain[..., best])[..., None]).mean(1)
    return before_norm


def gradient_before_norm(
    model: Model, layer: int, keys: Float[Tensor, "token d_key"], gradient: Float[Tensor, "token d_model"]
) -> Float[Tensor, "token d_model"]:
    """The gradient at the projection's output x, of a loss whose gradient at the edited module's output y is known.

    With y = g ⊙ n and n = x/rms(x) it is (g ⊙ ∂y − n (n · (g ⊙ ∂y)) / d_model) / rms(x). A coordinate that the norm
    does not pass is taken to have none.
    """
    gain, norm = model.output_gain(layer, keys), model.norm_gain(layer)
    through_gain = gain * gradient.to(gain)
    if norm is None:
        return through_gain
    passed = norm != 0
    unit = torch.where(passed, model.module_output(layer, keys) / torch.where(passed, norm, 1), 0)
    return through_gain - gain_of_unit(gain, norm) * unit * (unit * norm * gradient).mean(-1, keepdim=True)


def gain_of_unit(gain: Float[Tensor, "*batch d_model"], norm: Float[Tensor, " d_model"]) -> Float[Tensor, "*batch 1"]:
    """1/rms(x), by the coordinate that a norm passes best."""
    best = int(norm.abs().argmax())
    return (gain[..., best] / norm[best])[..., None]


def nearest_output(
    points: Float[Tensor, "*batch coordinate"], gain: Float[Tensor, " coordinate"], length: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch coordinate"]:
    """The output y = g ⊙ n with a given ‖n‖ that is nearest to each point.

    Where the derivative of ‖g ⊙ n − t‖² + μ(‖n‖² − length²) vanishes, nᵢ = gᵢtᵢ/(gᵢ² + μ); the least distance has the μ
    above −min gᵢ² (Moré and Sorensen, 1983), and ‖n‖ falls in μ there, so that it is found by bisection.

    Args:
        points: t.
        gain: g, no coordinate zero.
        length: ‖n‖, above zero; √d_model after a norm that passes all coordinates.

    Returns:
        Points of the ellipsoids, in the points' dtype.
    """
    weight, squared, size = gain.double() * points.double(), gain.double().square(), length.double()[..., None]
    above = squared - squared.min()
    low, high = torch.zeros_like(size), weight.norm(dim=-1, keepdim=True) / size
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        long = (weight / (above + middle)).norm(dim=-1, keepdim=True) > size
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    nearest = weight / (above + high).clamp_min(torch.finfo(torch.float64).tiny)
    # Where t has nothing along the coordinate of least gain, n need not be long enough without it.
    lack = (size.square() - nearest.square().sum(-1, keepdim=True)).clamp_min(0).sqrt()[..., 0]
    least = int(squared.argmin())
    nearest[..., least] += torch.where(nearest[..., least] < 0, -lack, lack).where(lack > 1e-6 * size[..., 0], 0)
    return (gain.double() * nearest * size / nearest.norm(dim=-1, keepdim=True)).to(points)


_FACTS = 256
"""Facts whose outputs are searched for at once."""
_HALVINGS = 100
"""Steps of the bisection: the bracket ends smaller than float64 can tell."""
