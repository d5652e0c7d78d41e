"""MEMIT Table 2: the editing methods on CounterFact's measures.

    python -m analyses.papers.table_counterfact [--model tiny] [--requests tiny] [--methods memit,rome@2] [--quick]

All requests are edited at once (by ROME one after another) by each method with the settings that ship with the model,
and what differs is said in its name. Without `--methods`: all of them, and on the tiny model the ways to share out
MEMIT's residual besides. With `--free` texts a case there are GE and RS; RS compares them with running text about
subjects that have the new object. A measure without data is absent. Writes, with 95 % intervals over cases:

- `table_counterfact.csv`: a row a method, S, ES, PS, NS, GE, RS as `mean (half the interval)`; beside them greedy exact
  match, KL at the neighbors from the unedited model (nats), and *left*, the share of the residual at the last edited
  layer that the edit leaves (%);
- `table_counterfact.parquet`: method, layers, measure, mean, low, high, n (cases);
- `table_counterfact.pdf`, `.png`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from tqdm import tqdm

from analyses.common.command import opened, options, run
from analyses.common.experiment import Experiment
from analyses.common.free_text import free_text
from analyses.common.printing import cells
from analyses.common.variants import Variant, named
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
"""What is compared on the tiny model."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Edit, score, draw, write."""
    parser = options(__doc__)
    parser.set_defaults(requests="tiny")
    parser.add_argument("--methods", help="such as memit,rome@5,memit:strategy=sqrt (default: all)")
    parser.add_argument("--free", type=int, help="free texts a case, for GE and RS (default 1; with --quick 0)")
    experiment = opened("table_counterfact", parser, arguments)
    given = experiment.given
    if given.free is None:
        given.free = 0 if experiment.quick else 1
    default = VARIANTS if given.model == "tiny" and not experiment.quick else METHODS
    variants = named(experiment.variants(given.methods.split(",") if given.methods else list(default)))
    table = compared(experiment, variants)
    experiment.write(table, printed(table), score_rows_figure(table, MEASURES))
    return 0


def compared(experiment: Experiment, variants: Mapping[str, Variant]) -> pd.DataFrame:
    """The scores of the unedited model and of every edit."""
    config, references = free_text(experiment)
    frames = []
    for name, variant in tqdm([("unedited", None), *variants.items()], desc="methods", unit="edit"):
        rows = experiment.scored(variant, experiment.requests, config, references=references)
        frames.append(rows.assign(method=name, layers=span(variant.layers) if variant else ""))
    return pd.concat(frames, ignore_index=True).loc[:, ["method", "layers", "measure", "mean", "low", "high", "n"]]


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """A row a method, as the paper prints it."""
    rows = [
        {"method": method, "layers": layers, **cells(own, (*MEASURES, *BESIDE))}
        for (method, layers), own in table.groupby(["method", "layers"], sort=False)
    ]
    held = [name for name in (*MEASURES, *BESIDE) if any(name in row for row in rows)]
    return pd.DataFrame(rows, columns=["method", "layers", *held]).fillna("")


if __name__ == "__main__":
    run(main)
