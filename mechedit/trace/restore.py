"""A pass: rows of restored cells on one way through the layers, each joining where it first differs.

Below the first restored block a cell's row is the corrupted run; of that block it changes its own position alone,
because the other positions attend to what they attended to. So a row joins the pass after its first restored block,
with the corrupted state and one position replaced, and the pass computes each layer once for all rows that have
joined, from the pass's first position on, with the corrupted run's keys and values before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.errors import InputError
from mechedit.models import Patch, Resume, Site, Tokens
from mechedit.trace.config import PART_OF_KIND
from mechedit.trace.runs import Held, Measured, Scene


@dataclass(frozen=True, order=True)
class Cell:
    """One restoration of one fact."""

    kind: str
    sever: str
    """Label of what is cut."""
    layer: int
    fact: int
    """Index in the group."""
    position: int
    first: int
    """Restored layers: first … stop − 1."""
    stop: int


@dataclass(frozen=True, kw_only=True, eq=False)
class CellRows:
    """The rows of a pass: each cell under every draw, in the order in which they join."""

    scene: Scene
    cells: Sequence[Cell]
    start: int
    """First position of the pass; positions in patches are counted from it."""
    fact: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    index: Int[Tensor, " row"]
    """Of the row in the scene."""

    @staticmethod
    def of(scene: Scene, cells: Sequence[Cell]) -> CellRows:
        """The rows of some cells, a cell's draws side by side."""
        assert list(cells) == sorted(cells, key=lambda cell: cell.first)
        device, samples = scene.model.device, scene.samples
        fact, position = (
            torch.tensor(values, device=device).repeat_interleave(samples)
            for values in zip(*((cell.fact, cell.position) for cell in cells), strict=True)
        )
        draw = torch.arange(samples, device=device).repeat(len(cells))
        start = min(cell.position for cell in cells)
        return CellRows(
            scene=scene, cells=cells, start=start, fact=fact, position=position, index=fact * samples + draw
        )

    def part(self, begin: int, end: int) -> CellRows:
        """The rows of cells begin … end − 1."""
        rows = slice(begin * self.scene.samples, end * self.scene.samples)
        return CellRows(
            scene=self.scene,
            cells=self.cells[begin:end],
            start=self.start,
            fact=self.fact[rows],
            position=self.position[rows],
            index=self.index[rows],
        )

    def before(self, layer: int) -> CellRows:
        """The rows that join below a layer."""
        return self.part(0, sum(cell.first < layer for cell in self.cells))

    def joining(self, layer: int) -> CellRows:
        """The rows that join at a layer."""
        begin = sum(cell.first < layer for cell in self.cells)
        return self.part(begin, begin + sum(cell.first == layer for cell in self.cells))

    def which(self, chosen: Sequence[bool]) -> Tensor:
        """A mask of rows from one of cells."""
        return torch.tensor(chosen, device=self.fact.device).repeat_interleave(self.scene.samples)

    @property
    def tokens(self) -> Tokens:
        """From the pass's first position on."""
        tokens = self.scene.tokens
        return Tokens(tokens.ids[self.index, self.start :], tokens.mask[self.index, self.start :])

    def corrupted(self, layer: int) -> Float[Tensor, "row pos d_model"]:
        """States of the corrupted run after a block."""
        return self.scene.corrupted[Site(layer, "resid")][:, self.start :].index_select(0, self.index)


def restore(scene: Scene, cells: Sequence[Cell]) -> Measured:
    """Mean scores over samples of cells, in order of their first layers, their clean values put back."""
    rows, last = CellRows.of(scene, cells), scene.model.n_layers - 1
    resid = None
    for layer in range(cells[0].first, last):
        if resid is not None:
            resid = _through_block(rows.before(layer), layer, resid)
        joining = rows.joining(layer)
        if joining.cells:
            own = _joined(joining, layer)
            resid = own if resid is None else torch.cat([resid, own])
    return {name: values.view(len(cells), -1).mean(1) for name, values in _measured(rows, last, resid).items()}


def _through_block(
    rows: CellRows, layer: int, resid: Float[Tensor, "row pos d_model"]
) -> Float[Tensor, "row pos d_model"]:
    """The states after one more block."""
    scene, site = rows.scene, Site(layer, "resid")
    run = scene.model.run(
        rows.tokens,
        [*sever_patches(rows, layer), *restore_patches(rows, layer)],
        [site],
        resume=Resume(layer, resid),
        stop_after=layer,
        kv_cache=scene.kv_cache.take(rows.index, rows.start, layer, layer) if rows.start else None,
    )
    return run[site]


def _joined(rows: CellRows, layer: int) -> Float[Tensor, "row pos d_model"]:
    """States after the block at which rows join: the corrupted ones, with the restored position's replaced."""
    resid = rows.corrupted(layer)
    resid[torch.arange(len(resid), device=resid.device), rows.position - rows.start] = _replaced(rows, layer)
    return resid


def _replaced(rows: CellRows, layer: int) -> Float[Tensor, "row d_model"]:
    """The restored position's state after the block at which rows join."""
    scene = rows.scene
    found = scene.clean[Site(layer, "resid")][rows.fact, rows.position]
    for kind, sever in dict.fromkeys((cell.kind, cell.sever) for cell in rows.cells if cell.kind != "state"):
        mask = rows.which([(cell.kind, cell.sever) == (kind, sever) for cell in rows.cells])
        states = scene.entries.get((kind, sever, layer))
        if states is None:
            states = scene.entries[kind, sever, layer] = _entries(scene, kind, sever, layer)
        found[mask] = states[rows.index[mask], rows.position[mask] - scene.restorable.start]
    return found


def _entries(scene: Scene, kind: str, sever: str, layer: int) -> Float[Tensor, "row pos d_model"]:
    """States after a block whose module's clean output was put back, at all positions that are restored.

    What a position's state becomes depends on what is put back at that position alone, so that one run stands for
    the cells of all positions.
    """
    span, site, device = scene.restorable, Site(layer, "resid"), scene.model.device
    every = torch.arange(len(scene.tokens.ids), device=device)
    where = torch.arange(len(span), device=device).repeat(len(every), 1)
    clean = scene.clean[Site(layer, PART_OF_KIND[kind])][:, span.start : span.stop]
    patches = [
        *_held(scene, sever, every, layer, range(span.start, span.stop)),
        Patch(Site(layer, PART_OF_KIND[kind]), where, clean.repeat_interleave(scene.samples, 0)),
    ]
    resume = None
    if layer > 0:
        resume = Resume(layer, scene.corrupted[Site(layer - 1, "resid")][:, span.start : span.stop])
    else:
        patches.insert(0, shifted(scene.noise, every, span.start, span.stop))
    run = scene.model.run(
        Tokens(scene.tokens.ids[:, span.start : span.stop], scene.tokens.mask[:, span.start : span.stop]),
        patches,
        [site],
        resume=resume,
        stop_after=layer,
        kv_cache=scene.kv_cache.take(every, span.start, layer, layer) if span.start else None,
    )
    return run[site]


def _measured(rows: CellRows, last: int, resid: Float[Tensor, "joined pos d_model"] | None) -> Measured:
    """Scores after the last block; rows that join there take their replaced state after it."""
    scene, late, start = rows.scene, rows.joining(last), rows.start
    patches = [*sever_patches(rows, last), *restore_patches(rows, last)]
    if late.cells:
        where = rows.position.where(rows.which([cell.first == last for cell in rows.cells]), -1 + start) - start
        value = scene.clean[Site(last, "resid")].new_zeros(len(where), 1, scene.model.d_model)
        value[-len(late.index) :, 0] = _replaced(late, last)
        patches.append(Patch(Site(last, "resid"), where[:, None], value))
        if last > 0:
            resid = torch.cat([*([] if resid is None else [resid]), late.corrupted(last - 1)])
    if resid is None:
        patches.insert(0, shifted(scene.noise, rows.index, start))
    run = scene.model.run(
        rows.tokens,
        patches,
        resume=None if resid is None else Resume(last, resid),
        logits_to_keep=scene.read_at - start,
        kv_cache=scene.kv_cache.take(rows.index, start, last) if start else None,
    )
    measured = scene.measure(run, rows.fact)
    for name, values in measured.items():
        _check_finite(rows, name, values)
    return measured


def restore_patches(rows: CellRows, layer: int) -> list[Patch]:
    """Clean values at each row's position, for windows that go on through this layer."""
    scene = rows.scene
    patches = []
    for kind in dict.fromkeys(cell.kind for cell in rows.cells):
        mask = rows.which([cell.kind == kind and cell.first < layer < cell.stop for cell in rows.cells])
        if layer == scene.model.n_layers - 1:
            mask &= rows.position >= scene.read_at[0]
        if mask.any():
            site = Site(layer, PART_OF_KIND[kind])
            where = torch.where(mask, rows.position - rows.start, -1)
            patches.append(Patch(site, where[:, None], scene.clean[site][rows.fact, rows.position, None]))
    return patches


def sever_patches(rows: CellRows, layer: int) -> list[Patch]:
    """Hold modules of a layer to their corrupted outputs; what lies before the pass has them anyway."""
    scene = rows.scene
    first = scene.read_at[0].item() if layer == scene.model.n_layers - 1 else rows.start
    positions = range(max(int(first), rows.start), scene.tokens.ids.shape[1])
    patches = []
    for sever in dict.fromkeys(cell.sever for cell in rows.cells):
        mask = rows.which([cell.sever == sever for cell in rows.cells])
        patches += _held(scene, sever, rows.index, layer, positions, mask, rows.start)
    return patches


def _held(
    scene: Scene,
    sever: str,
    index: Int[Tensor, " row"],
    layer: int,
    positions: range,
    mask: Tensor | None = None,
    start: int | None = None,
) -> list[Patch]:
    """Corrupted outputs of the modules that a severing cuts in a layer, where they lie in `positions`."""
    held: Held = scene.held[sever]
    places = held.positions.to(index.device)[index]
    inside = (places >= positions.start) & (places < positions.stop)
    if mask is not None:
        inside &= mask[:, None]
    where = torch.where(inside, places - (positions.start if start is None else start), -1)
    sites = [site for site in held.outputs if site.layer == layer]
    return [Patch(site, where, held.outputs[site][index]) for site in sites if inside.any()]


def shifted(patch: Patch, rows: Int[Tensor, " row"], start: int, end: int | None = None) -> Patch:
    """A patch's chosen rows, with positions counted from `start`; earlier ones, and those from `end`, left out."""
    where = patch.positions[rows] - start
    if end is not None:
        where = torch.where(where < end - start, where, -1)
    return Patch(patch.site, where.clamp(min=-1), patch.value[rows])


def _check_finite(rows: CellRows, name: str, values: Float[Tensor, " row"]) -> None:
    if not values.isfinite().all():
        row = int((~values.isfinite()).nonzero()[0, 0])
        cell = rows.cells[row // rows.scene.samples]
        raise InputError(
            f"fact {rows.scene.facts[cell.fact].fact.id!r}, {cell.kind} at layer {cell.layer}, position "
            f"{cell.position}: the {name} is {values[row].item()}, expected a finite number; half precision may have "
            f"overflowed: use --dtype float32 or bfloat16"
        )
