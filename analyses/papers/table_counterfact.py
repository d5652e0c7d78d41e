"""MEMIT Table 2: the editing methods on CounterFact's measures.

    python -m analyses.papers.table_counterfact [--model tiny] [--requests tiny] [--methods memit,rome@2] [--quick]

All requests are edited at once (by ROME one after another) by each method with the settings that ship with the model,
and what differs is said in its name. Without `--methods`: all of them, and on the tiny model the ways to share out
MEMIT's residual besides. With `--free`, the texts per case, there are GE and RS; RS compares them with running text
about subjects that have the new object. A measure without data is absent. Writes, with 95 % intervals over cases:

- `table_counterfact.csv`: one row per method, S, ES, PS, NS, GE, RS as `mean (half the interval)`; beside them greedy
  exact match, KL at the neighbors from the unedited model (nats), and *left*, the share of the residual at the last
  edited layer that the edit leaves (%);
- `table_counterfact.parquet`: method, layers, measure, mean, low, high, n (cases);
- `table_counterfact.pdf`, `.png`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from tqdm import tqdm

from analyses.common.command import open_experiment, options, run
from analyses.common.experiment import Experiment
from analyses.common.frames import groups_of
from analyses.common.free_text import free_text
from analyses.common.printing import format_scores
from analyses.common.variants import Variant, by_name
from mechedit.figures import score_rows_figure
from mechedit.methods import METHODS
from mechedit.report import span

MEASURES = ("S", "ES", "PS", "NS", "GE", "RS")
"""The columns of the paper's table."""
BESIDE = ("exact_match", "KL", "left")
VARIANTS = (
    *("memit", "memit:strategy=sqrt", "memit:strategy=forward-replay", "memit:strategy=last"),
    *("pmet", "alphaedit", "alphaedit:strategy=forward-replay", "emmet", "emmet@middle"),
    *("rome", "rome:keys=published", "ft", "ft_l", "ft_w"),
)
"""Methods that are compared on the tiny model."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Edit, score, draw, write."""
    parser = options(__doc__)
    parser.set_defaults(requests="tiny")
    parser.add_argument("--methods", help="such as memit,rome@5,memit:strategy=sqrt (default: all)")
    parser.add_argument("--free", type=int, help="free texts per case, for GE and RS (default 1; with --quick 0)")
    experiment = open_experiment("table_counterfact", parser, arguments)
    parsed = experiment.arguments
    if parsed.free is None:
        parsed.free = 0 if experiment.quick else 1
    default = VARIANTS if parsed.model == "tiny" and not experiment.quick else METHODS
    variants = by_name(experiment.variants(parsed.methods.split(",") if parsed.methods else list(default)))
    table = compared(experiment, variants)
    experiment.write(table, format_table(table), score_rows_figure(table, MEASURES))
    return 0


def compared(experiment: Experiment, variants: Mapping[str, Variant]) -> pd.DataFrame:
    """The scores of the unedited model and of every edit."""
    config, references = free_text(experiment)
    frames = []
    for name, variant in tqdm([("unedited", None), *variants.items()], desc="methods", unit="edit"):
        rows = experiment.scored(variant, experiment.requests, config, references=references)
        frames.append(rows.assign(method=name, layers=span(variant.layers) if variant else ""))
    return pd.concat(frames, ignore_index=True).loc[:, ["method", "layers", "measure", "mean", "low", "high", "n"]]


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method, as the paper prints it."""
    rows = [
        {"method": method, "layers": layers, **format_scores(scores, (*MEASURES, *BESIDE))}
        for (method, layers), scores in groups_of(table, ["method", "layers"])
    ]
    measures = [name for name in (*MEASURES, *BESIDE) if any(name in row for row in rows)]
    return pd.DataFrame(rows, columns=["method", "layers", *measures]).fillna("")


if __name__ == "__main__":
    run(main)
