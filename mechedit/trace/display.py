"""Effects that show themselves in a notebook: heatmaps of one fact, in HTML and CSS alone.

Effects are tints of two colors that any color vision tells apart, laid over whatever the page's background
is: light and dark themes need no telling apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from mechedit.tables import where
from mechedit.trace.averages import clearest_fact, main_metric
from mechedit.trace.cells import COLUMNS
from mechedit.trace.labels import KIND_LABELS, ROLE_LABELS, SEVER_LABELS, Unit, sever_label, token_label, unit_of

MOST_PANELS = 6
"""More heatmaps are no longer read at a glance."""
HELPS, HARMS = "31,131,198", "213,94,0"
"""Blue and vermilion, as light as they are dark: seen on white and on black."""


def effects_html(effects: pd.DataFrame, table: str = "") -> str | None:
    """Heatmaps of the clearest fact by token and layer, one a kind and severing; None if none is whole.

    Args:
        effects: tidy effects, or any other frame.
        table: HTML to fold away below them.
    """
    if not (effects.columns.is_unique and set(effects.columns) >= set(COLUMNS) and len(effects)):
        return None
    metric = main_metric(effects["metric"])
    rows = where(effects, metric=metric)
    fact = clearest_fact(rows)
    grids = list(whole_grids(where(rows, fact=fact)))
    if not grids:
        return None
    unit, shown = unit_of(metric), clearest_grids(grids)
    scale = Scale.of(np.concatenate([grid["effect"].to_numpy(dtype=float) for grid in shown]), unit)
    return _template().render(
        fact=fact,
        facts=effects["fact"].nunique(),
        prompt=_prompt(grids[0]),
        model=(effects.attrs.get("provenance") or {}).get("model"),
        unit=unit.name,
        clean=quantity(grids[0]["clean"].iloc[0], unit),
        corrupted=quantity(grids[0]["corrupted"].iloc[0], unit),
        metrics=[other for other in effects["metric"].unique() if other != metric],
        scale=scale,
        panels=[_panel(grid, scale) for grid in shown],
        hidden=len(grids) - len(shown),
        table=Markup(table),
    )


def whole_grids(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The rows of each kind and severing that has every token once at each of two layers or more."""
    for kind in _ordered(rows["kind"], KIND_LABELS):
        for sever in _ordered(where(rows, kind=kind)["sever"], SEVER_LABELS):
            grid = where(rows, kind=kind, sever=sever)
            layers, positions = len(set(grid["layer"])), len(set(grid["position"]))
            cells = set(zip(grid["layer"], grid["position"], strict=True))
            if layers > 1 and len(grid) == len(cells) == layers * positions:
                yield grid.sort_values(["position", "layer"], kind="stable")


def clearest_grids(grids: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """Every kind with nothing severed, then what was severed for the first kind, but not too many."""
    whole = [grid for grid in grids if grid["sever"].iloc[0] == "nothing"]
    cut = [grid for grid in grids if grid["sever"].iloc[0] != "nothing"]
    return [*whole, *(grid for grid in cut if grid["kind"].iloc[0] == cut[0]["kind"].iloc[0])][:MOST_PANELS]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Colors of effects: transparent at zero, stronger to the largest size, blue where restoring helps."""

    low: float
    high: float
    unit: Unit

    @staticmethod
    def of(values: Float[np.ndarray, " cell"], unit: Unit) -> Scale:
        """The scale that spans zero and all values that are finite."""
        finite = values[np.isfinite(values)]
        return Scale(low=float(finite.min(initial=0.0)), high=float(finite.max(initial=0.0)), unit=unit)

    def tint(self, effect: float) -> str:
        """The background of a cell."""
        if not np.isfinite(effect):
            return "repeating-linear-gradient(45deg,rgba(128,128,128,.5) 0 1px,transparent 1px 4px)"
        # Weak tints would drown in a dark page: they are lifted, and so they are in the legend.
        strength = (abs(effect) / (max(-self.low, self.high) or 1.0)) ** 0.7
        return f"rgba({HELPS if effect * self.unit.helps >= 0 else HARMS},{strength:.3f})"

    @property
    def zero(self) -> float:
        """Where zero lies between the ends, in percent."""
        return 100 * -self.low / ((self.high - self.low) or 1.0)

    @property
    def gradient(self) -> str:
        """The legend's colors from low to high."""
        effects = np.linspace(self.low, self.high, 25)
        return f"linear-gradient(90deg,{','.join(map(self.tint, effects))})"

    @property
    def ends(self) -> tuple[str, str]:
        """The least and the largest effect, as text."""
        return quantity(self.low, self.unit, signed=True), quantity(self.high, self.unit, signed=True)


def quantity(value: float, unit: Unit, *, signed: bool = False) -> str:
    """A number with its unit; a true minus sign, and a dash when there is none."""
    if not np.isfinite(value):
        return "–"
    scaled = value * unit.factor
    text = f"{scaled:.1f}" if unit.short == "%" else f"{scaled:.3g}"
    if float(text) == 0:
        return "0" + unit.short
    return (f"+{text}" if signed and scaled > 0 else text.replace("-", "−")) + unit.short


def _panel(grid: pd.DataFrame, scale: Scale) -> dict[str, Any]:
    """What the template needs of one heatmap."""
    kind, sever, widest = str(grid["kind"].iloc[0]), str(grid["sever"].iloc[0]), grid["window"].to_numpy().max()
    title = KIND_LABELS.get(kind, kind)
    title += f" of {widest} layers" if widest > 1 else ""
    title += "" if sever == "nothing" else f", {sever_label(sever)}"
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
    """Rows of each token, in order."""
    for position, cells in grid.groupby("position"):
        first = cells.iloc[0]
        yield (position, first["token"], first["role"]), list(cells.itertuples())


def _cell(row: Any, scale: Scale) -> dict[str, str]:
    """Color and description of one cell."""
    unit = scale.unit
    scores = ", ".join(f"{name} {quantity(getattr(row, name), unit)}" for name in ("score", "corrupted", "clean"))
    place = f"“{token_label(str(row.token), '')}” ({ROLE_LABELS.get(row.role, row.role)}), layer {row.layer}"
    return {
        "tint": scale.tint(row.effect),
        "text": f"{place}: effect {quantity(row.effect, unit, signed=True)}; {scores}",
    }


def _prompt(grid: pd.DataFrame) -> str | None:
    """The prompt's text, when all its tokens were traced."""
    tokens = grid.drop_duplicates("position")
    whole = list(tokens["position"]) == list(range(len(tokens))) and "last" in set(tokens["role"])
    return "".join(map(str, tokens["token"])).strip() if whole else None


def _ordered(values: Any, known: dict[str, str]) -> list[str]:
    """Values in the known order, others after them as they appear."""
    found = dict.fromkeys(values)
    return [*(value for value in known if value in found), *(value for value in found if value not in known)]


@cache
def _template() -> Template:
    # Tokens and ids are arbitrary text, so all that is filled in is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(STYLE + PAGE)


STYLE = """\
<style>
.mechedit-trace {margin: .5em 0; font: 13px/1.4 system-ui, sans-serif; color: inherit; max-width: 100%}
.mechedit-trace .mechedit-panels {display: flex; flex-wrap: wrap; gap: 1em 2em}
.mechedit-trace .mechedit-panel {position: relative; padding-bottom: 4.2em; min-width: 20em; overflow-x: auto}
.mechedit-trace .mechedit-panel h4 {margin: 0 0 .3em; font: inherit; font-weight: 600}
.mechedit-trace table.mechedit-grid {border-collapse: collapse; border: 0; margin: 0; table-layout: auto;
  font: 12px/1 system-ui, sans-serif; color: inherit}
.mechedit-trace .mechedit-grid tr {background: none !important}
.mechedit-trace .mechedit-grid th, .mechedit-trace .mechedit-grid td {border: 0; padding: 0; height: 18px}
.mechedit-trace .mechedit-grid tbody th {padding-right: 6px; text-align: right; font-weight: 400; white-space: pre}
.mechedit-trace .mechedit-grid tbody th.mechedit-subject {font-weight: 700}
.mechedit-trace .mechedit-grid tfoot th {font-weight: 400; text-align: center; opacity: .75}
.mechedit-trace .mechedit-grid tfoot th span {display: inline-block; width: 0; white-space: nowrap}
.mechedit-trace .mechedit-grid tfoot th span b {display: inline-block; font-weight: 400; transform: translateX(-50%)}
.mechedit-trace .mechedit-grid tbody td {box-shadow: inset 0 0 0 .5px rgba(128, 128, 128, .18);
  -webkit-print-color-adjust: exact; print-color-adjust: exact}
.mechedit-trace .mechedit-grid tbody td:hover {outline: 2px solid currentColor; outline-offset: -1px}
.mechedit-trace .mechedit-grid tbody td:hover::after {content: attr(aria-label); position: absolute; left: 0; right: 0;
  bottom: 0; height: 4.2em; font: 12px/1.4 system-ui, sans-serif; text-align: left; white-space: normal}
.mechedit-trace .mechedit-grid .mechedit-axis {text-align: center; opacity: .75}
.mechedit-trace .mechedit-scale {display: flex; align-items: center; gap: .5em; font-size: 12px; margin: .2em 0 .8em}
.mechedit-trace .mechedit-bar {position: relative; width: 12em; height: 12px; border: 1px solid rgba(128,128,128,.5);
  -webkit-print-color-adjust: exact; print-color-adjust: exact}
.mechedit-trace .mechedit-bar i {position: absolute; top: -3px; bottom: -3px; border-left: 1px solid currentColor}
.mechedit-trace figcaption {margin: 0 0 .6em; max-width: 60em}
.mechedit-trace details {margin-top: .3em}
</style>
"""

PAGE = """\
<figure class="mechedit-trace" aria-label="Causal trace of {{ fact }}">
<figcaption><b>{{ fact }}</b>{% if prompt %}: “{{ prompt }}”{% endif %}{% if model %}, traced through {{ model }}\
{% endif %}. {% if facts > 1 %}One of {{ facts }} facts in these effects, the one that the corruption hurts most.\
{% else %}The only fact in these effects.{% endif %} Score {{ clean }} clean, {{ corrupted }} corrupted. A cell is \
the effect (score − corrupted) of putting back what the clean run had there; subject tokens are starred. Hover a cell \
for its numbers.{% if metrics %} Also measured: {{ metrics | join(", ") }}.{% endif %}{% if hidden %} Not shown: \
{{ hidden }} more heatmap{{ "s" if hidden > 1 }}.{% endif %}</figcaption>
<div class="mechedit-scale" role="img" aria-label="Colors from {{ scale.ends[0] }} to {{ scale.ends[1] }}">
<span>{{ scale.ends[0] }}</span><span class="mechedit-bar" style="background:{{ scale.gradient }}">\
<i style="left:{{ '%.1f' | format(scale.zero) }}%"></i></span><span>{{ scale.ends[1] }}</span>\
<span>effect, {{ unit }} (tick: 0)</span></div>
<div class="mechedit-panels">
{% for panel in panels %}
<div class="mechedit-panel"><h4>{{ panel.title }}</h4>
<table class="mechedit-grid" aria-label="{{ panel.title }}: effect by token and layer">
<colgroup><col><col span="{{ panel.layers | length }}" style="width:{{ panel.width }}px"></colgroup>
<tbody>
{% for line in panel.lines %}
<tr><th scope="row"{% if line.role.startswith("subject") %} class="mechedit-subject"{% endif %}>{{ line.label }}</th>\
{% for cell in line.cells %}<td style="background:{{ cell.tint }}" aria-label="{{ cell.text }}"></td>{% endfor %}</tr>
{% endfor %}
</tbody>
<tfoot>
<tr><td></td>{% for layer in panel.layers %}<th scope="col"><span><b>{{ layer }}</b></span></th>{% endfor %}</tr>
<tr><td></td><td class="mechedit-axis" colspan="{{ panel.layers | length }}">{{ panel.axis }}</td></tr>
</tfoot>
</table></div>
{% endfor %}
</div>
{% if table %}<details><summary>Table</summary>{{ table }}</details>{% endif %}
</figure>
"""
