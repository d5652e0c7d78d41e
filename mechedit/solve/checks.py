"""What the systems are made of, checked and brought to float64."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import InputError, check_finite


def symmetric(matrix: Float[Tensor, "n n"], what: str) -> Float[Tensor, "n n"]:
    """The matrix in float64 and exactly symmetric (Cholesky reads one triangle only).

    Raises:
        InputError: it has no entries, some are not finite, or what is skew in it is more than rounding.
    """
    if not matrix.numel():
        raise InputError(f"{what} is empty, expected a matrix [d_mlp, d_mlp]; check what was passed")
    check_finite(f"the entries of {what}", matrix)
    found = wide(matrix)
    mirror = found.T.clone(memory_format=torch.contiguous_format)
    skew, size = float(torch.dist(found, mirror, p=math.inf)), float(torch.linalg.vector_norm(found, math.inf))
    if skew > 1e-4 * size:
        raise InputError(
            f"{what} is not symmetric (entries differ from their mirror by {skew:.3g}, the largest is {size:.3g}), "
            f"expected a second moment E[k kᵀ]; check what was passed"
        )
    return mirror.add_(found).div_(2)


def columns_of(
    keys: Float[Tensor, "size fact"],
    residuals: Float[Tensor, "d_model fact"],
    previous: Float[Tensor, "size earlier"] | None,
    like: Float[Tensor, "d_mlp width"],
) -> Float[Tensor, "d_mlp column"]:
    """C: the keys behind those of earlier edits, in float64 on the device of `like`, each column in one piece.

    That is the layout of LAPACK, so that the solve does not transpose them again.

    Raises:
        InputError: no keys, keys of another width than `like`, or values that are not finite.
    """
    parts = {"keys": keys} if previous is None else {"previous keys": previous, "keys": keys}
    for name, value in {**parts, "residuals": residuals}.items():
        check_finite(f"the {name} of the linear system", value)
    for name, value in parts.items():
        if len(value) != len(like):
            raise InputError(
                f"the {name} have {len(value)} entries each, expected {len(like)} as the second moment has; "
                f"take both from the same layer of the same model"
            )
    if not keys.shape[1] or keys.shape[1] != residuals.shape[1]:
        raise InputError(
            f"there are {keys.shape[1]} keys and {residuals.shape[1]} residuals, expected one of each per fact"
        )
    rows = [wide(value.T).contiguous().to(like.device) for value in parts.values()]
    return (rows[0] if previous is None else torch.cat(rows)).T


def wide(value: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    found = value.cpu() if value.device.type == "mps" else value
    # Converting and laying out in one pass takes half the time.
    return found.to(torch.float64, memory_format=torch.contiguous_format)
