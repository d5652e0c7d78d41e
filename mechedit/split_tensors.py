"""Tensors that are split over processes (torch's DTensor): the part that is here, and the whole.

Every process must ask for the whole of the same tensors in the same order: the parts are sent around.
"""

from __future__ import annotations

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
    """Write the whole's values; each process takes its part of them, and nothing is sent."""
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
    return DTensor.from_local(part, like.device_mesh, [Shard(-1)], run_check=False).full_tensor()


def columns_here(activation: Tensor, like: DTensor) -> Tensor:
    """This process's columns of an activation that all have; the other way of `gathered_columns`."""
    mesh = like.device_mesh
    return (
        DTensor.from_local(activation, mesh, [Replicate()], run_check=False).redistribute(mesh, [Shard(-1)]).to_local()
    )


def split_in_rows(rows: Float[Tensor, "here column"], mesh: DeviceMesh) -> Float[DTensor, "row column"]:
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
    here = part_here(tensor).contiguous()
    mesh = tensor.device_mesh
    gathered = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") if mesh.get_local_rank() == 0 else None
    for rank in range(mesh.size()):
        rows = here if rank == mesh.get_local_rank() else torch.empty_like(here)
        torch.distributed.broadcast(rows, group=mesh.get_group(), group_src=rank)
        if gathered is not None:
            gathered[rank * len(here) : (rank + 1) * len(here)] = rows.cpu()
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
