"""Scores against a setting: number of edits, λ, layer range, steps of training; a line for each method.

In: a tidy frame with a column for the setting, one that tells lines apart, and `measure, mean, low, high` in the
papers' units. Out: the same Axes, or a Figure with a panel for each measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mechedit.errors import InputError
from mechedit.figures.style import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PAGE_WIDTH,
    PURPLE,
    SKY,
    SPARE,
    VERMILION,
    PaperFigure,
    legend_above,
    paper_style,
)
from mechedit.figures.trace_curves import STROKES, Stroke, share_legend
from mechedit.tables import where

METHOD_COLORS = {
    "memit": BLUE,
    "rome": VERMILION,
    "alphaedit": GREEN,
    "pmet": PURPLE,
    "emmet": SKY,
    "ft": ORANGE,
    "ft_l": ORANGE,
    "ft_w": INK,
    "unedited": GRAY,
}
"""The same in all figures; variants of a method share its color and differ by their stroke."""
MARKERS = {"memit": "o", "rome": "s", "alphaedit": "^", "pmet": "D", "emmet": "v", "ft": "P", "ft_l": "X", "ft_w": "*"}
STROKE_OF = {"ft_l": STROKES[1], "ft_w": STROKES[2], "unedited": STROKES[1]}
TITLES = {
    "S": "Score (S)",
    "ES": "Efficacy (ES)",
    "PS": "Paraphrases (PS)",
    "NS": "Neighbors (NS)",
    "GE": "Fluency (GE, bits × 100)",
    "RS": "Consistency (RS)",
}
NOT_PERCENT = frozenset({"GE", "perplexity", "KL"})
LEAST_MARKERS = 24
"""From so many points on, a line is drawn without markers."""


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

    A setting that is not a number is an axis of places in order of appearance, with bars for the intervals. Rows
    without the setting (NaN) hold whatever it is, such as the unedited model: a dashed level line.

    Args:
        table: `x, hue, measure, mean, low, high`, in percent (GE, perplexity and KL in their own units).
        ax: where to draw.
        x: column of the setting.
        measure: which rows.
        hue: column that tells lines apart, in order of appearance.
        log: whether the axis of a numeric setting is logarithmic.
        label: of the horizontal axis; by default the column's name.
        colors: of lines that are no known methods, in order.

    Raises:
        InputError: a column is missing, no rows have that measure, or a setting of 0 or below on a logarithmic axis.
    """
    rows = measured(table, measure, x, hue)
    styles = line_styles(list(dict.fromkeys(table[hue].astype(str))), colors)
    numeric = pd.api.types.is_numeric_dtype(rows[x])
    settings = rows.loc[rows[x].notna(), :]
    if log and numeric and len(settings) and settings[x].min() <= 0:
        raise InputError(f"{x} is {settings[x].min()}, expected more than 0 on a logarithmic axis; pass log=False")
    places = {value: place for place, value in enumerate(dict.fromkeys(settings[x]))}
    names = [name for name in styles if name in set(rows[hue].astype(str))]
    apart = min(0.09, 0.6 / len(names)) if settings[x].duplicated().any() else 0.0
    for order, name in enumerate(names):
        own = rows.loc[rows[hue].astype(str) == name, :]
        _level(ax, own.loc[own[x].isna(), :], name, styles[name])
        own = own.loc[own[x].notna(), :]
        if own.empty:
            continue
        if numeric:
            own = own.sort_values(x)
            faint = 0.2 if len(names) <= 3 else 0.1
            _line(ax, own[x].to_numpy(dtype=float), _ends(own), name, styles[name], faint)
        else:  # those at one place stand beside one another, so that bars of equal heights are all seen
            aside = apart * (order - (len(names) - 1) / 2)
            _bars(ax, np.array([places[value] for value in own[x]]) + aside, _ends(own), name, styles[name])
    _setting_axis(ax, settings[x], numeric=numeric, log=log)
    ax.set(xlabel=x if label is None else label, ylabel=unit_of(measure))
    _score_axis(ax, measure)
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
        measures: the panels wanted; those without data are left out.
        x: column of the setting.
        hue: column that tells lines apart.
        log: whether the axis is logarithmic.
        label: of the horizontal axis.
        columns: panels in a row; by default up to four in one, else three.

    Raises:
        InputError: none of the measures is there; and as `plot_scores_against`.
    """
    found = [measure for measure in measures if len(where(table, measure=measure))]
    if not found:
        held = ", ".join(dict.fromkeys(table["measure"])) or "nothing"
        raise InputError(f"the table holds {held}, expected some of {', '.join(measures)}: score first")
    columns = min(len(found), columns or (4 if len(found) <= 4 else 3))
    rows = -(-len(found) // columns)
    legend = 0.15 * -(-len(set(table[hue])) // 4)
    with paper_style():
        figure = PaperFigure(figsize=(PAGE_WIDTH, 0.2 + legend + 1.65 * rows))
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for place, (measure, ax) in enumerate(zip(found, grid, strict=False)):
            plot_scores_against(table, ax, x=x, measure=measure, hue=hue, log=log, label=label)
            ax.set_title(TITLES.get(measure, measure))
            if place + columns < len(found):  # a panel follows below
                ax.set_xlabel("")
        axes, unused = grid[: len(found)], grid[len(found) :]
        for ax in unused:
            ax.remove()
        share_legend(figure, axes)
        for first in axes[::columns]:
            first.set_ylabel("%")
    return figure


def line_styles(names: Sequence[str], colors: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Color, stroke and marker of each line.

    A known method has its own everywhere, a variant of it (`memit, strategy sqrt`) the next stroke; other names take
    the next color.
    """
    methods = [name.partition(",")[0].partition("@")[0].strip() for name in names]
    used = {METHOD_COLORS[method] for method in methods if method in METHOD_COLORS}
    free = colors or [color for color in (BLUE, ORANGE, GREEN, *SPARE) if color not in used] or [INK]
    taken: dict[str, int] = {}
    styles: dict[str, dict[str, Any]] = {}
    for name, method in zip(names, methods, strict=True):
        known = method in METHOD_COLORS
        key = method if known else ""
        times = taken[key] = taken.get(key, -1) + 1
        color = METHOD_COLORS[method] if known else free[times % len(free)]
        again = times if known else times // len(free)
        stroke: Stroke = STROKES[again % len(STROKES)] if again else STROKE_OF.get(method, "-")
        styles[name] = {"color": color, "linestyle": stroke, "marker": MARKERS.get(method, "o")}
    return styles


def unit_of(measure: str) -> str:
    """What a measure's axis is called."""
    return measure if measure in NOT_PERCENT else f"{measure} (%)"


def measured(table: pd.DataFrame, measure: str, *columns: str) -> pd.DataFrame:
    """The rows of one measure, with its mean and interval and these columns.

    Raises:
        InputError: a column is missing, or no rows have that measure.
    """
    if missing := [column for column in (*columns, "measure", "mean", "low", "high") if column not in table]:
        raise InputError(
            f"the table of scores lacks {', '.join(missing)}, it has {', '.join(map(str, table))}; name a column it has"
        )
    rows = where(table, measure=measure)
    if rows.empty:
        held = ", ".join(dict.fromkeys(table["measure"])) or "nothing"
        raise InputError(f"the table holds no rows of {measure!r}, expected one of {held}: score first")
    return rows


def _ends(rows: pd.DataFrame) -> Float[np.ndarray, "setting 3"]:
    return rows.loc[:, ["mean", "low", "high"]].to_numpy(dtype=float)


def _line(
    ax: Axes,
    at: Float[np.ndarray, " setting"],
    ends: Float[np.ndarray, "setting 3"],
    name: str,
    style: dict[str, Any],
    faint: float,
) -> None:
    """Means joined, in a band from low to high."""
    mean, low, high = ends.T
    ax.fill_between(at, low, high, color=style["color"], alpha=faint, linewidth=0)
    marker = {"marker": style["marker"] if len(at) < LEAST_MARKERS else "", "markersize": 2.4, "markeredgewidth": 0}
    ax.plot(at, mean, color=style["color"], linestyle=style["linestyle"], label=name, **marker)


def _bars(
    ax: Axes, at: Float[np.ndarray, " setting"], ends: Float[np.ndarray, "setting 3"], name: str, style: dict[str, Any]
) -> None:
    """Means joined by a thin line, each with a bar from low to high."""
    mean, low, high = ends.T
    bars = np.clip([mean - low, high - mean], 0, None)
    ax.errorbar(at, mean, bars, label=name, linewidth=0.7, elinewidth=0.8, markersize=3, markeredgewidth=0, **style)


def _level(ax: Axes, rows: pd.DataFrame, name: str, style: dict[str, Any]) -> None:
    """What does not depend on the setting."""
    for height in rows["mean"]:
        ax.axhline(height, color=style["color"], linestyle=STROKES[1], linewidth=0.8, zorder=1, label=name)


def _setting_axis(ax: Axes, settings: pd.Series, *, numeric: bool, log: bool) -> None:
    """Plain numbers on a logarithmic axis, names on one of places."""
    if not numeric:
        names = [str(name) for name in dict.fromkeys(settings)]
        ax.set_xticks(range(len(names)), names)
        ax.set_xlim(-0.5, len(names) - 0.5)
    elif log:
        number_axis(ax, settings)


def number_axis(ax: Axes, settings: pd.Series) -> Axes:
    """A logarithmic horizontal axis with plain numbers, enough of them also for less than two decades."""
    ax.set_xscale("log")
    decades = np.ptp(np.log10(settings.to_numpy(dtype=float))) if len(settings) else 0
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 1.5 else (1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(FuncFormatter(_power))
    ax.xaxis.set_minor_formatter(NullFormatter())
    return ax


def _score_axis(ax: Axes, measure: str) -> None:
    if measure not in NOT_PERCENT:
        ax.set(ylim=(-3, 103), yticks=range(0, 101, 20))
    ax.grid(axis="y", color=INK, alpha=0.12, linewidth=0.5)
    ax.set_axisbelow(True)


def _power(value: float, _: int) -> str:
    """A tick of a logarithmic axis; large powers of ten in the space that a small one takes."""
    exponent = np.log10(value)
    if value < 1e5 or not np.isclose(exponent, round(exponent)):
        return f"{value:,g}" if value < 1 else f"{value:,.0f}"
    return f"$10^{{{round(exponent)}}}$"


SCORES = {"ES": "ES", "PS": "PS", "NS": "NS", "efficacy": "efficacy", "paraphrase": "para-\nphrase"}

Summary = Mapping[str, Mapping[str, float | int]]


def plot_scores(before: Summary, after: Summary, ax: Axes, *, names: Mapping[str, str] = SCORES) -> Axes:
    """Measures before and after an edit, in percent, with their intervals; by default ES, PS, NS, S and exact match.

    Args:
        before: `Scores.summary` of the unedited model; may be empty.
        after: of the edited model; may be empty.
        ax: where to draw.
        names: the measures, and what to call them.

    Raises:
        InputError: neither summary holds any of these measures.
    """
    shown = [name for name in names if name in before or name in after]
    if not shown:
        found = ", ".join({**before, **after}) or "nothing"
        raise InputError(f"the summaries hold {found}, expected some of {', '.join(names)}: evaluate first")
    states = [(n, s, c) for n, s, c in (("before", before, GRAY), ("after", after, BLUE)) if s]
    for i, (state, summary, color) in enumerate(states):
        found = {place: summary[name] for place, name in enumerate(shown) if name in summary}
        place = np.array(list(found)) + (i - (len(states) - 1) / 2) * 0.4
        mean, low, high = (np.array([float(e[end]) for e in found.values()]) for end in ("mean", "low", "high"))
        ax.bar(place, mean, 0.38, color=color, label=state, linewidth=0)
        ax.errorbar(place, mean, [mean - low, high - mean], fmt="none", ecolor=INK, elinewidth=0.7)
        for x, y, top in zip(place, mean, high, strict=True):
            ax.annotate(f"{y:.0f}", (x, top), (0, 1.5), textcoords="offset points", ha="center", fontsize=6)
    ax.set_xticks(range(len(shown)), [names[name] for name in shown])
    ax.tick_params(axis="x", length=0)
    ax.set(ylim=(0, 106), yticks=range(0, 101, 20), ylabel="score (%)")
    legend_above(ax, columns=2)
    return ax


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
