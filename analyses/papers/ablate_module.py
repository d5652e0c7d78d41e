"""MLPs against attention: the same edits of the same ranges, written into either (MEMIT Fig. 12).

    python -m analyses.papers.ablate_module [--model M] [--requests R] [--layers 3-8] [--out DIR] [--quick]

Written into attention, a key is the input of a layer's output projection at the subject's last token, and the change
wanted of the residual stream is spread over what attention adds to it; all else, z above all, is the same. Ranges and
MLP edits are those of `ablate_layers`, and are found in the folder when that has run.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from analyses.common.command import open_experiment, run_script
from analyses.papers.ablate_layers import at_depths, format_table, labeled, ranged, swept, unedited
from mechedit.figures import GRAY, layer_axis, scores_figure
from mechedit.sweep import Window

MODULES = {"mlp": "MLP", "attn": "attention"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Edit and score each range in both modules, write the table and the figure."""
    experiment = open_experiment("ablate_module", ranged(__doc__), arguments)
    selected = Window(experiment.layers[0], experiment.layers[-1])
    windows = at_depths(experiment, selected)
    sweeps = {name: swept(experiment, windows, module) for module, name in MODULES.items()}
    before = next(iter(sweeps.values()))
    edits = [labeled(sweep, windows, "depth").assign(module=name) for name, sweep in sweeps.items()]
    level = unedited(before).drop_duplicates("measure").assign(module="unedited")
    table = pd.concat([*edits, level], ignore_index=True)
    lines = pd.concat([format_table(sweep).assign(module=name) for name, sweep in sweeps.items()], ignore_index=True)
    lines = lines.loc[~((lines["layers"] == "unedited") & (lines["module"] != next(iter(sweeps)))), :]
    lines.loc[lines["layers"] == "unedited", "module"] = ""
    experiment.write(table, lines.loc[:, ["module", *lines.columns.drop("module")]], figure(table, selected))


def figure(table: pd.DataFrame, selected: Window) -> Figure:
    """Each score against the range's last layer, one line per module; the model's own range is shaded."""
    drawn = scores_figure(table, x="last", hue="module", label=f"last of {selected.width} layers")
    for ax in drawn.axes:
        ax.axvspan(selected.last - 0.4, selected.last + 0.4, color=GRAY, alpha=0.2, linewidth=0, zorder=0)
        layer_axis(ax, table["last"].dropna().astype(int))
    return drawn


if __name__ == "__main__":
    run_script(main)
