"""Every figure of a trace, from effects in memory or from a file, which is never read as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from mechedit.figures.severed_bars import plot_severed
from mechedit.figures.style import COLUMN_WIDTH, PAGE_WIDTH, draw
from mechedit.figures.trace_averages import kinds_in
from mechedit.figures.trace_curves import lines_figure, plot_lines
from mechedit.figures.trace_heatmaps import fact_figure, fact_panels, role_panels, roles_figure, row_height
from mechedit.tables import where
from mechedit.trace import SEVER_LABELS, average_effects, clearest_fact, read_effects, with_present_metric_names
from mechedit.trace.averages import main_metric


def trace_figures(effects: pd.DataFrame | str | Path, selection: Sequence[int] | None = None) -> dict[str, Figure]:
    """Every figure of a trace, by name; those whose effects were not traced are left out.

    Names: severed; roles, fact and lines, all kinds side by side; roles_KIND, fact_KIND and lines_KIND, one kind each
    on the same scale, for a paper's column or a narrow screen. Of several metrics, probability (else the first)
    has these names; each other has severed_METRIC, roles_METRIC, fact_METRIC and lines_METRIC.

    Args:
        effects: tidy effects, or the parquet file that holds them.
        selection: layers to shade in the severed bars.
    """
    averages = average_effects(effects)
    clearest = clearest_fact(effects)
    if isinstance(effects, pd.DataFrame):
        fact = with_present_metric_names(where(effects, fact=clearest))
    else:
        fact = read_effects(effects, fact=clearest)
    main = main_metric(averages["metric"])
    figures = _page_figures(where(averages, metric=main), where(fact, metric=main), selection)
    figures |= _kind_figures(where(averages, metric=main), where(fact, metric=main))
    for metric in averages["metric"].unique():
        if metric != main:
            metric_figures = _page_figures(where(averages, metric=metric), where(fact, metric=metric), selection)
            figures |= {f"{name}_{metric}": figure for name, figure in metric_figures.items()}
    return figures


def _page_figures(averages: pd.DataFrame, fact: pd.DataFrame, selection: Sequence[int] | None) -> dict[str, Figure]:
    """Figures of all kinds, for the width of a page."""
    figures: dict[str, Figure] = {}
    early = where(averages, kind="state", role="subject_last")
    if set(early["sever"]) & set(SEVER_LABELS):
        wide = PAGE_WIDTH if len(set(averages["layer"])) > 20 else COLUMN_WIDTH
        figures["severed"] = draw(partial(plot_severed, averages, selection=selection), width=wide)
    unsevered = where(averages, sever="nothing")
    if len(set(unsevered["role"])) > 1:
        figures |= {"roles": roles_figure(unsevered), "fact": fact_figure(fact), "lines": lines_figure(unsevered)}
    return figures


def _kind_figures(averages: pd.DataFrame, fact: pd.DataFrame) -> dict[str, Figure]:
    """Figures of one kind each, for a column."""
    unsevered = where(averages, sever="nothing")
    if len(set(unsevered["role"])) < 2:
        return {}
    figures: dict[str, Figure] = {}
    for name, (panels, rows) in {"roles": role_panels(unsevered), "fact": fact_panels(fact)}.items():
        figures |= {f"{name}_{kind}": draw(panel, height=row_height(rows)) for kind, panel in panels.items()}
    for kind in kinds_in(unsevered):
        figures[f"lines_{kind}"] = draw(partial(plot_lines, unsevered, kinds=[kind]), height=2.5)
    return figures
