"""The weights of down-projections: copies, hashes, and sums that are rounded once.

A sum W + ΔW is taken in float64. In float32 it is rounded to the nearest number. In bfloat16 and float16 that would
lose the edit: an update below half a unit in the last place, 0.2 to 0.4 % of |w| in bfloat16, would leave no trace.
There the sum is rounded up or down at random, up with the probability of its distance from the number below
(stochastic rounding: Croci et al., Stochastic rounding: implementation, error analysis and applications, 2022), so
that E[W'] = W + ΔW. An edit of 0.05 units in the last place, written for one key of width 8,192, changes the output
there by the intended amount to within 5 % in bfloat16 and 4 % in float16 (`tests/edit/test_edit_rounding.py`).

The random numbers come from a generator on the CPU, seeded by the weights before the edit. So the same edit on the
same weights gives the same bits wherever the model runs, and two edits of the same base weights round alike where their
sums agree.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mechedit.errors import InputError
from mechedit.interrupts import insist, uninterrupted
from mechedit.models import Model
from mechedit.split_tensors import (
    blocks_of_rows,
    is_split,
    part_here,
    row_wise,
    rows_here,
    rows_of,
    split_in_rows,
    whole,
)

HALF = (torch.bfloat16, torch.float16)
"""Dtypes in which sums are rounded stochastically."""
_ROWS = 1024
"""Rows rounded at a time, so that little more than the sum itself is in memory."""


def rounded_sum(
    base: Float[Tensor, "d_mlp d_model"],
    deltas: Iterable[Float[Tensor, "d_mlp d_model"]],
    where: str,
    dtype: torch.dtype | None = None,
    mesh: DeviceMesh | None = None,
) -> Float[Tensor, "d_mlp d_model"]:
    """`base` + Σ `deltas`, summed in float64 and rounded once to `dtype`, by default that of `base`.

    In half precision the bits are those that a base in that dtype gives, if `base` is such a one in a wider dtype.

    Args:
        base: exact weights, whole or split over `mesh`; they also seed the random numbers in half precision.
        deltas: added one after another, whole or split over `mesh`.
        where: name of the weights in the error message.
        dtype: of the result.
        mesh: processes over which the sum is split in rows; each computes its own, to the same bits.

    Raises:
        InputError: the sum is not finite, or exceeds the range of the dtype.
    """
    dtype = dtype or base.dtype
    half, rows = dtype in HALF, rows_here(len(base), mesh)
    device = "cpu" if half else base.device
    total = _rows_here(base, rows).to(device=device, dtype=torch.float64, copy=True)
    for delta in deltas:
        total.add_(_rows_here(delta, rows).to(total))
    largest = torch.finfo(dtype).max
    overflows = (~(total.abs() <= largest)).sum()[None].to(base.device)
    if mesh is not None:
        overflows = whole(split_in_rows(overflows, mesh))
    if overflows := int(overflows.sum()):
        raise InputError(
            f"the edit would take {overflows} weights of {where} beyond what {dtype} holds (±{largest:.6g}), "
            f"expected none; load the model in bfloat16 or float32, or make the edit again with milder settings"
        )
    rounded = _stochastically_rounded_rows(total, base.to(dtype), rows.start) if half else total.to(dtype)
    return rounded if mesh is None else split_in_rows(rounded.to(base.device), mesh)


def _rows_here(matrix: Float[Tensor, "row column"], rows: range) -> Float[Tensor, "here column"]:
    """Views of the rows of a matrix that is whole, or split so that each process has those that belong to it."""
    return part_here(matrix) if is_split(matrix) else matrix[rows.start : rows.stop]


def _stochastically_rounded_rows(
    value: Float[Tensor, "here column"], base: Float[Tensor, "row column"], first: int
) -> Float[Tensor, "here column"]:
    """Rows from `first` on, rounded to the dtype of `base`, which seeds the random numbers, as they are among all."""
    generator = torch.Generator().manual_seed(int(digest(base)[:8], 16))
    for begin in range(0, first, _ROWS):
        skipped = (min(_ROWS, first - begin), base.shape[1])
        torch.rand(skipped, generator=generator, dtype=torch.float32, device="cpu")
    return torch.cat([stochastically_rounded(rows, base.dtype, generator) for rows in value.split(_ROWS)])


def stochastically_rounded(
    value: Float[Tensor, "row column"], dtype: torch.dtype, generator: torch.Generator
) -> Float[Tensor, "row column"]:
    """Round float64 numbers to one of their two neighbors in `dtype`, up with probability (x − below) / step."""
    limits = torch.finfo(dtype)
    digits = 1 - round(math.log2(limits.eps))
    # Below the smallest normal number the steps no longer shrink.
    exponent = torch.frexp(value).exponent.clamp_min(math.frexp(limits.smallest_normal)[1])
    step = torch.exp2((exponent - digits).double())
    # In float32, so that the draw has few enough digits never to lift a number that needs no rounding.
    draw = torch.rand(value.shape, generator=generator, dtype=torch.float32, device="cpu")
    return value.div(step).add_(draw).floor_().mul_(step).to(dtype)


def digest(weight: Float[Tensor, "d_mlp d_model"]) -> str:
    """SHA-256 of a matrix's bytes, row by row, in hex; all processes compute that of a split one, block by block."""
    hashed = hashlib.sha256()
    for _, block in blocks_of_rows(weight) if is_split(weight) else [(slice(None), weight)]:
        content: Any = block.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hashed.update(memoryview(content.numpy()))
    return hashed.hexdigest()


def copy_weights(model: Model, layers: Iterable[int]) -> dict[int, Float[Tensor, "d_mlp d_model"]]:
    """Copies of the down-projections of `layers`; where the model is split, each process copies its rows."""
    return {layer: row_wise(torch.clone, rows_of(model.projection(layer).detach(), model.mesh)) for layer in layers}


def projection_parameter(model: Model, layer: int) -> tuple[str, nn.Parameter, bool]:
    """The parameter that a down-projection is a view of: its name, itself, and whether it is [d_mlp, d_model] as well.

    A Conv1D's weight is, a Linear's is the transpose.

    Raises:
        InputError: the weights are split over processes.
    """
    view = model.projection(layer)
    name, weight = next(((n, w) for n, w in model.named_parameters() if w.data_ptr() == view.data_ptr()), ("", None))
    if weight is None:
        raise InputError(
            f"the weights of {model.name!r} are split over processes, expected all of them in this one; load the "
            f"model without tp to train its weights or to export an adapter"
        )
    # Strides and not shapes, which are the same both ways when the matrix is square.
    return name, weight, weight.stride() == view.stride()


@torch.no_grad()
def restore_(model: Model, originals: Mapping[int, Float[Tensor, "d_mlp d_model"]]) -> None:
    """Write copies of down-projections back; Ctrl-C waits until all are written."""
    left = dict(originals)

    def write() -> None:
        with uninterrupted():
            for layer in list(left):
                model.write_projection_(layer, left[layer])
                del left[layer]

    insist(write)
