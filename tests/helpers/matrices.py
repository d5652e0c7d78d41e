"""Random matrices, and what the solver makes of them, whole or split in rows over processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from helpers.largest_tensor import LargestTensor
from mechedit.edit.weights import digest
from mechedit.errors import InputError
from mechedit.methods.rules import key_strength
from mechedit.moments.accumulator import MomentAccumulator
from mechedit.solve import damped, equality_update, factorize, null_space, null_space_update, ridge_update
from mechedit.solve.row_blocks import transposed
from mechedit.split_tensors import rows_here, split_in_rows, whole

SIZE = 36
MOST = SIZE - 1
"""Most columns that are fewer than rows."""
CONDITIONS = {"well": 10.0, "ill": 1e12}
"""Condition numbers."""


def random_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_condition(size: int, condition: float, seed: int = 4) -> Tensor:
    """Symmetric positive definite, eigenvalues spread evenly in the logarithm from 1 down."""
    basis = torch.linalg.qr(random_matrix(size, size, seed=seed)).Q
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), size, dtype=torch.float64)
    matrix = basis * values @ basis.T
    return (matrix + matrix.T) / 2


def solutions(placed: Callable[[Tensor], Tensor], mesh: DeviceMesh | None = None) -> dict[str, Tensor | str]:
    """Factors, solutions, updates and messages.

    Args:
        placed: gives a matrix as the solver is to have it.
        mesh: processes over which sums are split.
    """
    few, many, wanted = random_matrix(SIZE, 5), random_matrix(SIZE, 2 * SIZE), random_matrix(7, 5)
    earlier = random_matrix(SIZE, 5, seed=5)
    most, for_most = random_matrix(SIZE, MOST, seed=1), random_matrix(7, MOST, seed=2)
    for_many = random_matrix(7, 2 * SIZE, seed=3)
    square = placed(random_matrix(SIZE, SIZE))
    found: dict[str, Tensor | str] = {"transposed": whole(transposed(square)), "digest": digest(square)}
    for name, condition in CONDITIONS.items():
        matrix = placed(with_condition(SIZE, condition))
        factor, mixed = factorize(matrix), factorize(matrix, precision="mixed")
        updates = {
            "ridge": ridge_update(few, wanted, factor, 2.0),
            "ridge of a matrix": ridge_update(few, wanted, matrix, 2.0),
            "ridge beside many": ridge_update(few, wanted, factor, 2.0, previous=many),
            "equality": equality_update(few, wanted, factor),
            "equality beside many": equality_update(few, wanted, factor, previous=many),
            "equality, split keys": equality_update(placed(few), wanted, factor, previous=placed(earlier)),
            "null space, split keys": null_space_update(placed(few), wanted, null_space(matrix, 0.5), previous=many),
            "ridge of a whole matrix": ridge_update(placed(few), wanted, whole(matrix), 2.0, previous=placed(many)),
            "ridge, mixed": ridge_update(placed(few), wanted, mixed, 2.0),
            "ridge, few earlier": ridge_update(placed(few), wanted, factor, 2.0, previous=earlier),
        }
        with LargestTensor() as largest_of_fewer:
            updates["ridge, fewer than rows"] = ridge_update(placed(most), for_most, factor, 2.0)
        with LargestTensor() as largest_of_more:
            updates |= {
                "ridge, more than rows": ridge_update(placed(many), for_many, factor, 2.0),
                "ridge, many earlier": ridge_update(placed(few), wanted, factor, 2.0, previous=placed(many)),
                "ridge, of a split matrix": ridge_update(placed(few), wanted, matrix, 2.0, previous=placed(most)),
            }
        found |= {
            f"{name}: factor": whole(factor.lower),
            f"{name}: solution": factor.solve(few),
            f"{name}: split solution": whole(factor.solve(placed(few))),
            f"{name}: refined": mixed.solve(few),
            f"{name}: split refined": whole(mixed.solve(placed(few))),
            f"{name}: strength": torch.tensor(key_strength(placed(few), factor)),
            f"{name}, fewer: largest": torch.tensor(largest_of_fewer.numbers),
            f"{name}, more: largest": torch.tensor(largest_of_more.numbers),
            f"{name}: condition": torch.tensor(factor.condition).log(),
            f"{name}: damped": whole(damped(matrix, 0.1)),
            **{f"{name}: {rule}": whole(update.left) for rule, update in updates.items()},
            **{f"{name}: {rule}, delta": whole(update.delta) for rule, update in updates.items()},
            **{f"{name}: {rule}, error": torch.tensor(update.error) for rule, update in updates.items()},
        }
    dependent, skew, broken = (with_condition(SIZE, 10.0) for _ in range(3))
    dependent[25], dependent[:, 25] = dependent[3], dependent[3]
    dependent[25, 25] = dependent[3, 3]
    skew[1, 30], broken[30, 30] = 2.0, torch.nan
    for name, bad in (("dependent", dependent), ("skew", skew), ("broken", broken)):
        try:
            factorize(placed(bad))
        except InputError as error:
            found[name] = str(error)
    summed = MomentAccumulator(SIZE, mesh=mesh)
    for seed in range(3):
        summed.update(random_matrix(50, SIZE, seed=seed))
    found["mean"] = whole(summed.mean())
    moment = summed.finalize(0, {"weights_hash": "w"})
    moment.save("moment")
    return found


def save_solutions(folder: Path) -> None:
    """Save what this process finds for matrices that are split over all of them."""
    count, rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK"))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=count)
    mesh = init_device_mesh("cpu", (count,))

    def placed(matrix: Tensor) -> Tensor:
        rows = rows_here(len(matrix), mesh)
        return split_in_rows(matrix[rows.start : rows.stop].clone(), mesh)

    os.chdir(folder)
    found = solutions(placed, mesh)
    try:
        rows_here(SIZE + 1, mesh)
    except ValueError as error:
        found["uneven"] = str(error)
    torch.save(found, folder / f"rank_{rank}.pt")
