"""Scores of many edits, a row each: for tables of methods and their variants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mechedit.evaluation import measure_named
from mechedit.figures.method_styles import line_styles
from mechedit.figures.score_curves import measures_in, rows_of_measure
from mechedit.figures.style import INK, PAGE_WIDTH, paper_style


def plot_score_rows(table: pd.DataFrame, ax: Axes, *, measure: str, rows: str = "method") -> Axes:
    """One measure of every edit: a row each, from the top in order of appearance, with its interval.

    Args:
        table: `rows, measure, mean, low, high`, in percent (GE, perplexity and KL in their own units).
        ax: where to draw.
        measure: the measure to draw.
        rows: column of the names.

    Raises:
        InputError: a column is missing, or no rows have that measure.
    """
    names = list(dict.fromkeys(table[rows].astype(str)))
    scores = rows_of_measure(table, measure, rows)
    styles = line_styles(names)
    for position, name in enumerate(names):
        ends = scores.loc[scores[rows].astype(str) == name, ["mean", "low", "high"]].to_numpy(dtype=float)
        look = {"color": styles[name]["color"], "marker": styles[name]["marker"], "markersize": 3.4}
        for mean, low, high in ends:
            bar = np.clip([[mean - low], [high - mean]], 0, None)
            ax.errorbar([mean], [position], xerr=bar, linestyle="none", elinewidth=0.9, markeredgewidth=0, **look)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=INK, alpha=0.12, linewidth=0.5)
    ax.grid(axis="y", color=INK, alpha=0.06, linewidth=0.5)
    ax.set_axisbelow(True)
    percent = measure_named(measure).unit == "%"
    if percent:
        ax.set(xlim=(-4, 104), xticks=range(0, 101, 25))
    ax.set_xlabel("%" if percent else "")
    return ax


def score_rows_figure(
    table: pd.DataFrame, measures: Sequence[str] = ("S", "ES", "PS", "NS"), *, rows: str = "method"
) -> Figure:
    """A panel for each measure that the table holds, side by side, under one list of names.

    Raises:
        InputError: none of the measures is there; and as `plot_score_rows`.
    """
    shown = measures_in(table, measures)
    with paper_style():
        figure = Figure(figsize=(PAGE_WIDTH, 0.7 + 0.15 * len(set(table[rows]))))
        axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for measure, ax in zip(shown, axes, strict=True):
            plot_score_rows(table, ax, measure=measure, rows=rows)
            ax.set_title(measure_named(measure).heading.replace(" (", "\n("))
    return figure
