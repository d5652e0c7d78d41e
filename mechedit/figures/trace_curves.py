"""Line plots with bands: AIE by layer, for some roles, severings or kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mechedit.errors import InputError, brief_list
from mechedit.figures.style import (
    INK,
    KIND_COLORS,
    PAGE_WIDTH,
    ROLE_COLORS,
    SEVER_COLORS,
    SPARE,
    STROKES,
    PaperFigure,
    Stroke,
    layer_axis,
    legend_above,
    paper_style,
    share_legend,
)
from mechedit.figures.trace_averages import aie_label, averaged, curve, kinds_in, layer_label
from mechedit.tables import where
from mechedit.trace import KIND_LABELS, ROLE_LABELS, sever_in_words

COLORS = {"role": ROLE_COLORS, "sever": SEVER_COLORS, "kind": KIND_COLORS}


def plot_lines(
    effects: pd.DataFrame,
    ax: Axes,
    *,
    kinds: Sequence[str] | None = None,
    roles: Sequence[str] | None = None,
    severings: Sequence[str] = ("nothing",),
) -> Axes:
    """ROME's line plots: AIE by layer, one line per kind, role and severing, with its bootstrap band.

    Color tells roles apart where there are several, else severings, else kinds; the stroke tells apart whatever else
    varies.

    Args:
        effects: tidy effects, or what `average_effects` made of them.
        ax: where to draw.
        kinds: kinds to draw; None means all traced.
        roles: roles to draw; None means all traced.
        severings: severings to draw.

    Raises:
        InputError: no such effects, or lines that differ in kind and role and severing all at once.
    """
    rows = averaged(effects)
    selected = {"role": roles, "sever": severings, "kind": kinds}
    for column, values in selected.items():
        rows = _rows_with(rows, column, values)
    varied = [column for column in selected if len(set(rows[column])) > 1]
    if len(varied) > 2:
        raise InputError("the lines would differ in kind, role and severing, expected two at most: choose one of one")
    colored, stroked = (*varied, "role")[0], varied[1] if len(varied) > 1 else None
    colors = _styles(rows, colored, COLORS[colored], SPARE)
    strokes = _styles(rows, stroked, {}, STROKES) if stroked else {}
    for _, of_line in rows.groupby(["role", "sever", "kind"], sort=False):
        first = of_line.iloc[0]
        name = ", ".join(_name(column, str(first[column])) for column in varied or [colored])
        stroke = strokes[str(first[stroked])] if stroked else "-"
        plot_band(ax, *curve(of_line), label=name, color=colors[str(first[colored])], stroke=stroke)
    ax.axhline(0, color=INK, linewidth=0.6, zorder=1)
    layers = "layer" if "kind" in varied else layer_label(str(rows["kind"].iloc[0]))
    ax.set(xlabel=layers, ylabel=aie_label(rows, ax))
    # Two things told apart make two short lists, instead of one long one of all their pairs.
    keys: list[tuple[str, str, Any]] = [(_name(colored, value), color, "-") for value, color in colors.items()]
    keys += [(_name(stroked, value), INK, stroke) for value, stroke in strokes.items() if stroked]
    lines = [Line2D([], [], label=name, color=color, linestyle=stroke) for name, color, stroke in keys]
    legend_above(ax, columns=2, handles=lines)
    return layer_axis(ax, sorted(set(rows["layer"])))


def plot_band(
    ax: Axes,
    layers: Float[np.ndarray, " layer"],
    ends: Float[np.ndarray, "layer 3"],
    *,
    label: str,
    color: str,
    stroke: Stroke = "-",
) -> Axes:
    """One line through the means, and the band between low and high."""
    mean, low, high = ends.T
    ax.fill_between(layers, low, high, color=color, alpha=0.2, linewidth=0)
    marker = {"marker": "o", "markersize": 1.6} if len(layers) <= 24 else {}
    ax.plot(layers, mean, color=color, linestyle=stroke, label=label, **marker)
    return ax


def lines_figure(
    effects: pd.DataFrame, *, roles: Sequence[str] | None = None, severings: Sequence[str] = ("nothing",)
) -> Figure:
    """AIE by layer and role, the kinds traced side by side on one axis, under one legend.

    Raises:
        InputError: no effects with nothing severed.
    """
    table = averaged(effects)
    kinds = kinds_in(table)
    with paper_style():
        figure, axes = panels(len(kinds))
        for kind, ax in zip(kinds, axes, strict=True):
            # A severing that was traced for one kind only is drawn there only.
            traced = [sever for sever in severings if len(where(table, kind=kind, sever=sever))]
            plot_lines(table, ax, kinds=[kind], roles=roles, severings=traced).set_title(KIND_LABELS[kind])
        share_legend(figure, axes)
    return figure


def panels(count: int, *, height: float = 2.2) -> tuple[Figure, list[Axes]]:
    """A row of panels across the page that share their vertical axis."""
    figure = PaperFigure(figsize=(PAGE_WIDTH, height))
    return figure, list(np.atleast_1d(figure.subplots(1, count, sharey=True)))


def _rows_with(rows: pd.DataFrame, column: str, values: Sequence[str] | None) -> pd.DataFrame:
    """The rows whose column holds one of the values, each of which must be there; all rows for None."""
    traced = list(dict.fromkeys(rows[column]))
    if values is None:
        return rows
    if missing := [value for value in values if value not in traced]:
        raise InputError(f"the effects hold no {column} {missing[0]!r}, expected one of {brief_list(traced)}")
    return rows.loc[rows[column].isin(list(values))]


def _styles(rows: pd.DataFrame, column: str, known: Mapping[str, Any], spare: Sequence[Any]) -> dict[str, Any]:
    """A color or stroke for each value of a column: its usual one, or the next of the spare ones."""
    unused = cycle(spare)
    return {value: known[value] if value in known else next(unused) for value in dict.fromkeys(rows[column])}


def _name(column: str, value: str) -> str:
    if column == "sever":
        return sever_in_words(value)
    return (ROLE_LABELS if column == "role" else KIND_LABELS).get(value, value)
