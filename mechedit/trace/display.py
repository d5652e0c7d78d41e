"""Heatmaps of one fact's effects for a notebook, in HTML and CSS alone; the template is effects.html.

Effects are tints of two colors that color-blind readers can tell apart, laid over the page's own background, so
that light and dark themes need no separate colors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from mechedit.tables import where
from mechedit.trace.averages import clearest_fact, main_metric
from mechedit.trace.columns import COLUMNS, with_present_metric_names
from mechedit.trace.labels import KIND_LABELS, ROLE_LABELS, SEVER_LABELS, EffectUnit, token_label, unit_of
from mechedit.trace.severing import sever_in_words

MOST_PANELS = 6
"""Most heatmaps on one page; more cannot be read at a glance."""
HELPS, HARMS = "31,131,198", "213,94,0"
"""Blue and vermilion (RGB) of middle lightness, visible on white and on black."""


def effects_html(effects: pd.DataFrame, table: str = "") -> str | None:
    """Heatmaps of the clearest fact by token and layer, one per kind and severing; None if none is complete.

    Args:
        effects: tidy effects, or any other frame.
        table: HTML of a table to fold below them.
    """
    if not (effects.columns.is_unique and set(effects.columns) >= set(COLUMNS) and len(effects)):
        return None
    effects = with_present_metric_names(effects)
    metric = main_metric(effects["metric"])
    rows = where(effects, metric=metric)
    fact = clearest_fact(rows)
    grids = list(complete_grids(where(rows, fact=fact)))
    if not grids:
        return None
    unit, shown = unit_of(metric), clearest_grids(grids)
    scale = ColorScale.of(np.concatenate([grid["effect"].to_numpy(dtype=float) for grid in shown]), unit)
    return _template().render(
        fact=fact,
        facts=effects["fact"].nunique(),
        prompt=_prompt(grids[0]),
        model=(effects.attrs.get("provenance") or {}).get("model"),
        unit=unit.name,
        clean=quantity(grids[0]["clean"].iloc[0], unit),
        corrupted=quantity(grids[0]["corrupted"].iloc[0], unit),
        metrics=[name for name in effects["metric"].unique() if name != metric],
        scale=scale,
        panels=[_panel(grid, scale) for grid in shown],
        hidden=len(grids) - len(shown),
        table=Markup(table),
    )


def complete_grids(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The rows of each kind and severing that have every token once at each of two or more layers."""
    for kind in _ordered(rows["kind"], KIND_LABELS):
        for sever in _ordered(where(rows, kind=kind)["sever"], SEVER_LABELS):
            grid = where(rows, kind=kind, sever=sever)
            layers, positions = len(set(grid["layer"])), len(set(grid["position"]))
            cells = set(zip(grid["layer"], grid["position"], strict=True))
            if layers > 1 and len(grid) == len(cells) == layers * positions:
                yield grid.sort_values(["position", "layer"], kind="stable")


def clearest_grids(grids: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """Every kind with nothing severed, then the severings of the first kind, at most `MOST_PANELS` in all."""
    unsevered = [grid for grid in grids if grid["sever"].iloc[0] == "nothing"]
    severed = [grid for grid in grids if grid["sever"].iloc[0] != "nothing"]
    first_kind = [grid for grid in severed if grid["kind"].iloc[0] == severed[0]["kind"].iloc[0]]
    return [*unsevered, *first_kind][:MOST_PANELS]


@dataclass(frozen=True, kw_only=True)
class ColorScale:
    """Colors of effects: transparent at zero, stronger towards the largest size, blue where restoring helps."""

    low: float
    high: float
    unit: EffectUnit

    @staticmethod
    def of(values: Float[np.ndarray, " cell"], unit: EffectUnit) -> ColorScale:
        """The scale that spans zero and all values that are finite."""
        finite = values[np.isfinite(values)]
        return ColorScale(low=float(finite.min(initial=0.0)), high=float(finite.max(initial=0.0)), unit=unit)

    def tint(self, effect: float) -> str:
        """The background of a cell."""
        if not np.isfinite(effect):
            return "repeating-linear-gradient(45deg,rgba(128,128,128,.5) 0 1px,transparent 1px 4px)"
        # Weak tints would be lost on a dark page, so they are strengthened, in the legend too.
        strength = (abs(effect) / (max(-self.low, self.high) or 1.0)) ** 0.7
        return f"rgba({HELPS if effect * self.unit.helps >= 0 else HARMS},{strength:.3f})"

    @property
    def zero(self) -> float:
        """Position of zero between the ends, in percent."""
        return 100 * -self.low / ((self.high - self.low) or 1.0)

    @property
    def gradient(self) -> str:
        """The legend's colors from low to high."""
        effects = np.linspace(self.low, self.high, 25)
        return f"linear-gradient(90deg,{','.join(map(self.tint, effects))})"

    @property
    def ends(self) -> tuple[str, str]:
        """The smallest and the largest effect, as text."""
        return quantity(self.low, self.unit, signed=True), quantity(self.high, self.unit, signed=True)


def quantity(value: float, unit: EffectUnit, *, signed: bool = False) -> str:
    """A number with its unit, typeset with a true minus sign; a dash when it is not finite."""
    if not np.isfinite(value):
        return "–"
    scaled = value * unit.factor
    text = f"{scaled:.1f}" if unit.short == "%" else f"{scaled:.3g}"
    if float(text) == 0:
        return "0" + unit.short
    return (f"+{text}" if signed and scaled > 0 else text.replace("-", "−")) + unit.short


def _panel(grid: pd.DataFrame, scale: ColorScale) -> dict[str, Any]:
    """One heatmap as the template needs it."""
    kind, sever, widest = str(grid["kind"].iloc[0]), str(grid["sever"].iloc[0]), grid["window"].to_numpy().max()
    title = KIND_LABELS.get(kind, kind)
    title += f" of {widest} layers" if widest > 1 else ""
    title += "" if sever == "nothing" else f", {sever_in_words(sever)}"
    layers = sorted(set(grid["layer"]))
    step = next(step for step in (1, 2, 5, 10, 20, 50, len(layers)) if len(layers) / step <= 12)
    lines = [
        {"label": token_label(str(text), str(role)), "role": role, "cells": [_cell(row, scale) for row in cells]}
        for (_, text, role), cells in _lines(grid)
    ]
    return {
        "title": title,
        "layers": [layer if i % step == 0 else "" for i, layer in enumerate(layers)],
        "width": min(22, max(7, 340 // len(layers))),
        "lines": lines,
        "axis": "layer" if kind == "state" else "layer at the window’s center",
    }


def _lines(grid: pd.DataFrame) -> Iterator[tuple[Any, list[Any]]]:
    """(position, text, role) and rows of each token, in order."""
    for position, cells in grid.groupby("position"):
        first = cells.iloc[0]
        yield (position, first["token"], first["role"]), list(cells.itertuples())


def _cell(row: Any, scale: ColorScale) -> dict[str, str]:
    """Color and description of one cell."""
    unit = scale.unit
    scores = ", ".join(f"{name} {quantity(getattr(row, name), unit)}" for name in ("score", "corrupted", "clean"))
    location = f"“{token_label(str(row.token), '')}” ({ROLE_LABELS.get(row.role, row.role)}), layer {row.layer}"
    return {
        "tint": scale.tint(row.effect),
        "text": f"{location}: effect {quantity(row.effect, unit, signed=True)}; {scores}",
    }


def _prompt(grid: pd.DataFrame) -> str | None:
    """The prompt's text, when all its tokens were traced."""
    tokens = grid.drop_duplicates("position")
    complete = list(tokens["position"]) == list(range(len(tokens))) and "last" in set(tokens["role"])
    return "".join(map(str, tokens["token"])).strip() if complete else None


def _ordered(values: Any, known: dict[str, str]) -> list[str]:
    """Distinct values in the known order, others after them as they appear."""
    distinct = dict.fromkeys(values)
    return [*(value for value in known if value in distinct), *(value for value in distinct if value not in known)]


@cache
def _template() -> Template:
    # Tokens and ids are arbitrary text, so everything that is filled in is escaped.
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("effects.html")
