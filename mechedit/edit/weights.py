"""Down-projections as tensors: copies, fingerprints, and sums that are rounded once.

A sum W + ΔW is taken in float64. In float32 it is rounded to the nearest number. In bfloat16 and float16 that would
lose the edit: an update below half a unit in the last place, 0.2 to 0.4 % of |w| in bfloat16, would leave no trace.
There the sum is rounded up or down at random, up with the probability of its distance from the number below
(stochastic rounding: Croci et al., Stochastic rounding: implementation, error analysis and applications, 2022), so
that E[W'] = W + ΔW. An edit of 0.05 units in the last place, written for one key of width 8,192, changes the output
there as it should to 5 % in bfloat16 and 4 % in float16 (`tests/test_edit_rounding.py`).

The draws are those of a generator on the CPU, seeded by the weights before the edit: the same edit on the same
weights gives the same bits wherever the model runs, and of two edits on one base the weights that need not differ
do not.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechedit.errors import InputError
from mechedit.models import Model

HALF = (torch.bfloat16, torch.float16)
"""Dtypes whose sums are rounded at random."""
_ROWS = 1024
"""Rows that are rounded at a time, so that little more than the sum itself is in memory."""


def rounded_sum(
    base: Float[Tensor, "d_mlp d_model"], deltas: Iterable[Float[Tensor, "d_mlp d_model"]], where: str
) -> Float[Tensor, "d_mlp d_model"]:
    """`base` + Σ `deltas`, summed in float64 and rounded once to the dtype of `base`.

    Args:
        base: exact weights; they also seed the draws in half precision.
        deltas: added one after another.
        where: for the message.

    Raises:
        InputError: the sum is not finite, or beyond what the dtype can hold.
    """
    half = base.dtype in HALF
    total = base.to(device="cpu" if half else base.device, dtype=torch.float64, copy=True)
    for delta in deltas:
        total.add_(delta.to(total))
    largest = torch.finfo(base.dtype).max
    beyond = int((~(total.abs() <= largest)).sum())
    if beyond:
        raise InputError(
            f"the edit would take {beyond} weights of {where} beyond what {base.dtype} holds (±{largest:.6g}), "
            f"expected none; load the model in bfloat16 or float32, or make the edit again with milder settings"
        )
    if not half:
        return total.to(base.dtype)
    generator = torch.Generator().manual_seed(int(digest(base)[:8], 16))
    return torch.cat([stochastically_rounded(rows, base.dtype, generator) for rows in total.split(_ROWS)])


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
    draw = torch.rand(value.shape, generator=generator, dtype=torch.float32)
    return value.div(step).add_(draw).floor_().mul_(step).to(dtype)


def digest(weight: Float[Tensor, "d_mlp d_model"]) -> str:
    """SHA-256 of a matrix's bytes, row by row, in hex."""
    content: Any = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memoryview(content.numpy())).hexdigest()


def copies(model: Model, layers: Iterable[int]) -> dict[int, Float[Tensor, "d_mlp d_model"]]:
    """Copies of the down-projections of `layers`."""
    return {layer: model.projection(layer).detach().clone() for layer in layers}


def parameter_of(model: Model, layer: int) -> tuple[str, nn.Parameter, bool]:
    """What a down-projection is a view of: the parameter's name, itself, and whether it lies [d_mlp, d_model] too.

    A Conv1D's does, a Linear's is the transpose.
    """
    view = model.projection(layer)
    name, weight = next((n, w) for n, w in model.named_parameters() if w.data_ptr() == view.data_ptr())
    # Strides and not shapes, which are the same both ways when the matrix is square.
    return name, weight, weight.stride() == view.stride()


@torch.no_grad()
def restore_(model: Model, originals: Mapping[int, Float[Tensor, "d_mlp d_model"]]) -> None:
    """Write copies of down-projections back; Ctrl-C waits until all are written."""
    with uninterrupted():
        for layer, original in originals.items():
            model.projection(layer).copy_(original)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended (signals reach the main thread alone)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if held:
            signal.raise_signal(signal.SIGINT)
