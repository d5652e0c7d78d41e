"""The inputs of the linear systems, checked and converted to float64."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import InputError, check_finite
from mechedit.solve.row_blocks import transposed
from mechedit.split_tensors import is_split, most, part_here, split_in_rows, split_like


def symmetrized(matrix: Float[Tensor, "n n"], name: str) -> Float[Tensor, "n n"]:
    """The matrix in float64 and exactly symmetric (Cholesky reads one triangle only).

    Raises:
        InputError: it has no entries, some are not finite, or its skew part is more than rounding.
    """
    if not matrix.numel():
        raise InputError(f"{name} is empty, expected a matrix [d_mlp, d_mlp]; check what was passed")
    check_finite(f"the entries of {name}", matrix)
    converted = to_float64(matrix)
    mirrored = transposed(converted)
    skew = most(float(torch.dist(part_here(converted), part_here(mirrored), p=math.inf)), converted)
    largest = most(float(torch.linalg.vector_norm(part_here(converted), math.inf)), converted)
    if skew > 1e-4 * largest:
        raise InputError(
            f"{name} is not symmetric (entries differ from their mirror by {skew:.3g}, the largest is {largest:.3g}), "
            f"expected a second moment E[k kᵀ]; check what was passed"
        )
    return mirrored.add_(converted).div_(2)


def key_columns(
    keys: Float[Tensor, "size fact"],
    residuals: Float[Tensor, "d_model fact"],
    previous: Float[Tensor, "size earlier"] | None,
    like: Float[Tensor, "d_mlp width"],
) -> Float[Tensor, "d_mlp column"]:
    """C: the keys of earlier edits, then the new keys, in float64 on the device of `like`, and split in rows as it is.

    Each column is contiguous, which is LAPACK's layout, so that the solve does not transpose them again.

    Raises:
        InputError: no keys, keys of another width than `like`, or values that are not finite.
    """
    blocks = {"keys": keys} if previous is None else {"previous keys": previous, "keys": keys}
    for name, value in {**blocks, "residuals": residuals}.items():
        check_finite(f"the {name} of the linear system", value)
    for name, value in blocks.items():
        if len(value) != len(like):
            raise InputError(
                f"the {name} have {len(value)} entries each, expected {len(like)} as the second moment has; "
                f"take both from the same layer of the same model"
            )
    if not keys.shape[1] or keys.shape[1] != residuals.shape[1]:
        raise InputError(
            f"there are {keys.shape[1]} keys and {residuals.shape[1]} residuals, expected one of each per fact; "
            f"pass both of the same requests"
        )
    parts = [part_here(split_like(value, like)) for value in blocks.values()]
    rows = [to_float64(part.T).contiguous().to(like.device) for part in parts]
    columns = (rows[0] if previous is None else torch.cat(rows)).T
    return split_in_rows(columns, like.device_mesh) if is_split(like) else columns


def to_float64(value: Tensor) -> Tensor:
    """The tensor in float64, on the CPU if its device has no float64."""
    source = value.cpu() if value.device.type == "mps" else value
    # Converting and laying out in one pass takes half the time.
    return source.to(torch.float64, memory_format=torch.contiguous_format)
