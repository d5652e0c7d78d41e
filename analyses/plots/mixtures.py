"""Facts of two relations edited together, against the mean of either alone (MEMIT Fig. 7 and 10).

In: a tidy frame `edits, part, mean, low, high` in percent. Out: the same Axes.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from mechedit.errors import InputError
from mechedit.figures import BLUE, GRAY, INK, ORANGE, SKY, legend_above
from mechedit.tables import where

PARTS = {"first": "first relation", "second": "second relation", "mean": "mean of the two", "mixture": "mixture"}


def plot_mixture(table: pd.DataFrame, ax: Axes, *, measure: str = "S") -> Axes:
    """The mixture with its intervals and the dashed mean of the two; thin, what either relation reaches alone.

    Args:
        table: of one pair and measure, `edits, part, mean, low, high` with the parts first, second, mean, mixture.
        ax: where to draw.
        measure: what to call the axis.

    Raises:
        InputError: a part is missing.
    """
    if missing := [part for part in PARTS if part not in set(table["part"])]:
        raise InputError(f"the table holds no {missing[0]!r}, expected the parts {', '.join(PARTS)}: compare again")
    for part, color, marker in (("first", SKY, "^"), ("second", ORANGE, "v")):
        scores = where(table, part=part).sort_values("edits")
        ax.plot(
            scores["edits"], scores["mean"], color=color, marker=marker, markersize=3, linewidth=0.8, label=PARTS[part]
        )
    mean, mixture = (where(table, part=part).sort_values("edits") for part in ("mean", "mixture"))
    edits = sorted(set(table["edits"]))
    line = {"color": INK, "linestyle": (0, (4, 2)), "linewidth": 1, "label": PARTS["mean"], "zorder": 3}
    if len(edits) == 1:  # nothing to draw a line between
        line |= {"marker": "_", "markersize": 14}
        ax.set_xlim(edits[0] / 2, edits[0] * 2)
    ax.plot(mean["edits"], mean["mean"], **line)
    ends = [mixture["mean"] - mixture["low"], mixture["high"] - mixture["mean"]]
    ax.errorbar(mixture["edits"], mixture["mean"], ends, fmt="none", ecolor=BLUE, elinewidth=0.7)
    line = {"color": BLUE, "marker": "o", "markersize": 3.5, "label": PARTS["mixture"], "zorder": 4}
    ax.plot(mixture["edits"], mixture["mean"], **line)
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(edits, [f"{n:,}" for n in edits])
    ax.set(xlabel="edits", ylabel=f"{measure} (%)")
    ax.grid(axis="y", color=GRAY, alpha=0.25, linewidth=0.4)
    legend_above(ax, columns=4)
    return ax
