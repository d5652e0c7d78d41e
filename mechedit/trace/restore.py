"""Restoration in batches: rows of restored cells run through the layers together, each joining where it first differs.

Below the first restored block, the row of a cell equals the corrupted run. That block changes its own position alone,
because the other positions attend to what they attended to. So a row joins the batch after its first restored block,
with the corrupted states and one position replaced. The batch computes each layer once for all rows that have joined,
every row from its restored position on, and takes the corrupted run's keys and values for the positions before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mechedit.errors import InputError, brief
from mechedit.models import EMBED, KVCache, Patch, Resume, Site, Tokens
from mechedit.trace.config import PART_OF_KIND
from mechedit.trace.metric_values import MetricValues
from mechedit.trace.runs import TraceRuns, slice_patch
from mechedit.trace.traced_fact import TracedFact


@dataclass(frozen=True, order=True)
class Cell:
    """One restoration: a kind of state or window at one layer and position of one fact, under one severing."""

    kind: str
    sever: str
    """Label of the severing."""
    layer: int
    fact: int
    """Index of the fact in its group."""
    position: int
    first: int
    """First restored layer."""
    stop: int
    """Layer after the last restored one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CellBatch:
    """The rows of a batch of cells: each cell under every noise sample, in the order in which they join.

    A row begins at its restored position, which is column 0 of the batch; what comes behind its last token is padding.
    """

    runs: TraceRuns
    cells: Sequence[Cell]
    fact: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    """Restored position of each row in its prompt, the first that is computed; patches count positions from it."""
    corrupted_row: Int[Tensor, " row"]
    """Row of the corrupted run with the same fact and sample."""
    width: int
    """Tokens of the longest row."""

    @staticmethod
    def of(runs: TraceRuns, cells: Sequence[Cell]) -> CellBatch:
        """The rows of cells that are sorted by their first layer; the samples of a cell are side by side."""
        assert list(cells) == sorted(cells, key=lambda cell: cell.first)
        device, samples = runs.model.device, runs.samples
        fact, position = (
            torch.tensor(values, device=device).repeat_interleave(samples)
            for values in zip(*((cell.fact, cell.position) for cell in cells), strict=True)
        )
        sample = torch.arange(samples, device=device).repeat(len(cells))
        return CellBatch(
            runs=runs,
            cells=cells,
            fact=fact,
            position=position,
            corrupted_row=fact * samples + sample,
            width=max(n_changed(runs.facts, cell) for cell in cells),
        )

    def take(self, begin: int, end: int) -> CellBatch:
        """The rows of the cells from `begin` up to `end`."""
        rows = slice(begin * self.runs.samples, end * self.runs.samples)
        return replace(
            self,
            cells=self.cells[begin:end],
            fact=self.fact[rows],
            position=self.position[rows],
            corrupted_row=self.corrupted_row[rows],
        )

    def joined_before(self, layer: int) -> CellBatch:
        """The rows whose first restored layer is below `layer`."""
        return self.take(0, sum(cell.first < layer for cell in self.cells))

    def joining_at(self, layer: int) -> CellBatch:
        """The rows whose first restored layer is `layer`."""
        begin = sum(cell.first < layer for cell in self.cells)
        return self.take(begin, begin + sum(cell.first == layer for cell in self.cells))

    def row_mask(self, cell_mask: Sequence[bool]) -> Bool[Tensor, " row"]:
        """A mask of cells as a mask of their rows."""
        return torch.tensor(cell_mask, device=self.fact.device).repeat_interleave(self.runs.samples)

    @property
    def tokens(self) -> Tokens:
        """Each row's tokens from its position on."""
        ids, mask = (self._from_position(values) for values in (self.runs.tokens.ids, self.runs.tokens.mask))
        columns = torch.arange(self.width, device=ids.device)
        return Tokens(ids, mask * (columns < self.runs.tokens.ids.shape[1] - self.position[:, None]))

    @property
    def read_at(self) -> Int[Tensor, "row object"]:
        """Columns whose logits predict the object's tokens."""
        return self.runs.read_at[self.fact] - self.position[:, None]

    def corrupted_states(self, layer: int) -> Float[Tensor, "row pos d_model"]:
        """States of the corrupted run after a block, from each row's position on."""
        return self._from_position(self.runs.corrupted[Site(layer, "resid")])

    def kv_cache(self, layer: int) -> KVCache | None:
        """The corrupted run's keys and values in a block before each row's position; None where nothing is."""
        if not self.position.any():
            return None
        return self.runs.kv_cache.before(self.position, layer, layer, self.corrupted_row)

    def _from_position(self, values: Shaped[Tensor, "corrupted pos *_"]) -> Shaped[Tensor, "row width *_"]:
        """The corrupted run's values from each row's position on; padding has those of the last position."""
        longest = values.shape[1]
        at = self.position[:, None] + torch.arange(self.width, device=self.position.device)
        index = (self.corrupted_row[:, None] * longest + at.clamp(max=longest - 1)).flatten()
        return values.flatten(0, 1).index_select(0, index.to(values.device)).unflatten(0, at.shape)


def n_changed(facts: Sequence[TracedFact], cell: Cell) -> int:
    """Tokens that restoring a cell can change: its own and those behind it."""
    return len(facts[cell.fact].ids) - cell.position


def restore_cells(runs: TraceRuns, cells: Sequence[Cell]) -> MetricValues:
    """Put the clean values of cells back and score them: means over noise samples.

    Args:
        runs: the clean and corrupted runs of the cells' facts.
        cells: cells in the order of their first restored layers; one number per cell is returned for each metric.

    Raises:
        InputError: a score is not finite.
    """
    batch, last = CellBatch.of(runs, cells), runs.model.n_layers - 1
    resid = None
    for layer in range(cells[0].first, last):
        if resid is not None:
            resid = _through_block(batch.joined_before(layer), layer, resid)
        joining = batch.joining_at(layer)
        if joining.cells:
            new = _states_after_joining(joining, layer)
            resid = new if resid is None else torch.cat([resid, new])
    return {name: values.view(len(cells), -1).mean(1) for name, values in _last_block(batch, last, resid).items()}


def _through_block(
    batch: CellBatch, layer: int, resid: Float[Tensor, "row pos d_model"]
) -> Float[Tensor, "row pos d_model"]:
    """The states after one more block."""
    site = Site(layer, "resid")
    run = batch.runs.model.run(
        batch.tokens,
        [*sever_patches(batch, layer), *restore_patches(batch, layer)],
        [site],
        resume=Resume(layer, resid),
        stop_after=layer,
        kv_cache=batch.kv_cache(layer),
    )
    return run[site]


def _states_after_joining(batch: CellBatch, layer: int) -> Float[Tensor, "row pos d_model"]:
    """States after the block at which rows join: the corrupted ones, with the restored position's replaced."""
    resid = batch.corrupted_states(layer)
    resid[:, 0] = _restored_states(batch, layer)
    return resid


def _restored_states(batch: CellBatch, layer: int) -> Float[Tensor, "row d_model"]:
    """The restored position's state after the block at which rows join."""
    runs, site = batch.runs, Site(layer, "resid")
    states = runs.clean[EMBED].new_zeros(len(batch.position), runs.model.d_model)
    for kind, sever in dict.fromkeys((cell.kind, cell.sever) for cell in batch.cells):
        mask = batch.row_mask([(cell.kind, cell.sever) == (kind, sever) for cell in batch.cells])
        rows, positions = batch.corrupted_row[mask], batch.position[mask]
        if kind == "state":
            restored = runs.clean[site][batch.fact[mask], positions]
        elif kind == "mlp":
            restored = runs.mlp_window_states(layer, rows, positions)
        else:
            restored = runs.attention_window_states(sever, layer)[rows, positions - runs.restored_span.start]
        # The layers of a model may be on several devices.
        states[mask] = restored.to(states.device)
    return states


def _last_block(batch: CellBatch, last: int, resid: Float[Tensor, "joined pos d_model"] | None) -> MetricValues:
    """Scores after the last block; rows that join there take their restored state after it."""
    runs, joining = batch.runs, batch.joining_at(last)
    patches = [*sever_patches(batch, last), *restore_patches(batch, last)]
    if joining.cells:
        where = _first_column(batch.row_mask([cell.first == last for cell in batch.cells]))
        value = runs.clean[EMBED].new_zeros(len(where), 1, runs.model.d_model)
        value[-len(joining.corrupted_row) :, 0] = _restored_states(joining, last)
        patches.append(Patch(Site(last, "resid"), where, value))
        if last > 0:
            resid = torch.cat([*([] if resid is None else [resid]), joining.corrupted_states(last - 1)])
    if resid is None:
        patches.insert(0, slice_patch(runs.corruption, batch.corrupted_row, batch.position))
    run = runs.model.run(
        batch.tokens,
        patches,
        resume=None if resid is None else Resume(last, resid),
        logits_to_keep=batch.read_at,
        kv_cache=batch.kv_cache(last),
        unembed=runs.readout is None,
    )
    metrics = runs.metric_values(run, batch.fact)
    for name, values in metrics.items():
        _check_finite(batch, name, values)
    return metrics


def restore_patches(batch: CellBatch, layer: int) -> list[Patch]:
    """Clean values at each row's position, for windows that continue through this layer."""
    runs = batch.runs
    patches = []
    for kind in dict.fromkeys(cell.kind for cell in batch.cells):
        mask = batch.row_mask([cell.kind == kind and cell.first < layer < cell.stop for cell in batch.cells])
        if layer == runs.model.n_layers - 1:
            mask &= batch.read_at[:, 0] <= 0
        if mask.any():
            site = Site(layer, PART_OF_KIND[kind])
            patches.append(Patch(site, _first_column(mask), runs.clean[site][batch.fact, batch.position, None]))
    return patches


def sever_patches(batch: CellBatch, layer: int) -> list[Patch]:
    """Severed modules of a layer held to their corrupted outputs; before the rows' positions they have them."""
    runs = batch.runs
    # Of the last block, only what is read counts.
    least = batch.read_at[:, 0].clamp(min=0) if layer == runs.model.n_layers - 1 else 0
    patches = []
    for sever in dict.fromkeys(cell.sever for cell in batch.cells):
        mask = batch.row_mask([cell.sever == sever for cell in batch.cells])
        patches += runs.severed[sever].patches(batch.corrupted_row, layer, batch.position, least=least, mask=mask)
    return patches


def _first_column(mask: Bool[Tensor, " row"]) -> Int[Tensor, "row 1"]:
    """Column 0 of the masked rows, as a patch's positions."""
    return mask.long()[:, None] - 1


def _check_finite(batch: CellBatch, name: str, values: Float[Tensor, " row"]) -> None:
    if not values.isfinite().all():
        row = int((~values.isfinite()).nonzero()[0, 0])
        cell = batch.cells[row // batch.runs.samples]
        raise InputError(
            f"fact {brief(batch.runs.facts[cell.fact].fact.id)}, {cell.kind} at layer {cell.layer}, position "
            f"{cell.position}: the {name} is {values[row].item()}, expected a finite number; half precision may have "
            f"overflowed: use --dtype float32 or bfloat16"
        )
