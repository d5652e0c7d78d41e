"""Settings of an approximate trace, and the draw of the cells on which it is held against the exact one.

An approximate trace estimates every effect from a gradient (`attribution.py`) and traces exactly

- the cells of the largest estimates, in every fact, kind and severing;
- cells drawn from all facts, on which estimates and exact effects are compared (`agreement.py`);
- all cells at the subject's last token of facts that are drawn, by which averages there are corrected (`averages.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechedit.bounds import check_numbers
from mechedit.errors import check_at_least, check_fraction

CellKey = tuple[str, str, int, int]
"""Kind, severing, layer and position of a fact's cell."""


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """How many cells an approximate trace traces exactly, and how well the estimates must rank them."""

    points: int = 2
    """Subjects at which gradients are taken, from the corrupted one on towards the clean one; noise samples are dealt
    over them, and an estimate is the mean over samples."""
    all_samples: bool = False
    """Take every point's gradient for all samples, which ranks cells a little better and takes longer."""
    largest: int = 1
    """Cells of the largest estimates that are traced exactly, in every fact, kind and severing."""
    exact_cells: int = 200
    """Cells of every kind and severing, drawn from all facts, on which estimates are held against exact effects."""
    exact_facts: int = 20
    """Facts, drawn, whose cells at the subject's last token are traced exactly, to correct averages there."""
    least_correlation: float | int = 0.8
    """Rank correlation below which the trace is refused, in any kind and severing, unless no estimate misses by more
    than rounding; 0 refuses nothing."""

    def __post_init__(self) -> None:
        check_numbers(self, points=1_000_000)
        check_at_least("points", self.points, 1)
        check_at_least("largest", self.largest, 0)
        check_at_least("exact_cells", self.exact_cells, 20, "with fewer a rank correlation says little")
        check_at_least("exact_facts", self.exact_facts, 2, "choose more, as fewer cannot correct averages")
        if self.least_correlation != 0:
            check_fraction("least_correlation", self.least_correlation, "choose a number from 0 up to 1")


@dataclass(frozen=True, kw_only=True)
class DrawnCells:
    """What is drawn in one fact, and with which probability."""

    cells: frozenset[CellKey]
    """Cells on which estimates are held against exact effects."""
    fact: bool
    """Whether the fact is drawn, for its cells at the subject's last token."""
    cell_chances: Mapping[tuple[str, str], float]
    """Probability of every cell of a kind and severing."""
    fact_chance: float
    """Probability of every fact."""

    def plain(self) -> dict[str, Any]:
        """The draw as JSON holds it."""
        chances = [[*group, chance] for group, chance in self.cell_chances.items()]
        return {"cells": sorted(self.cells), "fact": self.fact, "chances": [self.fact_chance, *chances]}


def draw_cells(
    cells_of: Mapping[str, Mapping[tuple[str, str], Sequence[CellKey]]], approximation: Approximation, seed: int
) -> dict[str, DrawnCells]:
    """Draw cells and facts, each with the same probability, without replacement.

    Args:
        cells_of: fact → kind and severing → the cells whose effect is not zero by construction.
        approximation: how many.
        seed: the same seed and cells give the same draw.
    """
    generator = np.random.default_rng(seed)
    facts = list(cells_of)
    count = min(approximation.exact_facts, len(facts))
    drawn_facts = {facts[i] for i in generator.choice(len(facts), count, replace=False)}
    drawn: dict[str, set[CellKey]] = {fact: set() for fact in facts}
    chances: dict[tuple[str, str], float] = {}
    for group in dict.fromkeys(group for groups in cells_of.values() for group in groups):
        pool = [(fact, cell) for fact in facts for cell in cells_of[fact].get(group, ())]
        size = min(approximation.exact_cells, len(pool))
        chances[group] = size / max(1, len(pool))
        for i in generator.choice(len(pool), size, replace=False) if size else ():
            fact, cell = pool[i]
            drawn[fact].add(cell)
    return {
        fact: DrawnCells(
            cells=frozenset(drawn[fact]),
            fact=fact in drawn_facts,
            cell_chances=chances,
            fact_chance=count / len(facts),
        )
        for fact in facts
    }
