"""Tensors that are split over processes (torch's DTensor): the part that is here, and the whole.

Every process must ask for the whole of the same tensors in the same order: the parts are sent around.
"""

from __future__ import annotations

from typing import Any, cast

import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def is_split(tensor: Tensor) -> bool:
    """Whether other processes hold parts of the tensor."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is split; a tensor that is not is returned itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_here(tensor: Tensor) -> Tensor:
    """A live view of what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write_(tensor: Tensor, values: Tensor) -> None:
    """Write the whole's values; each process takes its part of them, and nothing is sent."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(
            values.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements, src_data_rank=None
        ).to_local()
    part_here(tensor).copy_(values)


def gathered_columns(part: Tensor, like: Tensor) -> Tensor:
    """The whole of an activation [..., width] of which each process has its columns; gradients go back to the parts.

    Args:
        part: the columns that this process has, as many as the others.
        like: a tensor that is split over the same processes.
    """
    mesh = cast(DTensor, like).device_mesh
    return DTensor.from_local(part, mesh, [Shard(-1)], run_check=False).full_tensor()


def columns_here(activation: Tensor, like: Tensor) -> Tensor:
    """This process's columns of an activation that all have; the other way of `gathered_columns`."""
    mesh = cast(DTensor, like).device_mesh
    return (
        DTensor.from_local(activation, mesh, [Replicate()], run_check=False).redistribute(mesh, [Shard(-1)]).to_local()
    )


def gathered_objects(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
