"""An approximate trace of a group of facts: every effect estimated, and those of chosen cells traced exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from mechedit.models import Model, exclusive
from mechedit.trace.approximation import Approximation, CellKey, DrawnCells, draw_cells
from mechedit.trace.attribution import estimate_cells
from mechedit.trace.averages import main_metric
from mechedit.trace.cells import (
    all_cells,
    can_change,
    cell_rows,
    corrupted_scores,
    restored_spans,
    trace_cells,
)
from mechedit.trace.columns import APPROXIMATE_COLUMNS, COLUMNS
from mechedit.trace.config import TraceConfig
from mechedit.trace.corruption import EmbeddingStatistics, NoiseSource
from mechedit.trace.restore import Cell
from mechedit.trace.runs import run_clean_and_corrupted
from mechedit.trace.traced_fact import TracedFact, restored_positions

EFFECT = COLUMNS.index("effect")
CORRECTED_ROLE = "subject_last"
"""Where drawn facts are traced exactly: selection reads effects there."""


def draw_for(facts: Sequence[TracedFact], config: TraceConfig, n_layers: int) -> dict[str, DrawnCells]:
    """The cells of an approximate trace that are traced exactly by chance, by the facts' ids."""
    approximation = config.approximation
    assert approximation is not None
    spans = restored_spans(config, n_layers)
    cells_of: dict[str, dict[tuple[str, str], list[CellKey]]] = {}
    for traced in facts:
        positions = restored_positions(traced, config)
        groups: dict[tuple[str, str], list[CellKey]] = {}
        for kind, sever, layer, span in spans:
            groups.setdefault((kind, sever), []).extend(
                (kind, sever, layer, position)
                for position in positions
                if can_change(traced, position, span.start, n_layers)
            )
        cells_of[traced.fact.id] = groups
    return draw_cells(cells_of, approximation, config.seed)


@torch.inference_mode(False)
@torch.no_grad()
@exclusive
def approximate_group(
    model: Model,
    facts: list[TracedFact],
    std: float,
    config: TraceConfig,
    noise: NoiseSource | None,
    statistics: EmbeddingStatistics | None,
    drawn: Mapping[str, DrawnCells],
) -> pd.DataFrame:
    """Effects of all cells of a group of facts, in the order of `trace_group`, with `APPROXIMATE_COLUMNS`.

    Arguments are those of `trace_group`, and the draw of every fact.
    """
    assert config.approximation is not None
    runs = run_clean_and_corrupted(model, facts, std, config, noise, statistics)
    cells = all_cells(runs)
    changing = [c for c in cells if can_change(facts[c.fact], c.position, c.first, model.n_layers)]
    approximation = config.approximation
    estimates = estimate_cells(runs, changing, approximation.points, all_samples=approximation.all_samples)
    corrupted = corrupted_scores(runs)
    metric = main_metric(estimates[changing[0]]) if changing else ""
    sizes = {cell: abs(scores[metric] - corrupted[cell.fact][metric]) for cell, scores in estimates.items()}
    largest = largest_cells(sizes, config.approximation)
    exact = trace_cells(runs, [c for c in changing if c in largest or _is_drawn(c, facts, drawn)])
    rows = []
    for cell in cells:
        scores = estimates.get(cell, corrupted[cell.fact])
        estimated = [row[EFFECT] for row in cell_rows(runs, cell, scores, corrupted)]
        certain = cell not in estimates or cell in largest
        how = (
            certain or cell in exact,
            key_of(cell) in drawn[facts[cell.fact].fact.id].cells,
            1.0 if certain else _chance(cell, facts, drawn),
        )
        for row, estimate in zip(cell_rows(runs, cell, exact.get(cell, scores), corrupted), estimated, strict=True):
            rows.append((*row, estimate, *how))
    return pd.DataFrame(rows, columns=[*COLUMNS, *APPROXIMATE_COLUMNS])


def _is_drawn(cell: Cell, facts: Sequence[TracedFact], drawn: Mapping[str, DrawnCells]) -> bool:
    """Whether a cell is traced exactly by chance: for itself, or with all others at its fact's subject's last token."""
    traced = facts[cell.fact]
    draw = drawn[traced.fact.id]
    return key_of(cell) in draw.cells or (draw.fact and traced.roles[cell.position] == CORRECTED_ROLE)


def _chance(cell: Cell, facts: Sequence[TracedFact], drawn: Mapping[str, DrawnCells]) -> float:
    """Probability with which a cell was drawn, where averages are corrected; elsewhere NaN."""
    traced = facts[cell.fact]
    draw = drawn[traced.fact.id]
    if traced.roles[cell.position] != CORRECTED_ROLE:
        return float("nan")
    return 1 - (1 - draw.fact_chance) * (1 - draw.cell_chances[cell.kind, cell.sever])


def key_of(cell: Cell) -> CellKey:
    """A cell within its fact, as a draw names it."""
    return cell.kind, cell.sever, cell.layer, cell.position


def largest_cells(sizes: Mapping[Cell, float], approximation: Approximation) -> set[Cell]:
    """The cells of the largest estimated effects in every fact, kind and severing."""
    groups: dict[tuple[int, str, str], list[Cell]] = {}
    for cell in sizes:
        groups.setdefault((cell.fact, cell.kind, cell.sever), []).append(cell)
    return {
        cell
        for group in groups.values()
        for cell in sorted(group, key=lambda cell: -sizes[cell])[: approximation.largest]
    }
