"""ROME Figs. 1–3 and 7, MEMIT Fig. 8: which states and modules carry a fact, for one fact and on average.

    python -m analyses.papers.trace_average [--model tiny] [--facts known] [--out papers] [--quick]

Every prompt token of every fact is traced at every layer: single states, windows of MLP outputs and windows of
attention outputs, and states at the subject's last token also with the MLPs or the attention at that token severed.
Writes, beside the trace in `trace/`:

- `trace_average.csv`: one row per kind and role, with the largest AIE, the layer where it is (of a window: its
  center) and its 95 % interval over facts there, in percent of probability, beside the ATE that it is a part of;
  and below them ROME's numbers for GPT-2 XL;
- `trace_average_facts.csv`: one row per fact: whether it was traced, and why not;
- `trace_average.parquet`: the AIE of every kind, severing, role and layer;
- `trace_average.pdf`, `.png`: AIE by role and layer (ROME Fig. 2, MEMIT Fig. 8); and likewise
  `trace_average_fact`: one fact, token by token (ROME Fig. 1e–g); by default the one that the corruption hurts most;
  `trace_average_severed`: AIE at the subject's last token, whole and severed (ROME Fig. 3c);
  `trace_average_lines`: AIE by layer with 95 % bands over facts (ROME Fig. 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analyses.common.beside import paper_name, with_paper
from analyses.common.command import open_experiment, options, run_script
from analyses.common.csv_files import write_csv
from analyses.common.experiment import Experiment
from analyses.common.frames import records
from mechedit import pipeline
from mechedit.figures import (
    PAGE_WIDTH,
    draw,
    fact_figure,
    lines_figure,
    paper_style,
    plot_severed,
    roles_figure,
    save_figure,
)
from mechedit.published import published_table
from mechedit.run_folder import RunFolder
from mechedit.tables import read_table, where
from mechedit.trace import (
    KIND_LABELS,
    ROLE_LABELS,
    TraceConfig,
    average_effects,
    clearest_fact,
    sever_in_words,
    total_effects,
)

MAX_FACTS = 100
"""Every token of every fact is traced, which takes longer than the selection's trace."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Trace, average, draw, write."""
    parser = options(__doc__, max_facts=MAX_FACTS)
    parser.add_argument("--fact", help="id of the fact to draw token by token (default: the one hurt most)")
    experiment = open_experiment("trace_average", parser, arguments)
    folder = traced(experiment)
    averages, total = average_effects(folder / "effects.parquet"), total_effects(folder / "effects.parquet")
    figures = {
        "fact": one_fact(folder, experiment.arguments.fact),
        "severed": draw(partial(plot_severed, averages), width=PAGE_WIDTH),
        "lines": lines_figure(averages),
    }
    for name, figure in figures.items():
        save_figure(figure, experiment.out, f"{experiment.name}_{name}")
    write_facts(experiment, folder)
    printed = with_paper(format_table(averages, total), paper_table())
    experiment.write(averages, printed, roles_figure(averages))


def traced(experiment: Experiment) -> Path:
    """Trace everything into `trace/`, once for the same input, and return that folder."""
    folder = RunFolder.at(experiment.out / "trace", overwrite=experiment.arguments.overwrite)
    config = TraceConfig(sever=("nothing", "mlp", "attn"), samples=experiment.samples, seed=experiment.seed)
    pipeline.trace_step(folder, experiment.model, experiment.facts, config)
    return folder.path


def format_table(averages: pd.DataFrame, total: pd.DataFrame) -> pd.DataFrame:
    """The largest AIE of each kind, severing and role, beside the ATE, all in percent of probability."""
    best = averages.loc[averages.groupby(["kind", "sever", "role"], sort=False)["mean"].idxmax()]
    table = pd.DataFrame({"kind": best["kind"].map(KIND_LABELS), "severed": best["sever"].map(sever_in_words)})
    table["role"] = best["role"].map(ROLE_LABELS)
    table["layer"], table["facts"] = best["layer"], best["facts"]
    for name, column in (("AIE", "mean"), ("low", "low"), ("high", "high")):
        table[name] = (100 * best[column]).round(1) + 0.0  # not −0.0
    for name in ("total", "total_low", "total_high"):
        table[name.replace("total", "ATE")] = round(100 * float(total[name].iloc[0]), 1)
    return table.reset_index(drop=True)


def paper_table() -> pd.DataFrame:
    """ROME's numbers in the same columns: the largest AIE by kind and role, in percent of probability."""
    table = published_table("rome_tracing")
    numbers = table.set_index("quantity")["value"]
    rows = []
    for row in records(table.loc[table["kind"].notna(), :]):
        effect = row["value"] - (numbers["corrupted"] if row["quantity"] == "score" else 0)
        rows.append(
            {
                "kind": paper_name(KIND_LABELS[row["kind"]], row["model"]),
                "severed": sever_in_words("nothing"),
                "role": ROLE_LABELS[row["role"]],
                "layer": "" if pd.isna(row["layer"]) else int(row["layer"]),
                "AIE": round(effect, 1),
                "ATE": numbers["ATE"],
            }
        )
    return pd.DataFrame(rows)


def one_fact(folder: Path, name: str | None) -> Figure:
    """The heatmaps of one fact, and over them what its object is and how probable, clean and corrupted."""
    name = name or clearest_fact(folder / "effects.parquet")
    figure = fact_figure(read_table(folder / "effects.parquet", fact=name), name)
    fact = read_table(folder / "facts.parquet", id=name).iloc[0]
    text = f"P({fact['object'].strip()}): {fact['clean']:.1%} clean, {fact['corrupted']:.1%} corrupted"
    with paper_style():
        figure.suptitle(text, fontsize="medium", parse_math=False)
    return figure


def write_facts(experiment: Experiment, folder: Path) -> None:
    """Leave and count the facts traced and dropped."""
    facts = read_table(folder / "facts.parquet")
    write_csv(facts, experiment.out / f"{experiment.name}_facts.csv")
    dropped = where(facts, traced=False)
    print(f"{len(facts) - len(dropped)} facts traced, {len(dropped)} dropped")
    for fact, reason in zip(dropped["id"], dropped["reason"], strict=True):
        print(f"  {fact}: {reason}")


if __name__ == "__main__":
    run_script(main)
