"""Restored cells: one clean state, or a window of module outputs, put back into the corrupted run.

A cell changes nothing before its position and nothing below its first restored layer. Cells of one position share
passes, whatever their layer, kind and severing; `rows` says how a pass goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import pandas as pd
import torch

from mechedit.batching import spare_tokens
from mechedit.models import Model
from mechedit.trace.config import TraceConfig
from mechedit.trace.corruption import NoiseSource, Spread
from mechedit.trace.memory import pass_rows
from mechedit.trace.restore import Cell, restore
from mechedit.trace.runs import Scene, run_clean_and_corrupted
from mechedit.trace.tokens import TracedFact, wanted

COLUMNS = (
    "fact", "kind", "window", "sever", "layer", "position", "token", "role",
    "metric", "score", "corrupted", "clean", "effect", "samples",
)  # fmt: skip


def trace_group(
    model: Model,
    facts: list[TracedFact],
    std: float,
    config: TraceConfig,
    noise: NoiseSource | None = None,
    spread: Spread | None = None,
) -> pd.DataFrame:
    """All cells of a group of facts of one shape, in the order kind, severing, layer, fact, position."""
    scene = run_clean_and_corrupted(model, facts, std, config, noise, spread)
    cells = all_cells(scene)
    scores: dict[Cell, dict[str, float]] = {}
    for some in _passes([cell for cell in cells if _can_change(scene, cell)], scene):
        scores |= restored(scene, some)
    unchanged = [{name: rows[f].item() for name, rows in scene.corrupted_scores.items()} for f in range(len(facts))]
    rows = [row for cell in cells for row in _rows(scene, cell, scores.get(cell, unchanged[cell.fact]), unchanged)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def all_cells(scene: Scene) -> list[Cell]:
    """Every cell that the settings ask for."""
    config, n_layers = scene.config, scene.model.n_layers
    places = [(f, position) for f, traced in enumerate(scene.facts) for position in wanted(traced, config)]
    spans = {
        (kind, layer): window_span(kind, layer, n_layers, config.window)
        for kind in config.kinds
        for layer in range(n_layers)
    }
    return [
        Cell(kind, str(sever), layer, f, position, span.start, span.stop)
        for kind in config.kinds
        for sever in config.sever
        for layer in range(n_layers)
        for span in [spans[kind, layer]]
        for f, position in places
    ]


def _can_change(scene: Scene, cell: Cell) -> bool:
    """What precedes the subject was never corrupted; and the last block passes on the positions that are read only."""
    traced, last = scene.facts[cell.fact], scene.model.n_layers - 1
    return cell.position >= traced.subject.start and (cell.first < last or cell.position >= traced.prompt_length - 1)


def window_span(kind: str, layer: int, n_layers: int, width: int | None) -> range:
    """Layers restored by the cell at `layer`: itself for a state, else a centered window cut at the edges.

    The published code restores l − w/2 … l + w/2 − 1; so does this, and the true span is in the rows.
    """
    if kind == "state":
        return range(layer, layer + 1)
    width = width or default_window(n_layers)
    start = layer - width // 2
    return range(max(0, start), min(n_layers, start + width))


def default_window(n_layers: int) -> int:
    """10 layers from 28 up (the papers' choice), scaled to depth below, at least 1."""
    return 10 if n_layers >= 28 else max(1, round(10 * n_layers / 28))


def _passes(cells: Sequence[Cell], scene: Scene) -> Iterator[list[Cell]]:
    """Cells sharing a pass: those of one position, and of the next ones while that costs less than one of their own.

    A row whose cell lies after the pass's first position computes the tokens between in vain.
    """
    model = scene.model
    most = max(1, pass_rows(model, scene.facts[0], scene.config) // scene.samples)
    allowance = model.n_layers * spare_tokens(model)
    together: list[Cell] = []
    for position, alike in groupby(sorted(cells, key=lambda cell: (cell.position, cell)), lambda cell: cell.position):
        some = list(alike)
        blocks = scene.samples * sum(model.n_layers - 1 - cell.first for cell in some)
        if together and (position - together[0].position) * blocks > allowance:
            yield from _cut(together, most)
            together = []
        together += some
    yield from _cut(together, most)


def _cut(cells: Sequence[Cell], most: int) -> Iterator[list[Cell]]:
    """At most so many cells at once, in the order in which they join a pass."""
    ordered = sorted(cells, key=lambda cell: cell.first)
    # Spread evenly: two passes of like size and not a full one and a remainder.
    count = -(-len(ordered) // most)
    return (ordered[i::count] for i in range(count))


def restored(scene: Scene, cells: Sequence[Cell]) -> dict[Cell, dict[str, float]]:
    """Mean scores over samples of each cell; halves the pass when the device's memory does not hold it."""
    try:
        means = restore(scene, cells)
    except torch.OutOfMemoryError:
        if len(cells) == 1:
            raise
        half = len(cells) // 2
        return restored(scene, cells[:half]) | restored(scene, cells[half:])
    return {cell: {name: values[i].item() for name, values in means.items()} for i, cell in enumerate(cells)}


def _rows(
    scene: Scene, cell: Cell, score: dict[str, float], corrupted: Sequence[dict[str, float]]
) -> Iterator[tuple[object, ...]]:
    """One row a metric."""
    traced = scene.facts[cell.fact]
    clean = {name: values[cell.fact].item() for name, values in scene.clean_scores.items()}
    for name, (mean, low, high) in scene.with_normalized(score, corrupted[cell.fact], clean).items():
        yield (
            traced.fact.id, cell.kind, cell.stop - cell.first, cell.sever, cell.layer, cell.position,
            traced.tokens[cell.position], traced.roles[cell.position],
            name, mean, low, high, mean - low, scene.samples,
        )  # fmt: skip
