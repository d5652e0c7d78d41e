"""Severed bars: indirect effects of a state with and without the modules above it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from mechedit.errors import InputError, brief_list
from mechedit.figures.style import GRAY, INK, SEVER_COLORS, SPARE, layer_axis, legend_above, runs
from mechedit.figures.trace_averages import aie_label, averaged, curve
from mechedit.tables import where
from mechedit.trace import SEVER_LABELS, sever_in_words


def plot_severed(
    effects: pd.DataFrame,
    ax: Axes,
    selection: Sequence[int] | None = None,
    *,
    severings: Sequence[str] | None = None,
) -> Axes:
    """MEMIT Fig. 3: AIE of one state at the subject's last token, by layer, unsevered and severed.

    Args:
        effects: tidy effects, or their averages by `average_effects`; those of kind `state` at role `subject_last`
            are drawn.
        ax: where to draw.
        selection: layers to shade.
        severings: the bars; by default those without a subset of layers (`mlp@3`) that were traced.

    Raises:
        InputError: there are no such effects, or none of one of the severings.
    """
    rows = averaged(effects, kind="state", role="subject_last")
    traced = list(dict.fromkeys(rows["sever"]))
    if missing := [sever for sever in severings or () if sever not in traced]:
        raise InputError(f"the effects hold nothing of severing {missing[0]!r}, expected one of {brief_list(traced)}")
    shown = list(severings or [sever for sever in SEVER_LABELS if sever in traced])
    if not shown:
        raise InputError(f"the effects hold severings {brief_list(traced)} only, expected some: name them in severings")
    for first, last in runs(selection or ()):
        ax.axvspan(first - 0.5, last + 0.5, color=GRAY, alpha=0.22, linewidth=0, zorder=0)
    width = 0.8 / len(shown)
    spare = iter([*SPARE] * len(shown))
    for i, sever in enumerate(shown):
        layers, ends = curve(where(rows, sever=sever))
        mean, low, high = ends.T
        positions = layers + (i - (len(shown) - 1) / 2) * width
        color = SEVER_COLORS.get(sever) or next(spare)
        ax.bar(positions, mean, width, color=color, label=sever_in_words(sever), linewidth=0)
        ax.errorbar(positions, mean, [mean - low, high - mean], fmt="none", ecolor=INK, elinewidth=0.5)
    ax.axhline(0, color=INK, linewidth=0.6)
    ax.set(xlabel="layer of the restored state", ylabel=aie_label(rows, ax))
    legend_above(ax, columns=3)
    return layer_axis(ax, sorted(set(rows["layer"])))
