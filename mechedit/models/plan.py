"""What one run does on its way: the sites it writes and reads, in forward order, and where it may end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.models.protocol import Site, Tokens


@dataclass(frozen=True, eq=False)
class Write:
    """Values to put at chosen (row, position) pairs of one activation."""

    rows: Int[Tensor, " entry"]
    columns: Int[Tensor, " entry"]
    value: Float[Tensor, "entry width"]
    add: bool = False

    def __call__(self, activation: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        """Write into a copy where gradients must reach the value, else in place: sites are modules' fresh outputs."""
        written = activation.clone() if torch.is_grad_enabled() else activation
        at = (self.rows.to(activation.device), self.columns.to(activation.device))
        value = self.value.to(activation)
        written[at] = activation[at] + value if self.add else value
        return written


@dataclass(frozen=True, eq=False)
class Step:
    """What one run does at one site."""

    site: Site
    writes: tuple[Write, ...]
    """In the order in which the patches were given."""
    read: bool

    def __call__(self, activation: Tensor, values: dict[Site, Tensor]) -> Tensor:
        """Apply the writes, note the result in `values` if it was asked for, and return it."""
        for write in self.writes:
            activation = write(activation)
        if self.read:
            values[self.site] = activation
        return activation


class Stopped(Exception):  # noqa: N818 - the wanted end of a run, not an error
    """Leaves the forward pass after the last block that was asked for."""


def looks_at_the_end(step: Step, stop_after: int | None) -> bool:
    """Whether a step only reads the residual that a run ends with."""
    return stop_after is not None and not step.writes and step.site == Site(stop_after, "resid")


def end_of(steps: Sequence[Step], stop_after: int | None, cache: bool) -> Site | None:
    """Where a run may stop: at the last site that is looked at, if it lies in the block after which it stops."""
    if stop_after is None:
        return None
    # In a block whose attention and MLP are parallel, the keys and values may not be there yet.
    looked_at = steps and steps[-1].site.part != "embed" and steps[-1].site.layer == stop_after and not cache
    return steps[-1].site if looked_at else Site(stop_after, "resid")


def entries_of(positions: Int[Tensor, "batch slot"], tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, slots and positions of the entries to write (those not −1)."""
    batch, width = tokens.ids.shape
    if positions.shape[0] != batch:
        raise ValueError(f"a patch has positions for {positions.shape[0]} rows, expected {batch}")
    # On the CPU, so that checking does not wait for the accelerator once a check.
    where = positions.cpu()
    if where.numel() and not -1 <= int(where.min()) <= int(where.max()) < width:
        raise ValueError(f"a patch has positions outside −1 to {width - 1}, the batch's width")
    rows, slots = (where >= 0).nonzero(as_tuple=True)
    columns = where[rows, slots]
    if len(torch.unique(rows * width + columns)) != len(rows):
        raise ValueError("a patch writes one position of a row twice; use a patch for each")
    return rows, slots, columns
