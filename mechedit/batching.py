"""Rows of tokens as batches: grouped by length, right-padded, with padding kept below what another run would cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechedit.models import Model, Tokens


def pieces(rows: Sequence[list[int]], spare: float | int, most: int) -> Iterator[Sequence[list[int]]]:
    """Rows, longest first, that run together: as long as padding stays within `spare` tokens, and all within `most`."""
    begin, wasted = 0, 0
    for end, row in enumerate(rows):
        width = len(rows[begin])
        wasted += width - len(row)
        if end > begin and (wasted > spare or width * (end - begin + 1) > most):
            yield rows[begin:end]
            begin, wasted = end, 0
    if rows:
        yield rows[begin:]


def pad(rows: Sequence[Sequence[int]], tokenizer: Any, device: Any = "cpu") -> Tokens:
    """Right-pad rows of token ids to one batch."""
    width = max(len(row) for row in rows)
    filler = tokenizer.pad_token_id
    if filler is None:
        filler = tokenizer.eos_token_id or 0
    ids = torch.full((len(rows), width), filler, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(list(row), dtype=torch.long)
        mask[index, : len(row)] = 1
    return Tokens(ids.to(device), mask.to(device))


def column(positions: Sequence[int], device: Any = "cpu") -> Int[Tensor, "batch 1"]:
    """One position a row, in the form that `Patch.positions` takes."""
    return torch.tensor(list(positions), dtype=torch.long, device=device)[:, None]


STARTING = {"cpu": 1e8, "cuda": 1e11}
"""Operations that take about as long as starting the run of a block does."""


def spare_tokens(model: Model) -> float:
    """Tokens that may go through a block for nothing before starting another run would cost less."""
    block = 2 * (4 * model.d_model**2 + 2 * model.d_model * model.d_mlp)
    return STARTING.get(model.device.type, STARTING["cuda"]) / block
