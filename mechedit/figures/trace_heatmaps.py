"""Heatmaps: AIE by token role and layer, and the effects of one fact by token and layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from mechedit.errors import InputError
from mechedit.figures.style import PAGE_WIDTH, PaperFigure, heat_colors, layer_axis, paper_style, wrapped
from mechedit.figures.trace_averages import averaged, kinds_in, layer_label, role_grid, select_effects, unit
from mechedit.tables import where
from mechedit.trace import KIND_LABELS, ROLE_LABELS, clearest_fact, token_label


def plot_role_grid(
    effects: pd.DataFrame,
    kind: str,
    ax: Axes,
    norm: Normalize | None = None,
    *,
    roles: Sequence[str] | None = None,
    bar: bool = True,
) -> Axes:
    """MEMIT Fig. 8, ROME Fig. 2: AIE by token role, in reading order, and layer.

    Args:
        effects: tidy effects, or their averages by `average_effects`; those of `kind` with nothing severed are drawn.
        kind: state, mlp or attn.
        ax: where to draw.
        norm: a color scale shared with other panels (`shared_norm`); None makes one.
        roles: roles of the rows, gray where nothing was traced; None means those traced.
        bar: whether to draw the color bar.

    Raises:
        InputError: there are no such effects.
    """
    rows = averaged(effects, kind=kind, sever="nothing")
    grid = role_grid(rows, kind).reindex(roles)
    _heat(ax, grid, [ROLE_LABELS[role] for role in grid.index], norm, unit(rows).helps)
    if bar:
        color_bar(ax, f"AIE ({unit(rows).name})")
    return _name_panel(ax, kind)


def plot_fact(effects: pd.DataFrame, ax: Axes, norm: Normalize | None = None, *, bar: bool = True) -> Axes:
    """ROME Fig. 1e: indirect effect of each token (subject tokens starred) and layer, of one fact and kind.

    Args:
        effects: tidy effects of one fact and one kind; those with nothing severed are drawn.
        ax: where to draw.
        norm: a color scale shared with other panels (`shared_norm`); None makes one.
        bar: whether to draw the color bar.

    Raises:
        InputError: the effects are of several facts or kinds, or there are none.
    """
    rows = select_effects(effects, sever="nothing")
    for column in ("fact", "kind"):
        if len(values := sorted(set(rows[column]))) > 1:
            raise InputError(f"the effects are of {len(values)} {column}s, expected one: pick one of {values[:5]}")
    grid = fact_grid(rows)
    tokens = rows.drop_duplicates("position").set_index("position").loc[grid.index]
    labels = [token_label(text, role) for text, role in zip(tokens["token"], tokens["role"], strict=True)]
    _heat(ax, grid, labels, norm, unit(rows).helps)
    if bar:
        color_bar(ax, f"indirect effect ({unit(rows).name})")
    return _name_panel(ax, str(rows["kind"].iloc[0]))


def roles_figure(effects: pd.DataFrame) -> Figure:
    """Role grids of all kinds traced, side by side, on one color scale.

    Raises:
        InputError: no effects with nothing severed.
    """
    return _side_by_side(*role_panels(effects), f"AIE ({unit(effects).name})")


def fact_figure(effects: pd.DataFrame, fact: str | None = None) -> Figure:
    """One fact's heatmaps of all kinds, side by side, on one color scale; by default of `clearest_fact`.

    Raises:
        InputError: no effects of that fact with nothing severed.
    """
    return _side_by_side(*fact_panels(effects, fact), f"indirect effect ({unit(effects).name})")


def fact_grid(rows: pd.DataFrame) -> pd.DataFrame:
    """Indirect effects of one fact and kind, in plotted units: token positions down, layers across.

    Raises:
        InputError: a token was measured twice.
    """
    if len(set(zip(rows["position"], rows["layer"], strict=True))) < len(rows):
        raise InputError(
            "the effects hold a token twice, expected once: they are of several traces, draw one by itself"
        )
    return rows.pivot(values="effect", index="position", columns="layer") * unit(rows).factor


def shared_norm(grids: Iterable[pd.DataFrame]) -> Normalize:
    """One color scale for several grids, from 0 or the least value to 0 or the largest."""
    values = np.concatenate([grid.to_numpy(dtype=float).ravel() for grid in grids])
    values = values[np.isfinite(values)]
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    return Normalize(low, high if high > low else low + 1e-9)


def row_height(rows: int) -> float:
    """Height in inches of a heatmap with this many rows."""
    return 0.75 + 0.15 * rows


def color_bar(axes: Any, label: str) -> None:
    """One color bar for axes that share a scale."""
    ax = np.ravel(axes)[0]
    label = wrapped(label, ax.figure.get_figheight())
    bar = ax.figure.colorbar(ax.images[0], ax=axes, label=label, fraction=0.05, pad=0.02, aspect=18)
    bar.outline.set_linewidth(0.4)


Panel = Callable[..., Axes]
"""Draws one panel: (ax, bar=…) → ax."""


def role_panels(effects: pd.DataFrame) -> tuple[dict[str, Panel], int]:
    """A panel per kind that draws its role grid, all on one scale and with the same rows; and the number of rows."""
    table = averaged(effects, sever="nothing")
    grids = {kind: role_grid(table, kind) for kind in kinds_in(table)}
    roles = roles_of(grids.values())
    panel = partial(_on_axes, plot_role_grid, norm=shared_norm(grids.values()), roles=roles)
    return {kind: partial(panel, (table, kind)) for kind in grids}, len(roles)


def roles_of(grids: Iterable[pd.DataFrame]) -> list[str]:
    """All roles of several role grids, in reading order."""
    present = {role for grid in grids for role in grid.index}
    return [role for role in ROLE_LABELS if role in present]


def fact_panels(effects: pd.DataFrame, fact: str | None = None) -> tuple[dict[str, Panel], int]:
    """A panel per kind that draws one fact's heatmap, all on one scale; and the number of its tokens."""
    rows = select_effects(effects, fact=fact or clearest_fact(effects), sever="nothing")
    of_kind = {kind: where(rows, kind=kind) for kind in kinds_in(rows)}
    panel = partial(_on_axes, plot_fact, norm=shared_norm(map(fact_grid, of_kind.values())))
    return {kind: partial(panel, (effects_of_kind,)) for kind, effects_of_kind in of_kind.items()}, len(
        set(rows["position"])
    )


def _on_axes(plot: Callable[..., Axes], values: tuple[Any, ...], ax: Axes, **options: Any) -> Axes:
    """Call `plot` with these values, axes and options: a panel is this with all but the axes bound."""
    return plot(*values, ax, **options)


def _side_by_side(panels: Mapping[str, Panel], rows: int, label: str) -> Figure:
    """Panels in one row that share their row labels and one color bar."""
    with paper_style():
        figure = PaperFigure(figsize=(PAGE_WIDTH, row_height(rows)))
        axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
        for panel, ax in zip(panels.values(), axes, strict=True):
            panel(ax, bar=False)
        color_bar(axes, label)
    return figure


def _heat(ax: Axes, grid: pd.DataFrame, labels: Sequence[str], norm: Normalize | None, helps: int) -> None:
    """Draw a grid: rows labeled, layers across, gray where there is no effect."""
    layers = [int(layer) for layer in grid.columns.to_numpy()]
    first, last = min(layers), max(layers)
    grid = grid.reindex(columns=range(first, last + 1))
    extent = (first - 0.5, last + 0.5, len(grid) - 0.5, -0.5)
    norm = norm or shared_norm([grid])
    colors = heat_colors(norm, helps)
    ax.imshow(grid, cmap=colors, norm=norm, aspect="auto", interpolation="nearest", extent=extent)
    # Token labels are arbitrary text: a dollar sign must not start mathematics.
    ax.set_yticks(range(len(grid)), labels, parse_math=False)
    ax.tick_params(axis="y", length=0)
    layer_axis(ax, grid.columns).set_xlim(extent[:2])


def _name_panel(ax: Axes, kind: str) -> Axes:
    ax.set(xlabel=layer_label(kind), title=KIND_LABELS.get(kind, kind))
    return ax
