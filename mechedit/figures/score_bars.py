"""Scores before and after an edit, as bars."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from mechedit.errors import InputError, brief_list
from mechedit.evaluation import Entry, measure_named
from mechedit.figures.style import BLUE, GRAY, INK, legend_above

BARS = {
    name: measure_named(name).short_title or name
    for name in ("ES", "PS", "NS", "efficacy", "paraphrase", "specificity", "S", "exact_match")
}
"""Measures drawn by default, with their labels."""


def plot_scores(
    before: Mapping[str, Entry], after: Mapping[str, Entry], ax: Axes, *, names: Mapping[str, str] = BARS
) -> Axes:
    """Measures before and after an edit, in percent, with their intervals.

    Args:
        before: `Scores.summary` of the unedited model; may be empty.
        after: that of the edited model; may be empty.
        ax: where to draw.
        names: the measures, with their labels; by default ES, PS, NS or zsRE's three, S and exact match.

    Raises:
        InputError: neither summary holds any of these measures.
    """
    shown = [name for name in names if name in before or name in after]
    if not shown:
        present = brief_list({**before, **after})
        raise InputError(f"the summaries hold {present}, expected some of {', '.join(names)}: evaluate first")
    states = [(n, s, c) for n, s, c in (("before", before, GRAY), ("after", after, BLUE)) if s]
    for i, (state, summary, color) in enumerate(states):
        entries = {position: summary[name] for position, name in enumerate(shown) if name in summary}
        positions = np.array(list(entries)) + (i - (len(states) - 1) / 2) * 0.4
        mean, low, high = (
            np.array([entry[end] for entry in entries.values()], dtype=float) for end in ("mean", "low", "high")
        )
        ax.bar(positions, mean, 0.38, color=color, label=state, linewidth=0)
        ends = np.clip([mean - low, high - mean], 0, None)
        ax.errorbar(positions, mean, ends, fmt="none", ecolor=INK, elinewidth=0.7)
        for x, y, top in zip(positions, mean, high, strict=True):
            ax.annotate(f"{y:.0f}", (x, top), (0, 1.5), textcoords="offset points", ha="center", fontsize=6)
    ax.set_xticks(range(len(shown)), [names[name] for name in shown])
    ax.tick_params(axis="x", length=0)
    ax.set(ylim=(0, 106), yticks=range(0, 101, 20), ylabel="score (%)")
    legend_above(ax, columns=2)
    return ax
