"""What is made of a symmetric matrix M whose rows may be split over processes, one block of rows in each.

No process ever holds more of M than its rows, once or a few times over, and of a matrix C beside it, [n, m] and split
alike, more than two blocks. Numbers and vectors that come out are whole in each process: the same, bit for bit.
Without other processes these are torch's own functions.
"""

from __future__ import annotations

import torch
import torch.distributed
from jaxtyping import Bool, Float
from torch import Tensor

from mechedit.split_tensors import (
    blocks_of_rows,
    gathered_rows,
    is_split,
    part_here,
    rows_here,
    sent,
    split_in_rows,
)


def one_norm(matrix: Float[Tensor, "n n"]) -> float:
    """‖M‖₁; of a matrix that is split, by its rows, which are its columns."""
    if is_split(matrix):
        return float(gathered_rows(part_here(matrix).abs().sum(1), matrix).max())
    return float(matrix.abs().sum(0).max())


def diagonal(matrix: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """The diagonal of M; where M is split, a copy of it."""
    return gathered_rows(_own_square(matrix).diagonal(), matrix) if is_split(matrix) else matrix.diagonal()


def transposed(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """A copy of Mᵀ, split as M is."""
    if not is_split(matrix):
        return matrix.T.clone(memory_format=torch.contiguous_format)
    mesh, here = matrix.device_mesh, part_here(matrix)
    size = len(here)
    # Block j of these columns goes to process j.
    blocks = here.view(size, mesh.size(), size).transpose(0, 1).contiguous()
    received = torch.empty_like(blocks)
    torch.distributed.all_to_all_single(received, blocks, group=mesh.get_group())
    return split_in_rows(received.permute(2, 0, 1).reshape(size, -1), mesh)


def plus_gram(matrix: Float[Tensor, "n n"], columns: Float[Tensor, "n m"]) -> Float[Tensor, "n n"]:
    """M + C Cᵀ, split as M is."""
    if not is_split(matrix):
        return torch.addmm(matrix, columns, columns.T)
    assert is_split(columns)
    total, part = part_here(matrix).clone(), part_here(columns)
    for rows, block in blocks_of_rows(columns):
        total[:, rows].addmm_(part, block.T)
    return split_in_rows(total, matrix.device_mesh)


def plus_identity(matrix: Float[Tensor, "n n"], weight: float | int) -> Float[Tensor, "n n"]:
    """M + w I, split as M is."""
    total = matrix.clone()
    (_own_square(total) if is_split(total) else total).diagonal().add_(weight)
    return total


def cholesky_rows(matrix: Float[Tensor, "n n"]) -> tuple[Float[Tensor, "n n"], Bool[Tensor, " n"]]:
    """L of M = L Lᵀ, and which of its rows were computed from pivots above zero.

    One block of columns after another: the process that has the square on the diagonal factors it, L₁₁ L₁₁ᵀ = A₁₁;
    those below divide by it, L₂₁ = A₂₁ L₁₁⁻ᵀ; and each takes L₂₁ L₂₁ᵀ off the rows that it has.
    """
    if not is_split(matrix):
        lower, info = torch.linalg.cholesky_ex(matrix)
        return lower, _before_breakdown(lower, int(info))
    mesh = matrix.device_mesh
    rank, here = mesh.get_local_rank(), part_here(matrix).clone()
    size, info = len(here), 0
    buffer = here.new_empty(size, size)
    for block in range(mesh.size()):
        panel = here[:, block * size : (block + 1) * size]
        if rank == block:
            square, code = torch.linalg.cholesky_ex(panel)
            panel.copy_(square)
            here[:, (block + 1) * size :] = 0
            info = int(code)
        square = sent(panel, buffer, block, mesh)
        if rank > block:
            panel.copy_(torch.linalg.solve_triangular(square, panel.T, upper=False).T)
        for below in range(block + 1, mesh.size()):
            panel_below = sent(panel, buffer, below, mesh)
            if rank >= below:
                here[:, below * size : (below + 1) * size] -= panel @ panel_below.T
    return split_in_rows(here, mesh), gathered_rows(_before_breakdown(here, info), matrix)


def _before_breakdown(lower: Tensor, info: int) -> Bool[Tensor, " row"]:
    """Which rows LAPACK computed; `info` counts from 1, and is 0 where it computed all."""
    return torch.arange(len(lower), device=lower.device) < (info - 1 if info else len(lower))


def _own_square(matrix: Tensor) -> Tensor:
    """The square on the diagonal of the rows that are here, as a view."""
    assert is_split(matrix)
    rows = rows_here(len(matrix), matrix.device_mesh)
    return part_here(matrix)[:, rows.start : rows.stop]
