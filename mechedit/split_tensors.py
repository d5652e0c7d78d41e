"""Tensors that are split over processes (torch's DTensor): the part that is here, and the whole.

Every process must ask for the whole of the same tensors in the same order: the parts are sent around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def is_split(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether other processes hold parts of the tensor."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is split; a tensor that is not is returned itself."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def part_here(tensor: Tensor) -> Tensor:
    """A live view of what this process holds of a tensor."""
    return tensor.to_local() if is_split(tensor) else tensor


def write_(tensor: Tensor, values: Tensor) -> None:
    """Write the whole's values; each process takes its part of them, and nothing is sent.

    Values that are split themselves are gathered only where they are split otherwise.
    """
    if is_split(values):
        if is_split(tensor) and tensor.placements == values.placements:
            part_here(tensor).copy_(part_here(values))
            return
        values = whole(values)
    if is_split(tensor):
        values = distribute_tensor(
            values.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements, src_data_rank=None
        ).to_local()
    part_here(tensor).copy_(values)


def gathered_columns(part: Tensor, like: DTensor) -> Tensor:
    """The whole of an activation [..., width] of which each process has its columns; gradients go back to the parts.

    Args:
        part: the columns that this process has, as many as the others.
        like: a tensor that is split over the same processes.
    """
    return split_in_columns(part, like.device_mesh).full_tensor()


def split_in_columns(part: Float[Tensor, "... here"], mesh: DeviceMesh) -> Float[DTensor, "... column"]:
    """The activation of which each process has consecutive columns, as many as the others; they are not copied."""
    return DTensor.from_local(part, mesh, [Shard(part.ndim - 1)], run_check=False)


def columns_here(activation: Tensor, like: DTensor) -> Tensor:
    """This process's columns of an activation that all have; the other way of `gathered_columns`."""
    mesh = like.device_mesh
    return (
        DTensor.from_local(activation, mesh, [Replicate()], run_check=False).redistribute(mesh, [Shard(-1)]).to_local()
    )


def split_in_rows(rows: Float[Tensor, "here ..."], mesh: DeviceMesh) -> Float[DTensor, "row ..."]:
    """The matrix of which each process holds consecutive rows, as many as the others.

    Args:
        rows: those that this process holds; they are not copied.
        mesh: the processes.
    """
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False)


def rows_here(count: int, mesh: DeviceMesh | None) -> range:
    """Which of so many rows this process holds: all of them where there are no other processes.

    Raises:
        ValueError: the processes cannot hold as many each.
    """
    if mesh is None:
        return range(count)
    if count % mesh.size():
        raise ValueError(f"{count} rows are split over {mesh.size()} processes, expected as many in each")
    size = count // mesh.size()
    return range(mesh.get_local_rank() * size, (mesh.get_local_rank() + 1) * size)


def split_like(matrix: Float[Tensor, "row ..."], like: Tensor) -> Float[Tensor, "row ..."]:
    """The matrix split in rows where `like` is split, and whole where it is not; a view where nothing is sent."""
    if is_split(matrix) == is_split(like):
        return matrix
    return rows_of(matrix, like.device_mesh) if is_split(like) else whole(matrix)


def rows_of(matrix: Float[Tensor, "row ..."], mesh: DeviceMesh | None) -> Float[Tensor, "row ..."]:
    """A whole matrix split in rows, as views of those that belong here; itself where there are no other processes."""
    if mesh is None:
        return matrix
    rows = rows_here(len(matrix), mesh)
    return split_in_rows(matrix[rows.start : rows.stop], mesh)


def row_wise(function: Callable[[Tensor], Tensor], matrix: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
    """What a function makes of each row by itself, split as the matrix is; it is called with the rows that are here."""
    return split_in_rows(function(part_here(matrix)), matrix.device_mesh) if is_split(matrix) else function(matrix)


def summed(part: Tensor, like: DTensor) -> Tensor:
    """The sum of what each process has computed from its part of `like`, the same bits in all; it replaces `part`."""
    torch.distributed.all_reduce(part, group=like.device_mesh.get_group())
    return part


def sent(block: Tensor, buffer: Tensor, rank: int, mesh: DeviceMesh) -> Tensor:
    """The block of one process, in all of them: its own there, and in the buffer elsewhere."""
    block = block.contiguous() if mesh.get_local_rank() == rank else buffer
    torch.distributed.broadcast(block, group=mesh.get_group(), group_src=rank)
    return block


def blocks_of_rows(matrix: DTensor) -> Iterator[tuple[slice, Tensor]]:
    """Each process's rows of a matrix, one after another and in all of them: their numbers, and themselves.

    A block from elsewhere lasts until the next one is asked for, so that each process holds its own and one more.
    """
    here, mesh = part_here(matrix).contiguous(), matrix.device_mesh
    buffer = torch.empty_like(here)
    for rank in range(mesh.size()):
        yield slice(rank * len(here), (rank + 1) * len(here)), sent(here, buffer, rank, mesh)


def gathered_rows(part: Float[Tensor, "here ..."], like: DTensor) -> Float[Tensor, "row ..."]:
    """The whole of what each process has computed for its rows of `like`, the same in all."""
    return split_in_rows(part, like.device_mesh).full_tensor()


def most(value: float, like: Tensor) -> float:
    """The largest of what the processes that share a tensor found in their parts of it."""
    if not is_split(like):
        return value
    here = torch.tensor([value], dtype=torch.float64, device=part_here(like).device)
    return float(gathered_rows(here, like).max())


def gathered_in_first(tensor: DTensor) -> Tensor | None:
    """A split matrix as a whole on the CPU of the first process, and None in all others.

    The rows are sent one process after another, so that no device holds more than those of two.
    """
    is_first = tensor.device_mesh.get_local_rank() == 0
    gathered = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") if is_first else None
    for rows, block in blocks_of_rows(tensor):
        if gathered is not None:
            gathered[rows] = block.cpu()
    return gathered


def wait_for_all(tensor: Tensor) -> None:
    """Wait until all processes that share a tensor are here."""
    if is_split(tensor):
        torch.distributed.barrier(group=tensor.device_mesh.get_group())


def gathered_objects(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
