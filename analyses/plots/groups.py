"""Scores of groups of facts, such as relations: side by side, and one measure against another (MEMIT Fig. 6).

In: a tidy frame with a column that names the group, and `method, measure, mean, low, high` in percent. Out: the same
Axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox, BboxBase

from mechedit.errors import InputError
from mechedit.evaluation import measure_named
from mechedit.figures import GRAY, INK, legend_above, line_styles
from mechedit.tables import where

ENDS = ["mean", "low", "high"]
NEAR = 4.5
"""Points between a mark and its name."""


def plot_groups(table: pd.DataFrame, ax: Axes, *, by: str, measure: str = "S", reference: str | None = None) -> Axes:
    """One row per group with a mark and its interval per method; the best of the first method is on top.

    Args:
        table: `by, method, measure, mean, low, high`.
        ax: where to draw.
        by: column that names the groups.
        measure: which rows.
        reference: a group to set apart: at the foot, under a line.

    Raises:
        InputError: no rows of that measure.
    """
    rows = _rows(table, measure)
    methods = list(dict.fromkeys(rows["method"]))
    first = where(rows, method=methods[0]).sort_values("mean", kind="stable")
    names = [name for name in dict.fromkeys([*first[by], *rows[by]]) if name != reference]
    names = [reference, *names] if reference in set(rows[by]) else names
    styles = line_styles(methods)
    for order, method in enumerate(methods):
        scores = where(rows, method=method).set_index(by)[ENDS].reindex(names)
        height = np.arange(len(names)) + 0.18 * ((len(methods) - 1) / 2 - order)
        mean, low, high = scores.to_numpy(dtype=float).T
        style = {"color": styles[method]["color"], "marker": styles[method]["marker"]}
        ax.errorbar(mean, height, xerr=[mean - low, high - mean], **_MARK, **style, label=method)
    if names[0] == reference:
        ax.axhline(0.5, color=GRAY, linewidth=0.6)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.set(xlabel=measure_named(measure).axis_label, ylim=(-0.6, len(names) - 0.4), xlim=_limits(rows))
    legend_above(ax, columns=3)
    return ax


def plot_tradeoff(
    table: pd.DataFrame, ax: Axes, *, by: str, x: str = "PS", y: str = "NS", reference: str | None = None
) -> Axes:
    """One measure against another: one mark per group and method with its two intervals, the groups named.

    The reference is a larger, hollow mark. Names stand where they hide neither a mark nor one another; those that
    found no place near their mark have a thin line to it. Draw this last: the size of the axes must be final.

    Args:
        table: `by, method, measure, mean, low, high`.
        ax: where to draw.
        by: column that names the groups.
        x: measure of the horizontal axis.
        y: of the vertical one.
        reference: the group to set apart.

    Raises:
        InputError: no rows of either measure.
    """
    across, up = (_rows(table, measure).set_index(["method", by]).loc[:, ENDS] for measure in (x, y))
    shared_index = across.index.intersection(up.index, sort=False)
    across, up = across.loc[shared_index, :], up.loc[shared_index, :]
    methods = list(dict.fromkeys(across.index.get_level_values(0)))
    styles, points, crosses = line_styles(methods), [], []
    for method in methods:
        style = styles[method]
        for group in across.loc[method].index:
            (mean, low, high), (level, bottom, top) = across.loc[(method, group)], up.loc[(method, group)]
            ends = {"xerr": [[mean - low], [high - mean]], "yerr": [[level - bottom], [top - level]]}
            apart = {"markersize": 7, "markerfacecolor": "none", "zorder": 4} if group == reference else {}
            label = method if group == across.loc[method].index[0] else None
            ax.errorbar(
                mean, level, **ends, color=style["color"], marker=style["marker"], label=label, **{**_MARK, **apart}
            )
            points.append((float(mean), float(level), str(group), style["color"]))
            crosses += [((low, level), (high, level)), ((mean, bottom), (mean, top))]
    ax.set(xlim=_limits(across), ylim=_limits(up))
    ax.set_xticks(_ticks(ax.get_xticks(), ax.get_xlim()))
    ax.set_yticks(_ticks(ax.get_yticks(), ax.get_ylim()))
    ax.set(xlabel=f"{measure_named(x).heading}, %", ylabel=f"{measure_named(y).heading}, %")
    if len(methods) > 1:
        legend_above(ax, columns=3)
    name_points(ax, points, crosses)
    return ax


_MARK: dict[str, Any] = {"fmt": "", "linestyle": "none", "markersize": 3.5, "elinewidth": 0.6, "markeredgewidth": 0.8}


Point = tuple[float, float, str, str]
Line = tuple[tuple[float, float], tuple[float, float]]


def name_points(ax: Axes, points: Sequence[Point], lines: Sequence[Line] = ()) -> None:
    """Write names beside points, so that no two overlap and none hides a point or, if there is room, lies on a line.

    Args:
        ax: where the points are drawn, with its final size and limits.
        points: `(x, y, name, color)`.
        lines: level and upright lines from one point to another.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # only now the axes have their place
    unit = figure.dpi / 72
    anchors = ax.transData.transform([point[:2] for point in points])
    taken = [Bbox.from_bounds(x - 2 * unit, y - 2 * unit, 4 * unit, 4 * unit) for x, y in anchors]
    crossed = [Bbox(ax.transData.transform(line)).padded(0.5 * unit) for line in lines]
    inside = ax.get_window_extent()
    for (x, y, name, color), anchor in zip(points, anchors, strict=True):
        text = ax.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=5.5, color=color, va="center")
        text.set_path_effects([withStroke(linewidth=1.5, foreground="white")])
        size = np.array(text.get_window_extent().size) / unit
        offset = _offset(anchor, size, unit, [[*taken, *crossed], taken], inside)
        taken.append(_box(anchor, offset, size, unit))
        _move(text, offset, line=bool(np.hypot(*offset) > 2 * NEAR))


def _offset(anchor: Any, size: Any, unit: float, avoided: Sequence[Sequence[BboxBase]], inside: BboxBase) -> Any:
    """The nearest offset, in points, where a name hides nothing of the first list that leaves room for it."""
    for boxes, far in zip(avoided, (25.0, 90.0), strict=True):
        for offset in _around(NEAR, far):
            if _free(_box(anchor, offset, size, unit), boxes, inside):
                return offset
    return np.zeros(2)  # no room at all: on the mark, rather than not at all


def _around(near: float, far: float) -> list[Float[np.ndarray, 2]]:
    """Offsets in points, the nearest first, sideways before up and down."""
    turns = np.radians([0, 180, 30, 150, 330, 210, 60, 120, 300, 240, 90, 270])
    distances = np.arange(near, far, 3.0)
    return [distance * np.array([np.cos(turn), np.sin(turn)]) for distance in distances for turn in turns]


def _box(anchor: Any, offset: Any, size: Any, unit: float) -> Bbox:
    """Pixels that a name takes; it starts at the offset when that lies to the right, else it ends there."""
    start, bottom = anchor + unit * offset - [_left_part(offset) * size[0] * unit, size[1] * unit / 2]
    return Bbox.from_bounds(start, bottom, size[0] * unit, size[1] * unit)


def _left_part(offset: Any) -> float:
    """The part of a name's width that lies left of its anchor."""
    return 0.5 if abs(offset[0]) < 1e-6 else float(offset[0] < 0)


def _free(box: Bbox, taken: Sequence[BboxBase], inside: BboxBase) -> bool:
    within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
    return bool(within) and not any(box.overlaps(obstacle) for obstacle in taken)


def _move(text: Annotation, offset: Any, *, line: bool) -> None:
    text.set_position(tuple(offset))
    left_part = _left_part(offset)
    text.set_horizontalalignment("left" if left_part == 0 else "right" if left_part == 1 else "center")
    if line:
        ends = {"arrowstyle": "-", "linewidth": 0.3, "color": INK, "shrinkA": 0, "shrinkB": 2}
        text.axes.annotate("", text.xy, offset, textcoords="offset points", arrowprops=ends)  # type: ignore[union-attr]


def _ticks(ticks: Any, limits: tuple[float, float]) -> list[float]:
    """The ticks within the limits that are possible percentages."""
    return [float(tick) for tick in ticks if max(limits[0], 0) <= tick <= min(limits[1], 100)]


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Limits of a percent axis: the span of the intervals and some room."""
    values = rows.loc[:, ENDS].to_numpy(dtype=float)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    room = max(2.0, 0.08 * (high - low))
    return low - room, high + room


def _rows(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    rows = where(table, measure=measure)
    if rows.empty:
        measures = ", ".join(dict.fromkeys(table["measure"])) or "nothing"
        raise InputError(f"the table holds no rows of {measure!r}, expected one of {measures}: score first")
    return rows
