"""Edit scores by window of layers, above the trace's contributions of the same windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mechedit.errors import InputError
from mechedit.figures.style import (
    BLUE,
    COLUMN_WIDTH,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PaperFigure,
    layer_axis,
    legend_above,
    paper_style,
    runs,
)
from mechedit.tables import where

WIDTH_COLORS = (BLUE, GREEN, INK, ORANGE)
"""Colors of the widths of windows, the widest first."""


def plot_sweep(table: pd.DataFrame, ax: Axes, validation: Mapping[str, Any] | None = None) -> Axes:
    """The score of each window at its center, with its interval; windows of one width are joined.

    Windows with filled marks are not significantly worse than the best, those with hollow marks are; the star is the
    best. Gray marks the range that the trace selects, the dashed line the unedited model.

    Args:
        table: content of sweep.parquet, in percent, with its attrs.
        ax: where to draw.
        validation: `validation` of selection.json; without it no window is marked.

    Raises:
        InputError: the table holds no scores.
    """
    score = str(table.attrs.get("score", "S"))
    rows = where(table, measure=score)
    if rows.empty:
        raise InputError(f"the sweep holds no rows of {score!r}, expected one per window: sweep again")
    validation = validation or {}
    near = {tuple(layers) for layers in validation.get("near_best", ())}
    for width, color in _colors(rows):
        of_width = where(rows, width=width)
        mean, low, high = (of_width[end].to_numpy(dtype=float) for end in ("mean", "low", "high"))
        spans, name = _spans(of_width), "single layers" if width == 1 else f"{width} layers"
        center = spans.mean(1)
        ax.plot(*_broken(center, mean), color=color, label=name, zorder=2)
        ends = np.clip([mean - low, high - mean], 0, None)
        ax.errorbar(center, mean, ends, fmt="none", ecolor=color, elinewidth=0.6, zorder=2)
        filled = [not near or tuple(range(first, last + 1)) in near for first, last in spans]
        faces = [color if fill else "white" for fill in filled]
        ax.scatter(center, mean, s=14, c=faces, edgecolors=color, linewidths=0.8, zorder=3)
    if best := validation.get("best"):
        center = (best["layers"][0] + best["layers"][-1]) / 2
        ax.scatter([center], [best["score"]], marker="*", s=60, color=ORANGE, edgecolors=INK, linewidths=0.5, zorder=4)
    before = table.attrs.get("before", {}).get(score)
    if before:
        ax.axhline(before["mean"], color=GRAY, linewidth=0.8, linestyle=(0, (3, 2)), label="unedited")
    _shade(ax, validation, "selected by the trace")
    ax.set(ylabel=f"edit score {score} (%)" if score == "S" else f"{score} (%)", ylim=(-4, 106))
    ax.set_yticks(range(0, 101, 20))
    legend_above(ax, columns=3)
    spans = _spans(rows)
    return layer_axis(ax, range(spans.min(), spans.max() + 1))


def plot_window_contribution(
    table: pd.DataFrame, evidence: Sequence[Mapping[str, Any]], ax: Axes, validation: Mapping[str, Any] | None = None
) -> Axes:
    """The trace's contributions of the same windows: each MLP's (bars), and their sum by window (lines).

    Args:
        table: content of sweep.parquet, for the windows.
        evidence: `evidence` of selection.json, in units of probability.
        ax: where to draw.
        validation: `validation` of selection.json, for the range to shade.

    Raises:
        InputError: no evidence for some layer of the windows.
    """
    contributions = {int(row["layer"]): 100 * float(row["contribution"]) for row in evidence}
    spans = _spans(table)
    if missing := set(range(spans.min(), spans.max() + 1)) - set(contributions):
        raise InputError(f"the selection has no evidence for layers {sorted(missing)}, which were swept: select again")
    _shade(ax, validation or {})
    ax.bar(list(contributions), list(contributions.values()), 0.5, color=ORANGE, linewidth=0, label="one MLP")
    for width, color in _colors(table):
        spans_of_width = np.unique(_spans(where(table, width=width)), axis=0)
        if width > 1:  # the bars show single layers
            total = [sum(contributions[layer] for layer in range(first, last + 1)) for first, last in spans_of_width]
            line = {"color": color, "marker": "o", "markersize": 2.5, "label": f"sum over {width} layers"}
            ax.plot(*_broken(spans_of_width.mean(1), np.array(total)), **line)
    ax.axhline(0, color=INK, linewidth=0.6)
    ax.set(xlabel="layer (windows: their center)", ylabel="contribution\n(% of probability)")
    legend_above(ax, columns=3)
    return layer_axis(ax, contributions)


def sweep_figure(table: pd.DataFrame, selection: Mapping[str, Any]) -> Figure:
    """Edit scores above the trace's contributions, on one axis of layers; the scores alone without a trace.

    Bars are single MLPs' contributions, and points those of windows, in the colors of the scores.

    Raises:
        InputError: as the two plots.
    """
    validation, evidence = selection.get("validation") or {}, selection.get("evidence") or ()
    with paper_style():
        figure = PaperFigure(figsize=(COLUMN_WIDTH, 3.6 if evidence else 2.1))
        if not evidence:
            plot_sweep(table, figure.subplots(), validation).set_xlabel("layer (windows: their center)")
            return figure
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        plot_sweep(table, above, validation)
        plot_window_contribution(table, evidence, below, validation)
        # The colors of the widths are those above.
        below.get_legend().remove()
    return figure


def _colors(rows: pd.DataFrame) -> list[tuple[int, str]]:
    """Widths, widest first, with their colors; single layers are gray."""
    widths = sorted({int(width) for width in rows["width"]}, reverse=True)
    wide = [width for width in widths if width > 1]
    if len(wide) <= len(WIDTH_COLORS):
        colors = dict(zip(wide, WIDTH_COLORS, strict=False))
    else:  # from dark to light, and no two alike
        colors = dict(zip(wide, map(to_hex, colormaps["viridis"](np.linspace(0, 0.9, len(wide)))), strict=True))
    return [(width, colors.get(width, GRAY)) for width in widths]


def _spans(rows: pd.DataFrame) -> Int[np.ndarray, "window 2"]:
    """First and last layer of each row's window."""
    return rows.loc[:, ["first", "last"]].to_numpy(dtype=int)


def _broken(
    center: Float[np.ndarray, " window"], values: Float[np.ndarray, " window"]
) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"]]:
    """A line that breaks where windows in between could not be edited."""
    gaps = np.flatnonzero(np.diff(center) > 1) + 1
    return np.insert(center, gaps, np.nan), np.insert(values, gaps, np.nan)


def _shade(ax: Axes, validation: Mapping[str, Any], name: str | None = None) -> None:
    """Shade the range that the trace selects."""
    for first, last in runs((validation.get("traced") or {}).get("layers", ())):
        ax.axvspan(first - 0.5, last + 0.5, color=GRAY, alpha=0.2, linewidth=0, zorder=0, label=name)
