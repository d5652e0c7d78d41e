"""MEMIT Table 1, ROME Tables 1 and 6: the editing methods by zsRE's measures.

    python -m analyses.papers.table_zsre [--model MODEL] [--requests zsre] [--methods memit,rome@5,ft_w@5]
    python -m analyses.papers.table_zsre --protocol single

All requests are edited at once, and each answer's tokens are asked for one by one, the true ones before them (MEMIT
Appendix C.1): efficacy on the edit's prompts, paraphrase on reworded ones, specificity on facts that were not edited,
each with its own answer; the score is their harmonic mean. Requests that are no zsRE serve as well: their neighbors
stand for its unrelated facts. With `--protocol single`, ROME's, each record is edited alone, from the unedited model;
the files are then called `table_zsre_single`. Writes table_zsre.parquet (one row per method and measure),
table_zsre.csv (as the paper prints it, with greedy exact match, the strict form of efficacy, at the end, and with the
rows of the papers below) and the figure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import pandas as pd
from tqdm import tqdm

from analyses.common.alone import scored_alone
from analyses.common.beside import paper_scores, with_paper
from analyses.common.command import open_experiment, options, run_script
from analyses.common.experiment import Experiment
from analyses.common.printing import score_frame
from analyses.common.variants import Variant
from mechedit.edit import edited
from mechedit.evaluation import QUICK, evaluate_zsre
from mechedit.figures import score_rows_figure

COLUMNS = {
    "S": "Score",
    "efficacy": "Efficacy",
    "paraphrase": "Paraphrase",
    "specificity": "Specificity",
    "exact_match": "Exact match",
}
PAPERS = {
    "batch": {"memit_table_1": ("GPT-J",)},
    "single": {"rome_table_1": ("GPT-2 XL",), "rome_table_6": ("GPT-2 Large", "GPT-2 Medium")},
}
"""The papers' own numbers by protocol: tables and models, which stand below this model's."""
METHODS = {
    "batch": ("ft_w", "mend", "rome", "memit"),
    "single": ("ft", "ft_l", "mend", "rome"),
}
"""By protocol, those of the papers' tables."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Edit by every method, score by zsRE's protocol, write."""
    parser = options(__doc__)
    parser.set_defaults(requests="tiny")
    parser.add_argument("--methods", help="such as memit,rome@5 (default the papers', mend where it has an editor)")
    parser.add_argument("--protocol", default="batch", choices=list(PAPERS), help="all at once, or each record alone")
    experiment = open_experiment("table_zsre", parser, arguments)
    protocol = experiment.arguments.protocol
    if protocol == "single":
        experiment = dataclasses.replace(experiment, name="table_zsre_single")
    papers = METHODS[protocol]
    variants = [None, *experiment.requested_variants(lambda: [name for name in papers if name in experiment.methods])]
    rows = [scored(experiment, variant) for variant in tqdm(variants, desc="methods", unit="edit")]
    table = pd.concat(rows, ignore_index=True)
    paper = pd.concat([paper_scores(name, models, protocol) for name, models in PAPERS[protocol].items()])
    printed = with_paper(format_table(table), format_table(paper))
    experiment.write(table, printed, score_rows_figure(pd.concat([table, paper]), tuple(COLUMNS)[:4]))


def scored(experiment: Experiment, variant: Variant | None) -> pd.DataFrame:
    """`method, measure, mean, low, high, n` of one method, or of the unedited model."""
    name = "unedited" if variant is None else variant.name
    if experiment.arguments.protocol == "single":
        return scored_alone(experiment, variant, experiment.requests, "zsre").assign(method=name)
    key = {
        **experiment.key(experiment.requests),
        "variant": None if variant is None else experiment.variant_key(variant),
        "evaluation": {"protocol": "zsre", **dataclasses.asdict(QUICK)},
    }
    scores = experiment.cached("scores", key, lambda: _score(experiment, variant))
    return scores.assign(method=name)


def _score(experiment: Experiment, variant: Variant | None) -> pd.DataFrame:
    edit = experiment.edit(variant, experiment.requests) if variant else None
    with edited(experiment.model, edit) if edit else nullcontext():
        return score_frame(evaluate_zsre(experiment.model, experiment.requests, QUICK).summary())


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method: Score, Efficacy, Paraphrase and Specificity with half their intervals."""
    rows = []
    for method, scores in table.groupby("method", sort=False):
        entries = scores.set_index("measure")
        cells = {name: _cell(entries.loc[measure]) for measure, name in COLUMNS.items() if measure in entries.index}
        rows.append({"Editor": method, **cells})
    return pd.DataFrame(rows)


def _cell(entry: pd.Series) -> str:
    """A mean and half its interval, where it has one."""
    mean, low, high = entry.loc[["mean", "low", "high"]].to_numpy(dtype=float)
    return f"{mean:.1f}" + ("" if np.isnan(low) else f" (±{(high - low) / 2:.1f})")


if __name__ == "__main__":
    run_script(main)
