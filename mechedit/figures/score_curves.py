"""Scores against a setting: number of edits, λ, layer range, steps of training; a line for each method.

In: a tidy frame with a column for the setting, one that tells lines apart, and `measure, mean, low, high` in the
papers' units. Out: the same Axes, or a Figure with a panel for each measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mechedit.errors import InputError, brief_list
from mechedit.evaluation import Measure, measure_named
from mechedit.figures.method_styles import line_styles
from mechedit.figures.style import (
    INK,
    PAGE_WIDTH,
    STROKES,
    PaperFigure,
    legend_above,
    paper_style,
    share_legend,
)
from mechedit.tables import where

LEAST_MARKERS = 24
"""A line of at least this many points is drawn without markers."""


def plot_scores_against(
    table: pd.DataFrame,
    ax: Axes,
    *,
    x: str,
    measure: str,
    hue: str = "method",
    log: bool = False,
    label: str | None = None,
    colors: Sequence[str] = (),
) -> Axes:
    """One measure against a setting, a line with its interval for each method.

    Settings that are not numbers stand side by side in order of appearance, with bars for the intervals. Rows without
    a setting (NaN) do not depend on it, such as those of the unedited model: they give a dashed level line.

    Args:
        table: `x, hue, measure, mean, low, high`, in percent (GE, perplexity and KL in their own units).
        ax: where to draw.
        x: column of the setting.
        measure: the measure to draw.
        hue: column that tells lines apart, in order of appearance.
        log: whether the axis of a numeric setting is logarithmic.
        label: label of the horizontal axis; by default the column's name.
        colors: colors of lines that are no known methods, in order.

    Raises:
        InputError: a column is missing, no rows have that measure, or a setting of 0 or below on a logarithmic axis.
    """
    rows = rows_of_measure(table, measure, x, hue)
    styles = line_styles(list(dict.fromkeys(table[hue].astype(str))), colors)
    numeric = pd.api.types.is_numeric_dtype(rows[x])
    settings = rows.loc[rows[x].notna(), :]
    if log and numeric and len(settings) and settings[x].min() <= 0:
        raise InputError(f"{x} is {settings[x].min()}, expected more than 0 on a logarithmic axis; pass log=False")
    positions = {value: position for position, value in enumerate(dict.fromkeys(settings[x]))}
    names = [name for name in styles if name in set(rows[hue].astype(str))]
    spacing = min(0.09, 0.6 / len(names)) if settings[x].duplicated().any() else 0.0
    for order, name in enumerate(names):
        line = rows.loc[rows[hue].astype(str) == name, :]
        _level_line(ax, line.loc[line[x].isna(), :], name, styles[name])
        line = line.loc[line[x].notna(), :]
        if line.empty:
            continue
        if numeric:
            line = line.sort_values(x)
            alpha = 0.2 if len(names) <= 3 else 0.1
            _line(ax, line[x].to_numpy(dtype=float), _ends(line), name, styles[name], alpha)
        else:  # points of one setting stand beside one another, so that bars of equal heights are all seen
            offset = spacing * (order - (len(names) - 1) / 2)
            _bars(ax, np.array([positions[value] for value in line[x]]) + offset, _ends(line), name, styles[name])
    _setting_axis(ax, settings[x], numeric=numeric, log=log)
    ax.set(xlabel=x if label is None else label, ylabel=measure_named(measure).axis_label)
    _score_axis(ax, measure_named(measure), rows["mean"].to_numpy(dtype=float).min())
    legend_above(ax, columns=3)
    return ax


def scores_figure(
    table: pd.DataFrame,
    measures: Sequence[str] = ("ES", "PS", "NS", "S"),
    *,
    x: str,
    hue: str = "method",
    log: bool = False,
    label: str | None = None,
    columns: int | None = None,
) -> Figure:
    """A panel for each measure that the table holds, side by side under one legend.

    Args:
        table: as for `plot_scores_against`, and so are the other arguments.
        measures: the panels; measures without data are left out.
        x: column of the setting.
        hue: column that tells lines apart.
        log: whether the axis is logarithmic.
        label: label of the horizontal axis.
        columns: panels in a row; by default up to four in one, else three.

    Raises:
        InputError: none of the measures is there; and as `plot_scores_against`.
    """
    shown = measures_in(table, measures)
    columns = min(len(shown), columns or (4 if len(shown) <= 4 else 3))
    rows = -(-len(shown) // columns)
    legend = 0.15 * -(-len(set(table[hue])) // 4)
    with paper_style():
        figure = PaperFigure(figsize=(PAGE_WIDTH, 0.2 + legend + 1.65 * rows))
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, (measure, ax) in enumerate(zip(shown, grid, strict=False)):
            plot_scores_against(table, ax, x=x, measure=measure, hue=hue, log=log, label=label)
            ax.set_title(measure_named(measure).heading)
            if panel + columns < len(shown):  # a panel follows below
                ax.set_xlabel("")
        axes, unused = grid[: len(shown)], grid[len(shown) :]
        for ax in unused:
            ax.remove()
        share_legend(figure, axes)
        for first in axes[::columns]:
            first.set_ylabel("%")
    return figure


def measures_in(table: pd.DataFrame, measures: Sequence[str]) -> list[str]:
    """Those of the measures that a table of scores holds.

    Raises:
        InputError: it holds none of them.
    """
    if shown := [measure for measure in measures if len(where(table, measure=measure))]:
        return shown
    present = brief_list(dict.fromkeys(table["measure"]))
    raise InputError(f"the table holds {present}, expected some of {', '.join(measures)}: score first")


def rows_of_measure(table: pd.DataFrame, measure: str, *columns: str) -> pd.DataFrame:
    """The rows of one measure in a table of scores that has these columns besides `measure, mean, low, high`.

    Raises:
        InputError: a column is missing, or no rows have that measure.
    """
    if missing := [column for column in (*columns, "measure", "mean", "low", "high") if column not in table]:
        raise InputError(
            f"the table of scores lacks {', '.join(missing)}, it has {brief_list(table)}; name a column it has"
        )
    rows = where(table, measure=measure)
    if rows.empty:
        present = brief_list(dict.fromkeys(table["measure"]))
        raise InputError(f"the table holds no rows of {measure!r}, expected one of {present}: score first")
    return rows


def number_axis(ax: Axes, settings: pd.Series) -> Axes:
    """Make the horizontal axis logarithmic with plain numbers, enough of them also for less than two decades."""
    ax.set_xscale("log")
    decades = np.ptp(np.log10(settings.to_numpy(dtype=float))) if len(settings) else 0
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 1.5 else (1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(_power))
    ax.xaxis.set_minor_formatter(NullFormatter())
    return ax


def _ends(rows: pd.DataFrame) -> Float[np.ndarray, "setting 3"]:
    return rows.loc[:, ["mean", "low", "high"]].to_numpy(dtype=float)


def _line(
    ax: Axes,
    positions: Float[np.ndarray, " setting"],
    ends: Float[np.ndarray, "setting 3"],
    name: str,
    style: dict[str, Any],
    alpha: float,
) -> None:
    """Means joined, in a band from low to high."""
    mean, low, high = ends.T
    ax.fill_between(positions, low, high, color=style["color"], alpha=alpha, linewidth=0)
    symbol = style["marker"] if len(positions) < LEAST_MARKERS else ""
    marker = {"marker": symbol, "markersize": 2.4, "markeredgewidth": 0}
    ax.plot(positions, mean, color=style["color"], linestyle=style["linestyle"], label=name, **marker)


def _bars(
    ax: Axes,
    positions: Float[np.ndarray, " setting"],
    ends: Float[np.ndarray, "setting 3"],
    name: str,
    style: dict[str, Any],
) -> None:
    """Means joined by a thin line, each with a bar from low to high."""
    mean, low, high = ends.T
    bars = np.clip([mean - low, high - mean], 0, None)
    ax.errorbar(
        positions, mean, bars, label=name, linewidth=0.7, elinewidth=0.8, markersize=3, markeredgewidth=0, **style
    )


def _level_line(ax: Axes, rows: pd.DataFrame, name: str, style: dict[str, Any]) -> None:
    """Scores that do not depend on the setting."""
    for height in rows["mean"]:
        ax.axhline(height, color=style["color"], linestyle=STROKES[1], linewidth=0.8, zorder=1, label=name)


def _setting_axis(ax: Axes, settings: pd.Series, *, numeric: bool, log: bool) -> None:
    """Plain numbers on a logarithmic axis, whole ones where settings are; a tick per name where they are no numbers."""
    if not numeric:
        names = [str(name) for name in dict.fromkeys(settings)]
        ax.set_xticks(range(len(names)), names)
        ax.set_xlim(-0.5, len(names) - 0.5)
    elif log:
        number_axis(ax, settings)
    elif len(settings) and (settings % 1 == 0).all():  # no tick between two layers
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))


def _score_axis(ax: Axes, measure: Measure, least: float) -> None:
    """From 0 to 100 %, or from -100 % where a difference of probabilities is below 0."""
    if measure.unit == "%":
        ax.set(
            ylim=(-106, 106) if least < 0 else (-3, 103),
            yticks=range(*((-100, 101, 50) if least < 0 else (0, 101, 20))),
        )
    ax.grid(axis="y", color=INK, alpha=0.12, linewidth=0.5)
    ax.set_axisbelow(True)


def _power(value: float, _: int) -> str:
    """A tick of a logarithmic axis; large powers of ten in the space that a small one takes."""
    exponent = np.log10(value)
    if value < 1e5 or not np.isclose(exponent, round(exponent)):
        return f"{value:,g}" if value < 1 else f"{value:,.0f}"
    return f"$10^{{{round(exponent)}}}$"
