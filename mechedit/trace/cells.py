"""Restored cells: one clean state, or a window of module outputs, put back into the corrupted run.

A cell changes nothing before its position and nothing below its first restored layer. Cells that change equally many
tokens share batches, whatever their fact, layer, kind and severing; `restore.py` says how a batch is run.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby

import pandas as pd

from mechedit.batching import padding_budget
from mechedit.models import Model, exclusive
from mechedit.trace.columns import COLUMNS
from mechedit.trace.config import TraceConfig
from mechedit.trace.corruption import EmbeddingStatistics, NoiseSource
from mechedit.trace.memory import enough_tokens, max_batch_rows
from mechedit.trace.restore import Cell, n_changed, restore_cells
from mechedit.trace.runs import TraceRuns, run_clean_and_corrupted
from mechedit.trace.traced_fact import TracedFact, longest_of, restored_positions
from mechedit.trace.windows import window_span
from mechedit.workers import n_workers, run_batches

FEW_TOKENS = 512
"""Fewer tokens than these are left to one worker: products of half as many rows are slower."""


@exclusive
def trace_group(
    model: Model,
    facts: list[TracedFact],
    std: float,
    config: TraceConfig,
    noise: NoiseSource | None = None,
    statistics: EmbeddingStatistics | None = None,
) -> pd.DataFrame:
    """Effects of all cells of a group of facts, in the order kind, severing, layer, fact, position.

    Args:
        model: any `Model`.
        facts: whose objects have equally many tokens.
        std: standard deviation of the noise, in absolute units.
        config: what to restore, sever, corrupt and measure.
        noise: explicit standard-normal draws; by default they are drawn from each fact's seed.
        statistics: of the subjects' embeddings, which multivariate noise needs.
    """
    runs = run_clean_and_corrupted(model, facts, std, config, noise, statistics)
    cells = all_cells(runs)
    scores = trace_cells(
        runs, [cell for cell in cells if can_change(facts[cell.fact], cell.position, cell.first, model.n_layers)]
    )
    corrupted = corrupted_scores(runs)
    rows = [row for cell in cells for row in cell_rows(runs, cell, scores.get(cell, corrupted[cell.fact]), corrupted)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def corrupted_scores(runs: TraceRuns) -> list[dict[str, float]]:
    """Each fact's scores in the corrupted run, by metric: means over samples."""
    by_metric = {name: values.tolist() for name, values in runs.corrupted_scores.items()}
    return [{name: values[f] for name, values in by_metric.items()} for f in range(len(runs.facts))]


def trace_cells(runs: TraceRuns, cells: Sequence[Cell]) -> dict[Cell, dict[str, float]]:
    """Mean scores over samples of cells, which are restored in batches."""
    batches = list(_cell_batches(cells, runs))
    scored = run_batches(runs.model, batches, lambda batch: score_cells(runs, batch))
    return {cell: means for part in scored for cell, means in part.items()}


def all_cells(runs: TraceRuns) -> list[Cell]:
    """Every cell that the settings ask for."""
    positions = [
        (f, position) for f, traced in enumerate(runs.facts) for position in restored_positions(traced, runs.config)
    ]
    return [
        Cell(kind, sever, layer, f, position, span.start, span.stop)
        for kind, sever, layer, span in restored_spans(runs.config, runs.model.n_layers)
        for f, position in positions
    ]


def restored_spans(config: TraceConfig, n_layers: int) -> list[tuple[str, str, int, range]]:
    """Kind, severing and layer of the cells at a position, and the layers that they restore."""
    return [
        (kind, str(sever), layer, window_span(kind, layer, n_layers, config.window))
        for kind in config.kinds
        for sever in config.sever
        for layer in range(n_layers)
    ]


def can_change(traced: TracedFact, position: int, first: int, n_layers: int) -> bool:
    """Whether restoring layers from `first` on can change the score.

    What precedes the subject was never corrupted, and after the last block only the positions that are read count.
    """
    return position >= traced.subject.start and (first < n_layers - 1 or position >= traced.prompt_length - 1)


def _cell_batches(cells: Sequence[Cell], runs: TraceRuns) -> Iterator[list[Cell]]:
    """Cells that run together: those that change the most tokens first.

    Where padding costs something, cells that change fewer tokens join only while that costs less than a new batch.
    """
    model, workers = runs.model, n_workers(runs.model)
    # What runs at once is in memory at once.
    max_rows = max_batch_rows(model, longest_of(runs.facts), runs.config) // workers
    max_cells, max_tokens = max(1, max_rows // runs.samples), enough_tokens(model)
    allowance = math.inf if model.skips_padding else model.n_layers * padding_budget(model)

    def changed(cell: Cell) -> int:
        return n_changed(runs.facts, cell)

    def computed(cell: Cell) -> int:
        return runs.samples * changed(cell)

    batch: list[Cell] = []
    for n_tokens, group in groupby(sorted(cells, key=lambda cell: (-changed(cell), cell)), changed):
        cells_here = list(group)
        blocks = runs.samples * sum(model.n_layers - 1 - cell.first for cell in cells_here)
        if batch and (changed(batch[0]) - n_tokens) * blocks > allowance:
            yield from _split(batch, computed, max_cells, max_tokens, workers)
            batch = []
        batch += cells_here
    yield from _split(batch, computed, max_cells, max_tokens, workers)


def _split(
    cells: Sequence[Cell], n_tokens: Callable[[Cell], int], max_cells: int, max_tokens: int, workers: int
) -> Iterator[list[Cell]]:
    """Batches of at most `max_cells` cells and about `max_tokens` tokens, each in the order of their first layers.

    Several come in a multiple of the workers, none of whom then waits for the last one: cells that stand together in
    `cells` are dealt to as many batches. All batches have nearly equally many tokens, unless cells are few.
    """
    tokens = list(accumulate(map(n_tokens, cells), initial=0))
    if len(cells) <= max_cells and tokens[-1] < FEW_TOKENS:
        workers = 1
    # Two batches of nearly equal size rather than a full one and a remainder.
    rounds = max(1, -(-len(cells) // (max_cells * workers)), -(-tokens[-1] // (max_tokens * workers)))
    begin = 0
    while begin < len(cells):
        # The first cell with which a round has its part of what is left.
        goal = tokens[begin] + (tokens[-1] - tokens[begin]) / rounds
        end = min(max(bisect_left(tokens, goal), begin + 1), begin + max_cells * workers)
        for worker in range(min(workers, end - begin)):
            yield sorted(cells[begin:end][worker::workers], key=lambda cell: cell.first)
        begin, rounds = end, max(rounds - 1, 1)


def score_cells(runs: TraceRuns, cells: Sequence[Cell]) -> dict[Cell, dict[str, float]]:
    """Mean scores over samples of each cell."""
    means = restore_cells(runs, cells)
    return {cell: {name: values[i].item() for name, values in means.items()} for i, cell in enumerate(cells)}


def cell_rows(
    runs: TraceRuns, cell: Cell, score: dict[str, float], corrupted: Sequence[dict[str, float]]
) -> Iterator[tuple[object, ...]]:
    """The rows of one cell in the effects, one per metric."""
    traced = runs.facts[cell.fact]
    clean = {name: values[cell.fact].item() for name, values in runs.clean_scores.items()}
    for name, (mean, low, high) in runs.with_normalized(score, corrupted[cell.fact], clean).items():
        yield (
            traced.fact.id, cell.kind, cell.stop - cell.first, cell.sever, cell.layer, cell.position,
            traced.tokens[cell.position], traced.roles[cell.position],
            name, mean, low, high, mean - low, runs.samples,
        )  # fmt: skip
