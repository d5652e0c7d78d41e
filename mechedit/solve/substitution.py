"""Forward and backward substitution with a Cholesky factor L, whose rows may be split over processes."""

from __future__ import annotations

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor

from mechedit.split_tensors import is_split, part_here, sent, split_in_rows, split_like


def cholesky_solution(lower: Float[Tensor, "n n"], right_side: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """(L Lᵀ)⁻¹ B, in the dtype of both, and split as B is; where L is whole, so is B."""
    if is_split(lower):
        return split_like(_split_solution(lower, split_like(right_side, lower)), right_side)
    # torch.cholesky_solve would copy L each time.
    forward = torch.linalg.solve_triangular(lower, right_side, upper=False)
    # In place, as fresh memory costs more to touch than to fill; autograd does not allow it.
    out = None if forward.requires_grad else forward
    return torch.linalg.solve_triangular(lower.mT, forward, upper=True, out=out)


def _split_solution(lower: DTensor, right_side: Tensor) -> DTensor:
    """The same by blocks of rows, one process after another.

    Forward, a process solves for its block and sends it to all, and those after it take L₂₁ X₁ off their right-hand
    sides; backward, it sends each process before it that one's L₂₁ᵀ X₂, which only the rows here give.
    """
    mesh, here = lower.device_mesh, part_here(lower)
    rank, size, group = mesh.get_local_rank(), len(here), mesh.get_group()
    blocks = here.split(size, 1)
    block = part_here(right_side).clone(memory_format=torch.contiguous_format)
    buffer = torch.empty_like(block)
    for sender in range(mesh.size()):
        if rank == sender:
            block.copy_(torch.linalg.solve_triangular(blocks[rank], block, upper=False))
        if sender < mesh.size() - 1:
            above = sent(block, buffer, sender, mesh)
            if rank > sender:
                block.addmm_(blocks[sender], above, alpha=-1)
    for sender in reversed(range(rank + 1, mesh.size())):
        torch.distributed.recv(buffer, group=group, group_src=sender)
        block -= buffer
    block.copy_(torch.linalg.solve_triangular(blocks[rank].mT, block, upper=True))
    for receiver in reversed(range(rank)):
        torch.distributed.send(blocks[receiver].mT @ block, group=group, group_dst=receiver)
    return split_in_rows(block, mesh)
