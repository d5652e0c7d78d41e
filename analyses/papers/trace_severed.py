"""MEMIT Fig. 3: what states at the subject's last token give back, whole and severed, and the layers that follow.

    python -m analyses.papers.trace_severed [--model tiny] [--facts known] [--out papers] [--quick]

AIE of each layer's state at the subject's last token, with nothing, the MLPs or the attention at that token severed;
from them the gap, AIE(l) − AIE_mlp-severed(l), and what the MLP of each layer contributes to it, gap(l − 1) − gap(l);
and the range that each rule selects, with its stability. Writes, beside the trace in `selection/`:

- `trace_severed.csv`: one row per layer, in percent of probability, with 95 % intervals over facts;
- `trace_severed_rules.csv`: one row per rule, the one that chose first;
- `trace_severed.parquet`: the numbers of both figures, one row per layer and measure;
- `trace_severed.pdf`, `.png`.

The exit code is 3 where the facts show no early site: no layers are selected then, and the figure shows why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analyses.common.command import open_experiment, options, run_script
from analyses.common.csv_files import write_csv
from analyses.common.experiment import Experiment
from mechedit.figures import PAGE_WIDTH, paper_style, plot_selection, plot_severed
from mechedit.report import span
from mechedit.selection import Selection

SEVERINGS = {"state": "nothing", "mlp_severed": "mlp", "attn_severed": "attn"}
"""Names in the selection's evidence, and the severing under which the effect of a state is meant."""
MEASURES = (*SEVERINGS, "gap", "contribution")


def main(arguments: Sequence[str] | None = None) -> int:
    """Trace, select, draw, write."""
    experiment = open_experiment("trace_severed", options(__doc__), arguments)
    experiment.trace()
    selection = experiment.select()
    write_rules(experiment, selection)
    experiment.write(tidy(selection), format_table(selection), severed_figure(selection))
    print(sentence(selection))
    return 0 if selection.layers else 3


def tidy(selection: Selection) -> pd.DataFrame:
    """The evidence as rows layer, measure, mean, low, high (parts of probability).

    `membership`, the share of resamples of the facts that choose the layer, has no interval.
    """
    rows: list[dict[str, Any]] = []
    for record in selection.evidence:
        for name in MEASURES:
            ends = {end: getattr(record, f"{name}_{end}") for end in ("low", "high")}
            rows.append({"layer": record.layer, "measure": name, "mean": getattr(record, name), **ends})
        rows.append({"layer": record.layer, "measure": "membership", "mean": record.membership})
    return pd.DataFrame(rows, columns=["layer", "measure", "mean", "low", "high"]).astype({"low": float, "high": float})


def format_table(selection: Selection) -> pd.DataFrame:
    """One row per layer, everything in percent: each measure with its interval, membership, whether it is chosen."""
    rows: list[dict[str, Any]] = []
    for record in selection.evidence:
        numbers = {
            name: getattr(record, name)
            for measure in MEASURES
            for name in (measure, f"{measure}_low", f"{measure}_high")
        }
        percent = {name: round(100 * value, 2) + 0.0 for name, value in numbers.items()}  # not −0.0
        chosen = {"membership": round(100 * record.membership, 1), "chosen": record.layer in selection.layers}
        rows.append({"layer": record.layer, **percent, **chosen})
    return pd.DataFrame(rows)


def write_rules(experiment: Experiment, selection: Selection) -> None:
    """Leave the range of each rule, the one that chose first, with the share of resamples that give the same."""
    names = [selection.rule, *(name for name in selection.rules if name != selection.rule)]
    rows: list[dict[str, Any]] = []
    for name in names:
        rule = selection.rules[name]
        stability = round(100 * rule.stability, 1)
        rows.append({"rule": name, "layers": span(rule.layers), "stability": stability, "modal": span(rule.modal)})
    write_csv(pd.DataFrame(rows), experiment.out / f"{experiment.name}_rules.csv")


def severed_figure(selection: Selection) -> Figure:
    """The bars of MEMIT Fig. 3, and beside them the gap that they show, its parts by layer and the ranges."""
    with paper_style():
        figure = Figure(figsize=(PAGE_WIDTH, 2.7))
        bar_axes, gap_axes = figure.subplots(1, 2)
        plot_severed(bars(selection), bar_axes, selection.layers)
        plot_selection(selection.plain(), gap_axes)
    return figure


def bars(selection: Selection) -> pd.DataFrame:
    """The effects of states in the form of `average_effects`, so that bars have the intervals that the table has."""
    effects = tidy(selection)
    effects = effects.loc[effects["measure"].isin(list(SEVERINGS))]
    where = {"kind": "state", "role": "subject_last", "metric": selection.metric}
    return effects.assign(sever=effects["measure"].map(SEVERINGS), **where)


def sentence(selection: Selection) -> str:
    """The selected layers and the reason, or why none are selected."""
    on = f"{selection.n_facts} facts"
    if not selection.layers:
        return f"no layers are selected from {on}: {selection.reason}"
    return f"{selection.reason} ({on}; {selection.stability:.1%} of their bootstrap resamples give this range)"


if __name__ == "__main__":
    run_script(main)
