"""What a search for settings tried: scores by window, and by the value of each setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mechedit.errors import InputError
from mechedit.figures.style import BLUE, GRAY, GREEN, INK, ORANGE, draw, layer_axis, legend_above

ROUND_COLORS = (GRAY, GREEN, BLUE)
"""Colors of the rounds, the one with fewest facts first."""
ABSOLUTE = {"relative_lr": "lr", "relative_covariance_weight": "covariance_weight"}
"""Settings that have another name in absolute units."""
SETTING_LABELS = {
    "relative_covariance_weight": "λ (units of the facts' median kᵀM⁻¹k)",
    "covariance_weight": "λ (units of one fact)",
    "relative_lr": "learning rate (units of the typical |hᵢ|)",
    "lr": "learning rate",
    "clamp": "largest ‖δ‖ (units of ‖h‖)",
    "kl_weight": "weight of the KL term",
    "generated_prefixes": "generated prefixes",
}


def plot_tuned_windows(record: Mapping[str, Any], ax: Axes) -> Axes:
    """The score of every window that was tried, at its last layer: the best λ of each, a color per number of facts.

    The star is the choice, with its layers in the legend; the dashed line the unedited model.

    Args:
        record: a method's section of tuned.json.
        ax: where to draw.

    Raises:
        InputError: it holds no trials of windows.
    """
    trials = [trial for trial in record["trials"] if trial["stage"] in ("windows", "widths")]
    if not trials:
        raise InputError("there are no trials of windows, expected some in a section of tuned.json: tune again")
    counts = sorted({trial["facts"] for trial in trials})
    for count, color in zip(counts, ROUND_COLORS[-len(counts) :], strict=False):
        best: dict[int, dict[str, Any]] = {}
        for trial in trials:
            end = trial["layers"][-1]
            if trial["facts"] == count and trial["objective"] > best.get(end, {"objective": -np.inf})["objective"]:
                best[end] = trial
        ends = sorted(best)
        line = {"marker": "o", "markersize": 3, "color": color, "label": f"{count} facts"}
        ax.plot(ends, [best[end]["score"] for end in ends], **line)
    first, last = record["layers"][0], record["layers"][-1]
    _star(record, last, ax, f"chosen: {first}–{last}" if first < last else f"chosen: {last}")
    _unedited(record, ax)
    ax.set(xlabel="last layer of the window", ylabel="edit score (%)", ylim=(-4, 106))
    legend_above(ax, columns=3)
    return layer_axis(ax, [trial["layers"][-1] for trial in trials])


def plot_tuned_setting(record: Mapping[str, Any], name: str, ax: Axes) -> Axes:
    """The score by the value of a setting on the chosen layers, and exact match; the star is the choice.

    A choice in the absolute unit that the search began with is a dotted line.

    Args:
        record: a method's section of tuned.json.
        name: of the setting, such as `relative_covariance_weight`.
        ax: where to draw.

    Raises:
        InputError: fewer than two values were tried.
    """
    values, trials = _by_value(record, name)
    if len(values) < 2:
        raise InputError(f"{name} was tried with {len(values)} values, expected two or more in a section of tuned.json")
    for measure, color in (("score", BLUE), ("exact_match", ORANGE)):
        line = {"marker": "o", "markersize": 3, "color": color, "label": measure.replace("_", " ")}
        ax.plot(values, [trial[measure] for trial in trials], **line)
    chosen, absolute = record["settings"].get(name), record["settings"].get(ABSOLUTE.get(name, name))
    if chosen in values:
        _star(record, chosen, ax, "chosen")
    elif absolute is not None:  # in the unit that the search began with, which has no place on this axis
        label = f"score of the chosen {SETTING_LABELS[ABSOLUTE[name]].replace('λ', f'λ = {absolute:g}')}"
        ax.axhline(record["chosen"]["score"], color=INK, linewidth=0.8, linestyle=":", label=label)
    _unedited(record, ax)
    if min(values) > 0:
        ax.set_xscale("log")
        ax.set_xticks(values, [f"{value:g}" for value in values])
        ax.minorticks_off()
    ax.set(xlabel=SETTING_LABELS.get(name, name), ylabel="%", ylim=(-4, 106))
    legend_above(ax, columns=3)
    return ax


def tuning_figures(record: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of a search by name: windows, and every setting that was tried with more than one value.

    Args:
        record: a method's section of tuned.json.
    """
    figures = {"tuned_windows": draw(partial(plot_tuned_windows, record))}
    for name in SETTING_LABELS:
        if len(_by_value(record, name)[0]) > 1:
            figures[f"tuned_{name}"] = draw(partial(plot_tuned_setting, record, name))
    return figures


def _by_value(record: Mapping[str, Any], name: str) -> tuple[list[float | int], list[dict[str, Any]]]:
    """The values of a setting on the chosen layers with all facts, ascending, each with its best trial.

    The value that the search began with counts where it is in the same unit.
    """
    begun = record["begun_with"].get(name)
    best: dict[float | int, dict[str, Any]] = {}
    for trial in _of_layers(record, record["layers"]):
        relatives = [relative for relative, absolute in ABSOLUTE.items() if absolute == name]
        replaced = any(relative in trial["settings"] for relative in relatives)
        value = None if replaced else trial["settings"].get(name, begun)
        if value is not None and trial["objective"] > best.get(value, {"objective": -np.inf})["objective"]:
            best[value] = trial
    values = sorted(best)
    return values, [best[value] for value in values]


def _of_layers(record: Mapping[str, Any], layers: Sequence[int]) -> list[dict[str, Any]]:
    facts = record["chosen"]["facts"]
    return [trial for trial in record["trials"] if trial["layers"] == list(layers) and trial["facts"] == facts]


def _star(record: Mapping[str, Any], x: float | int, ax: Axes, label: str) -> None:
    score = record["chosen"]["score"]
    ax.scatter([x], [score], marker="*", s=60, color=ORANGE, edgecolors=INK, linewidths=0.5, zorder=4, label=label)


def _unedited(record: Mapping[str, Any], ax: Axes) -> None:
    unedited = record["unedited"].get("S") or record["unedited"].get("exact_match")
    if unedited:
        ax.axhline(unedited["mean"], color=GRAY, linewidth=0.8, linestyle=(0, (3, 2)), label="unedited")
