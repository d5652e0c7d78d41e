"""Which layers to edit: scores for ranges of one width at every depth, and for wider and wider ones (MEMIT Fig. 11).

    python -m analyses.papers.ablate_layers [--model M] [--requests R] [--layers 3-8] [--out DIR] [--quick]

All ranges are edited by one method, with the same requests, each time from the unedited model. Those of the figure's
upper row are as wide as the model's own range (`--layers`, or what the trace selects) and lie at every depth; those of
the lower row end where that range ends. z depends on where a range ends alone, so the latter share one search.

Away from the layers that hold facts a model may have keys that lie in a subspace, so that E[k kᵀ] is singular and the
update not determined. To edit all ranges alike, `--damping` times the mean of its diagonal is added to each diagonal.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from analyses.common.command import open_experiment, options, run_script
from analyses.common.experiment import Experiment
from analyses.common.printing import format_interval
from analyses.common.variants import Variant
from mechedit.evaluation import measure_named
from mechedit.figures import GRAY, PAGE_WIDTH, layer_axis, legend_above, paper_style, plot_scores_against, share_legend
from mechedit.moments import SecondMoment
from mechedit.report import span
from mechedit.sweep import Sweep, Window, sweep_windows, windows_of
from mechedit.tables import where

MEASURES = ("ES", "PS", "NS", "S")
SELECTED = "the model's own range"
MOST_DEPTHS = 10
"""A search for z each: in deeper models so many, spread evenly, and the model's own range."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Choose ranges, edit and score each, write the table and the figure."""
    parser = ranged(__doc__)
    experiment = open_experiment("ablate_layers", parser, arguments)
    selected = Window(experiment.layers[0], experiment.layers[-1])
    depths, widths = at_depths(experiment, selected), of_every_width(experiment, selected)
    sweep = swept(experiment, [*depths, *widths])
    table = pd.concat([labeled(sweep, depths, "depth"), labeled(sweep, widths, "width"), unedited(sweep)])
    experiment.write(table, format_table(sweep), figure(table, selected))


def ranged(doc: str | None) -> argparse.ArgumentParser:
    """The options of the scripts that compare ranges; with the same ones they share their edits."""
    parser = options(doc, count=100, quick_count=8)
    parser.add_argument("--method", default="memit")
    parser.add_argument("--damping", type=float, default=1e-6, help="see above (default 1e-6)")
    return parser


def at_depths(experiment: Experiment, selected: Window) -> list[Window]:
    """Ranges as wide as the model's own, from its first layers to its last; with `--quick`, those ends and the own."""
    windows = windows_of(experiment.model.n_layers, selected.width)
    most = 2 if experiment.quick else MOST_DEPTHS
    indices = np.unique(np.linspace(0, len(windows) - 1, min(most, len(windows))).round().astype(int))
    return sorted({selected, *(windows[index] for index in indices)})


def of_every_width(experiment: Experiment, selected: Window) -> list[Window]:
    """Ranges of every width that end where the model's own does; with `--quick`, only the own and the narrowest."""
    firsts = {selected.first, selected.last} if experiment.quick else range(selected.last + 1)
    return [Window(first, selected.last) for first in sorted(firsts, reverse=True)]


def swept(experiment: Experiment, windows: Sequence[Window], module: str = "mlp") -> Sweep:
    """Edit and score each range once; what another script of the folder has found is read from there."""
    layers, method = sorted({layer for window in windows for layer in window.layers}), experiment.arguments.method
    moments = experiment.moments(layers, module)
    return sweep_windows(
        experiment.model.writing(module),
        experiment.requests,
        {layer: damped(moment, experiment.arguments.damping) for layer, moment in moments.items()},
        windows,
        method=method,
        config=experiment.config(Variant(method=method, layers=tuple(layers))),
        parts=experiment.out / "sweep_parts",
        cache=experiment.out / "targets",
    )


def damped(moment: SecondMoment, damping: float) -> SecondMoment:
    """E[k kᵀ] with `share` of its mean eigenvalue added to every eigenvalue; its provenance says so."""
    size = damping * moment.matrix.diagonal().mean()
    matrix = moment.matrix + size * torch.eye(
        len(moment.matrix), dtype=moment.matrix.dtype, device=moment.matrix.device
    )
    return dataclasses.replace(moment, matrix=matrix, provenance={**moment.provenance, "damping": damping})


def labeled(sweep: Sweep, windows: Sequence[Window], varied: str) -> pd.DataFrame:
    """Scores of these ranges: the sweep's table with `varied` (depth or width) and `layers` (3–8)."""
    rows = sweep.table
    rows = rows.loc[[Window(*ends) in windows for ends in zip(rows["first"], rows["last"], strict=True)], :]
    labels = [span(Window(*ends).layers) for ends in zip(rows["first"], rows["last"], strict=True)]
    return rows.assign(varied=varied, layers=labels, model="edited")


def unedited(sweep: Sweep) -> pd.DataFrame:
    """Scores of the unedited model, which no range changes."""
    rows = [{"measure": name, "model": "unedited", **entry} for name, entry in sweep.before.items()]
    return pd.concat([pd.DataFrame(rows).assign(varied=varied) for varied in ("depth", "width")])


def format_table(sweep: Sweep) -> pd.DataFrame:
    """The table as a paper would print it: one line per range, each score with half its interval, in percent."""
    rows = [{"layers": "unedited", **format_summary(sweep.before)}]
    for window in sweep.windows:
        summary = where(sweep.table, first=window.first, last=window.last).set_index("measure").to_dict("index")
        rows.append({"layers": span(window.layers), **format_summary(summary)})
    rows += [
        {"layers": span(window.layers), "refused": reason.partition(";")[0]} for window, reason in sweep.failed.items()
    ]
    return pd.DataFrame(rows)


def format_summary(summary: dict) -> dict[str, str]:
    """The printed scores of one state of the model."""
    return {
        name: format_interval(summary[name]["mean"], summary[name]["low"], summary[name]["high"])
        for name in (*MEASURES, "exact_match", "left")
        if name in summary
    }


def figure(table: pd.DataFrame, selected: Window) -> Figure:
    """Scores against depth above and against width below; the model's own range is shaded."""
    shown = [measure for measure in MEASURES if measure in set(table["measure"])]
    rows = (
        ("depth", "last", f"last of {selected.width} layers", selected.last),
        ("width", "width", f"number of layers up to {selected.last}", selected.width),
    )
    with paper_style():
        drawn = Figure(figsize=(PAGE_WIDTH, 3.4))
        grid = drawn.subplots(2, len(shown), squeeze=False)
        for axes, (varied, x, label, at) in zip(grid, rows, strict=True):
            for ax, measure in zip(axes, shown, strict=True):
                plot_scores_against(where(table, varied=varied), ax, x=x, measure=measure, hue="model", label=label)
                ax.axvspan(at - 0.4, at + 0.4, color=GRAY, alpha=0.2, linewidth=0, zorder=0, label=SELECTED)
                layer_axis(ax, where(table, varied=varied, model="edited")[x].astype(int))
                ax.set_ylabel("%" if ax is axes[0] else "")
                ax.set_title(measure_named(measure).heading if varied == "depth" else "")
                legend_above(ax, columns=3)
        share_legend(drawn, list(grid.flat))
    return drawn


if __name__ == "__main__":
    run_script(main)
