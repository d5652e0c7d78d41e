"""Products and norms of matrices [n, m] that may be split in rows over processes, as the matrix M of a system is.

What has n rows comes out split where it goes in so; all else is whole in each process: the same, bit for bit. Beyond
its own rows a process holds one block of another at a time. Without other processes these are torch's own functions.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.split_tensors import (
    blocks_of_rows,
    gathered_rows,
    is_split,
    part_here,
    row_wise,
    rows_here,
    sent,
    split_in_rows,
    summed,
)


def product(matrix: Float[Tensor, "n n"], right_side: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """M B, split or whole as B is; where M is whole, so is B."""
    if not is_split(matrix):
        return matrix @ right_side
    here = part_here(matrix)
    if not is_split(right_side):
        return gathered_rows(here @ right_side, matrix)
    total = torch.zeros_like(part_here(right_side), memory_format=torch.contiguous_format)
    for rows, block in blocks_of_rows(right_side):
        total.addmm_(here[:, rows], block)
    return split_in_rows(total, matrix.device_mesh)


def combination(columns: Float[Tensor, "n m"], weights: Float[Tensor, "m ..."]) -> Float[Tensor, "n ..."]:
    """C Y, split as C is; Y is whole."""
    return row_wise(lambda rows: rows @ weights, columns)


def contraction(left: Float[Tensor, "p n"], right: Float[Tensor, "n m"]) -> Float[Tensor, "p m"]:
    """A B over an axis of length n, whole.

    Args:
        left: A, whole or the transpose of a matrix that is split as B is.
        right: B.
    """
    if not is_split(right):
        return left @ right
    rows = rows_here(len(right), right.device_mesh)
    here = part_here(left) if is_split(left) else left[:, rows.start : rows.stop]
    return summed(here @ part_here(right), right)


def column_products(first: Float[Tensor, "n m"], second: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """aᵀb for each column a of one matrix and b of the other, which are split alike or whole; the results are whole."""
    products = (part_here(first) * part_here(second)).sum(0)
    return summed(products, first) if is_split(first) else products


def norm(matrix: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """The Frobenius norm."""
    return gathered_rows(part_here(matrix).norm()[None], matrix).norm() if is_split(matrix) else matrix.norm()


def column_norms(matrix: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
    """The 2-norm of each column, whole."""
    if is_split(matrix):
        return gathered_rows(part_here(matrix).norm(dim=0)[None], matrix).norm(dim=0)
    return matrix.norm(dim=0)


def row(matrix: Float[Tensor, "n m"], index: Int[Tensor, ""]) -> Float[Tensor, " m"]:
    """One row, whole."""
    if not is_split(matrix):
        return matrix[index]
    here = part_here(matrix)
    rank, number = divmod(int(index), len(here))
    return sent(here[number], here.new_empty(here.shape[1]), rank, matrix.device_mesh)
