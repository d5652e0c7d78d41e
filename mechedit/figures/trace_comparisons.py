"""Several traces beside one another: other corruptions, other windows, other models, on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mechedit.errors import InputError, brief_list
from mechedit.figures.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PAGE_WIDTH,
    PURPLE,
    SKY,
    STROKES,
    VERMILION,
    PaperFigure,
    layer_axis,
    legend_above,
    paper_style,
    share_legend,
)
from mechedit.figures.trace_averages import averaged, curve, layer_label, role_grid, unit
from mechedit.figures.trace_curves import panels, plot_band
from mechedit.figures.trace_heatmaps import color_bar, plot_role_grid, roles_of, shared_norm
from mechedit.tables import where
from mechedit.trace import KIND_LABELS, ROLE_LABELS, sever_in_words

TRACE_COLORS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)


def comparison_figure(traces: Mapping[str, pd.DataFrame], *, kinds: Sequence[str] | None = None) -> Figure:
    """Role grids of several traces, a column per trace under its name and a row per kind, on one color scale.

    Args:
        traces: tidy effects, or what `average_effects` made of them, by the name to show.
        kinds: the rows; None means all that any trace holds.

    Raises:
        InputError: no traces, effects of different metrics, or a kind that no trace holds.
    """
    tables, kinds = _comparable(traces, kinds, sever="nothing")
    grids = {
        (kind, name): role_grid(table, kind)
        for kind in kinds
        for name, table in tables.items()
        if kind in set(table["kind"])
    }
    norm, roles = shared_norm(grids.values()), roles_of(grids.values())
    with paper_style():
        figure = PaperFigure(figsize=(PAGE_WIDTH, 0.5 + len(kinds) * (0.45 + 0.13 * len(roles))))
        axes = figure.subplots(len(kinds), len(tables), sharey=True, sharex="col", squeeze=False)
        for row, kind in zip(axes, kinds, strict=True):
            for ax, name in zip(row, tables, strict=True):
                if (kind, name) in grids:
                    plot_role_grid(tables[name], kind, ax, norm, roles=roles, bar=False)
                else:
                    _absent(ax)
                ax.set_title(name if kind == kinds[0] else "")
                ax.set_xlabel("")
            _name_row(row[-1], KIND_LABELS.get(kind, kind))
        for ax in axes[-1]:
            ax.set_xlabel("layer")
        drawn = [ax for ax in axes.flat if ax.images]
        color_bar(drawn, f"AIE ({unit(next(iter(tables.values()))).name})")
    return figure


def comparison_lines(
    traces: Mapping[str, pd.DataFrame],
    *,
    role: str = "subject_last",
    sever: str = "nothing",
    kinds: Sequence[str] | None = None,
) -> Figure:
    """AIE by layer at one role, a line with its band for each of several traces, a panel per kind.

    Args:
        traces: as for `comparison_figure`.
        role: role of the restored token.
        sever: the severing.
        kinds: the panels; None means all that any trace holds at that role and severing.

    Raises:
        InputError: as `comparison_figure`.
    """
    tables, kinds = _comparable(traces, kinds, role=role, sever=sever)
    with paper_style():
        figure, axes = panels(len(kinds))
        for kind, ax in zip(kinds, axes, strict=True):
            layers: set[int] = set()
            for i, (name, table) in enumerate(tables.items()):
                if len(rows := where(table, kind=kind)):
                    style = {"color": TRACE_COLORS[i % len(TRACE_COLORS)], "stroke": STROKES[i % len(STROKES)]}
                    plot_band(ax, *curve(rows), label=name, **style)
                    layers |= set(rows["layer"])
            ax.axhline(0, color=INK, linewidth=0.6, zorder=1)
            ax.set(xlabel=layer_label(kind), title=KIND_LABELS.get(kind, kind))
            legend_above(ax, columns=1)
            layer_axis(ax, sorted(layers))
        at = ROLE_LABELS.get(role, role) + ("" if sever == "nothing" else f", {sever_in_words(sever)}")
        axes[0].set_ylabel(f"AIE at the {at}\n({unit(next(iter(tables.values()))).name})")
        share_legend(figure, axes)
    return figure


def _comparable(
    traces: Mapping[str, pd.DataFrame], kinds: Sequence[str] | None, **equal: str
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Averages of each trace where the columns hold the given values, all of one metric; and the kinds to show."""
    if not traces:
        raise InputError("there are no traces to compare, expected some: pass effects by name")
    tables = {name: averaged(effects, **equal) for name, effects in traces.items()}
    metrics = {name: str(table["metric"].iloc[0]) for name, table in tables.items()}
    if len(set(metrics.values())) > 1:
        listed = brief_list(f"{name}: {metric}" for name, metric in metrics.items())
        raise InputError(f"the traces are of several metrics ({listed}), expected one: pick the same from each")
    traced = {kind for table in tables.values() for kind in table["kind"]}
    if missing := [kind for kind in kinds or () if kind not in traced]:
        raise InputError(f"no trace holds the kind {missing[0]!r}, expected one of {brief_list(sorted(traced))}")
    return tables, list(kinds or [kind for kind in KIND_LABELS if kind in traced])


def _absent(ax: Axes) -> None:
    """Mark a panel whose kind was not traced."""
    ax.text(0.5, 0.5, "not traced", transform=ax.transAxes, ha="center", va="center")
    ax.tick_params(axis="y", length=0)


def _name_row(ax: Axes, name: str) -> None:
    """Write the kind along the right of its row."""
    ax.annotate(name, (1.0, 0.5), (4, 0), "axes fraction", "offset points", rotation=-90, ha="left", va="center")
