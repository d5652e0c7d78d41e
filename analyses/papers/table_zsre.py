"""MEMIT Table 1: the editing methods by zsRE's measures.

    python -m analyses.papers.table_zsre [--model MODEL] [--requests zsre] [--methods memit,rome@5,ft_w@5]

All requests are edited at once, and each answer's tokens are asked for one by one, the true ones before them (MEMIT
Appendix C.1): efficacy on the edit's prompts, paraphrase on reworded ones, specificity on facts that were not edited,
each with its own answer; the score is their harmonic mean. Requests that are no zsRE serve as well: their neighbors
stand for its unrelated facts. Writes table_zsre.parquet (one row per method and measure), table_zsre.csv (as the paper
prints it, with greedy exact match, the strict form of efficacy, at the end) and the figure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext

import pandas as pd
from tqdm import tqdm

from analyses.common.command import open_experiment, options, run
from analyses.common.experiment import Experiment
from analyses.common.printing import score_frame
from analyses.common.variants import Variant
from mechedit.cli import parse_names
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
METHODS = {"tiny": "ft_w@2,rome@2,memit"}
"""By model: fine-tuning and ROME write into one layer, which the papers chose by trying."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Edit by every method, score by zsRE's protocol, write."""
    parser = options(__doc__)
    parser.set_defaults(requests="tiny")
    parser.add_argument("--methods", help=f"such as memit,rome@5 (default memit; for the tiny model {METHODS['tiny']})")
    experiment = open_experiment("table_zsre", parser, arguments)
    names = experiment.arguments.methods or METHODS.get(experiment.arguments.model, "memit")
    variants = [None, *(Variant.parse(text, experiment.layers) for text in parse_names(names))]
    rows = [scored(experiment, variant) for variant in tqdm(variants, desc="methods", unit="edit")]
    table = pd.concat(rows, ignore_index=True)
    experiment.write(table, format_table(table), score_rows_figure(table, tuple(COLUMNS)[:4]))


def scored(experiment: Experiment, variant: Variant | None) -> pd.DataFrame:
    """`method, measure, mean, low, high, n` of one method, or of the unedited model."""
    key = {
        **experiment.key(experiment.requests),
        "variant": None if variant is None else experiment.variant_key(variant),
        "evaluation": {"protocol": "zsre", **dataclasses.asdict(QUICK)},
    }
    scores = experiment.cached("scores", key, lambda: _score(experiment, variant))
    return scores.assign(method="unedited" if variant is None else variant.name)


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
    """A mean and half its interval."""
    return f"{entry['mean']:.1f} (±{(entry['high'] - entry['low']) / 2:.1f})"


if __name__ == "__main__":
    run(main)
