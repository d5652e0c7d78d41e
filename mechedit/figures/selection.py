"""The evidence for a layer range, drawn with the ranges of the other rules and of the papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from mechedit.errors import InputError
from mechedit.figures.style import BLUE, GRAY, INK, ORANGE, layer_axis, legend_above, runs


def plot_selection(selection: Mapping[str, Any], ax: Axes) -> Axes:
    """The evidence for a layer range: the severed gap, and the contribution of each layer's MLP to it.

    Gap: AIE of the state minus its AIE with MLPs severed. Contribution of layer l: gap(l − 1) − gap(l).
    The darker a layer's background, the more resamples of facts choose it. Below, a row for each range: the chosen
    one, those of the other rules, and published ones.

    Args:
        selection: content of selection.json (`layers` and `evidence`, in units of `metric`).
        ax: where to draw; the rows take the lower part of it.

    Raises:
        InputError: no evidence.
    """
    evidence = pd.DataFrame(list(selection.get("evidence") or ()))
    if evidence.empty:
        raise InputError("the selection holds no evidence, expected one entry per layer: select the layers again")
    evidence = evidence.filter(regex="^(layer|membership|gap|contribution)(_low|_high)?$").astype(float)
    layers = evidence["layer"].to_numpy()
    percent = selection.get("metric", "probability") == "probability"
    scale, unit = (100, "% of probability") if percent else (1, str(selection["metric"]))
    contribution, low, high = (evidence[f"contribution{end}"].to_numpy() * scale for end in ("", "_low", "_high"))
    ax.bar(layers, contribution, 0.5, color=ORANGE, linewidth=0, label="contribution of MLP")
    ax.errorbar(layers, contribution, [contribution - low, high - contribution], fmt="none", ecolor=INK, elinewidth=0.5)
    gap, low, high = (evidence[f"gap{end}"].to_numpy() * scale for end in ("", "_low", "_high"))
    ax.fill_between(layers, low, high, color=BLUE, alpha=0.2, linewidth=0)
    ax.plot(layers, gap, color=BLUE, marker="o", markersize=2.5, label="severed gap")
    ax.axhline(0, color=INK, linewidth=0.6)
    foot = _range_rows(_ranges(selection), layer_axis(ax, layers))
    for layer, membership in zip(layers, evidence["membership"].fillna(0), strict=True):
        if selection["layers"]:  # without a choice, there is no stability of it to show
            shade = {"color": GRAY, "alpha": 0.4 * membership, "linewidth": 0, "zorder": 0}
            ax.axvspan(layer - 0.5, layer + 0.5, ymin=foot, **shade)
    if selection["layers"]:
        ax.fill_between([], [], color=GRAY, alpha=0.4, linewidth=0, label="chosen in resamples")
    ax.set_xlabel("layer")
    ax.set_ylabel(unit, y=(1 + foot) / 2)
    legend_above(ax, columns=3)
    return ax


RANGE_ROW = 0.125
"""Height in inches of a row of the ranges."""


def _ranges(selection: Mapping[str, Any]) -> list[tuple[str, Sequence[int], str]]:
    """Label, layers and color of each range: the chosen one, those of other rules, published ones.

    Where edits chose, the range of the rule stands among those that were not chosen.
    """
    rule, alternatives = selection.get("rule") or "a rule", selection.get("alternatives") or {}
    ranges: list[tuple[str, Sequence[int], str]] = []
    by = (selection.get("validation") or {}).get("by") or "trace"
    chooser = {"trace": rule, "both": "trace and edits"}.get(by, "edits")
    ranges.append(
        (f"{chooser} (chosen)", selection["layers"], INK) if selection["layers"] else ("none chosen", [], INK)
    )
    if by != "trace" and (traced := (selection.get("rules") or {}).get(rule, {}).get("layers")):
        ranges.append((rule, traced, BLUE))
    ranges += [(rule, layers, BLUE) for rule, layers in alternatives.items() if layers]
    if selection["layers"] and (without := [rule for rule, layers in alternatives.items() if not layers]):
        ranges.append((f"none by {', '.join(without)}", [], BLUE))
    published: dict[tuple[int, ...], list[str]] = {}
    for entry in selection.get("published") or ():
        names = published.setdefault(tuple(entry["layers"]), [])
        names += [entry["method"]] * (entry["method"] not in names)
    return ranges + [(f"published, {', '.join(names)}", layers, GRAY) for layers, names in published.items()]


def _range_rows(ranges: Sequence[tuple[str, Sequence[int], str]], ax: Axes) -> float:
    """Make room at the foot of the axes and draw a named bar for each range; return the fraction of the height used."""
    figure = ax.get_figure(root=True)
    foot = min(0.6, RANGE_ROW * (len(ranges) + 0.6) / (0.7 * figure.get_figheight() if figure else 2))
    bottom, top = ax.get_ylim()
    low, high = ax.get_xlim()
    ax.set_yticks([tick for tick in ax.get_yticks() if bottom <= tick <= top])
    ax.set_ylim(bottom - (top - bottom) * foot / (1 - foot), top)
    ax.spines["left"].set_bounds(bottom, top)
    for row, (name, layers, color) in enumerate(ranges):
        height = foot * (1 - (row + 0.9) / (len(ranges) + 0.6))
        line = {"color": color, "linewidth": 2 if row else 3.2, "solid_capstyle": "butt", "label": f"_{name}"}
        for first, last in runs(layers):
            ax.plot([first - 0.5, last + 0.5], [height, height], transform=ax.get_xaxis_transform(), **line)
        # The name goes to the side with more room.
        right = not layers or high - max(layers) >= min(layers) - low
        end = low if not layers else max(layers) + 0.5 if right else min(layers) - 0.5
        ax.annotate(
            name, (end, height), ((3 if right else -3), 0), xycoords=ax.get_xaxis_transform(), fontsize=6,
            textcoords="offset points", ha="left" if right else "right", va="center_baseline",
        )  # fmt: skip
    return foot
