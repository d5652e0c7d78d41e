"""Scores of many edits in rows, as a table prints them, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mechedit.errors import InputError
from mechedit.figures.scores import NOT_PERCENT, TITLES, line_styles, measured
from mechedit.figures.style import PAGE_WIDTH, paper_style
from mechedit.tables import where


def plot_score_rows(table: pd.DataFrame, ax: Axes, *, measure: str, rows: str = "method") -> Axes:
    """One measure of every edit: a row each, from the top in order of appearance, with its interval.

    Args:
        table: `rows, measure, mean, low, high`, in percent (GE, perplexity and KL in their own units).
        ax: where to draw.
        measure: which rows of the table.
        rows: column of the names.

    Raises:
        InputError: a column is missing, or no rows have that measure.
    """
    names = list(dict.fromkeys(table[rows].astype(str)))
    found = measured(table, measure, rows)
    styles = line_styles(names)
    for place, name in enumerate(names):
        own = found.loc[found[rows].astype(str) == name, ["mean", "low", "high"]].to_numpy(dtype=float)
        look = {"color": styles[name]["color"], "marker": styles[name]["marker"], "markersize": 3.4}
        for mean, low, high in own:
            bar = np.clip([[mean - low], [high - mean]], 0, None)
            ax.errorbar([mean], [place], xerr=bar, linestyle="none", elinewidth=0.9, markeredgewidth=0, **look)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#222222", alpha=0.12, linewidth=0.5)
    ax.grid(axis="y", color="#222222", alpha=0.06, linewidth=0.5)
    ax.set_axisbelow(True)
    if measure not in NOT_PERCENT:
        ax.set(xlim=(-4, 104), xticks=range(0, 101, 25))
    ax.set_xlabel("" if measure in NOT_PERCENT else "%")
    return ax


def score_rows_figure(
    table: pd.DataFrame, measures: Sequence[str] = ("S", "ES", "PS", "NS"), *, rows: str = "method"
) -> Figure:
    """A panel for each measure that the table holds, side by side, under one list of names.

    Raises:
        InputError: none of the measures is there; and as `plot_score_rows`.
    """
    found = [measure for measure in measures if len(where(table, measure=measure))]
    if not found:
        held = ", ".join(dict.fromkeys(table["measure"])) or "nothing"
        raise InputError(f"the table holds {held}, expected some of {', '.join(measures)}: score first")
    with paper_style():
        figure = Figure(figsize=(PAGE_WIDTH, 0.7 + 0.15 * len(set(table[rows]))))
        axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
        for measure, ax in zip(found, axes, strict=True):
            plot_score_rows(table, ax, measure=measure, rows=rows)
            ax.set_title(TITLES.get(measure, measure).replace(" (", "\n("))
    return figure
