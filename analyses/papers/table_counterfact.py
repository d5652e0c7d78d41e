"""MEMIT Table 2, ROME Tables 4 and 5: the editing methods on CounterFact's measures.

    python -m analyses.papers.table_counterfact [--model tiny] [--requests tiny] [--methods memit,rome@2] [--quick]
    python -m analyses.papers.table_counterfact --protocol single

With `--protocol single`, ROME's, each record is edited alone, from the unedited model, and scored: there are EM, PM and
NM besides, the files are called `table_counterfact_single`, and the paper's rows are those of ROME's tables.

All requests are edited at once (by ROME one after another) by each method with the settings that ship with the model,
and what differs is said in its name. Without `--methods`: all of them, and on the tiny model the ways to share out
MEMIT's residual besides. With `--free`, the texts per case, there are GE and RS; RS compares them with running text
about subjects that have the new object. Records without prompts for free text start it with their reworded ones, which
is called `GE own`. A measure without data is absent. Writes, with 95 % intervals over cases:

- `table_counterfact.csv`: one row per method, S, ES, PS, NS, GE, RS as `mean (half the interval)`; beside them greedy
  exact match, KL at the neighbors from the unedited model (nats), and *left*, the share of the residual at the last
  edited layer that the edit leaves (%); then the rows of the paper, of 10,000 edits of GPT-J and GPT-NeoX;
- `table_counterfact.parquet`: method, layers, measure, mean, low, high, n (cases);
- `table_counterfact.pdf`, `.png`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
from tqdm import tqdm

from analyses.common.alone import scored_alone
from analyses.common.beside import paper_scores, printed_scores, with_paper
from analyses.common.command import open_experiment, options, run_script
from analyses.common.experiment import Experiment
from analyses.common.frames import groups_of
from analyses.common.free_text import OWN, free_text
from analyses.common.printing import format_scores
from analyses.common.variants import Variant, by_name
from mechedit.figures import score_rows_figure
from mechedit.report import span

MEASURES = ("S", "ES", "PS", "NS", "GE", OWN, "RS")
"""The columns of the paper's table."""
BESIDE = ("exact_match", "KL", "left")
PAPERS = {
    "batch": {"memit_table_2": ("GPT-J", "GPT-NeoX")},
    "single": {"rome_table_4": ("GPT-2 XL", "GPT-J"), "rome_table_5": ("GPT-2 Large", "GPT-2 Medium")},
}
"""The papers' own numbers by protocol: tables and models, which stand below this model's."""
SINGLE_MEASURES = ("S", "ES", "EM", "PS", "PM", "NS", "NM", "GE", OWN, "RS")
"""The columns of ROME's tables."""
SINGLE_METHODS = ("rome", "ft", "ft_l", "kn", "mend", "memit")
VARIANTS = (
    *("memit", "memit:strategy=sqrt", "memit:strategy=forward-replay", "memit:strategy=last"),
    *("pmet", "alphaedit", "alphaedit:strategy=forward-replay", "emmet", "emmet@middle"),
    *("rome", "rome:keys=published", "ft", "ft_l", "ft_w", "kn", "mend"),
)
"""Methods that are compared on the tiny model."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Edit, score, draw, write."""
    parser = options(__doc__)
    parser.set_defaults(requests="tiny")
    parser.add_argument("--methods", help="such as memit,rome@5,memit:strategy=sqrt (default: all)")
    parser.add_argument("--free", type=int, help="free texts per case, for GE and RS (default 1; with --quick 0)")
    parser.add_argument("--protocol", default="batch", choices=list(PAPERS), help="all at once, or each record alone")
    experiment = open_experiment("table_counterfact", parser, arguments)
    parsed = experiment.arguments
    single = parsed.protocol == "single"
    if single:
        experiment = replace(experiment, name="table_counterfact_single")
    if parsed.free is None:
        parsed.free = 0 if experiment.quick else 1
    variants = by_name(experiment.requested_variants(lambda: methods(experiment)))
    table = compared(experiment, variants)
    measures = SINGLE_MEASURES if single else MEASURES
    papers = PAPERS[parsed.protocol].items()
    paper = pd.concat([printed_scores(name, models, measures, parsed.protocol) for name, models in papers])
    scores = pd.concat([table, *(paper_scores(name, models, parsed.protocol) for name, models in papers)])
    drawn = [measure for measure in MEASURES if measure in set(table["measure"])]
    experiment.write(table, with_paper(format_table(table, measures), paper), score_rows_figure(scores, drawn))
    return 0


def methods(experiment: Experiment) -> list[str]:
    """What is compared where no methods are named: without MEND where the model has no editor of it."""
    if experiment.arguments.protocol == "single":
        names = SINGLE_METHODS
    elif experiment.arguments.model == "tiny" and not experiment.quick:
        names = VARIANTS
    else:
        names = experiment.methods
    return [name for name in names if name != "mend" or name in experiment.methods]


def compared(experiment: Experiment, variants: Mapping[str, Variant]) -> pd.DataFrame:
    """The scores of the unedited model and of every edit."""
    free = free_text(experiment)
    frames = []
    for name, variant in tqdm([("unedited", None), *variants.items()], desc="methods", unit="edit"):
        if experiment.arguments.protocol == "single":
            rows = scored_alone(
                experiment, variant, free.requests, "counterfact", evaluation=free.config, references=free.references
            )
        else:
            rows = experiment.scored(variant, free.requests, free.config, references=free.references)
        frames.append(rows.assign(method=name, layers=span(variant.layers) if variant else ""))
    columns = ["method", "layers", "measure", "mean", "low", "high", "n"]
    return free.named(pd.concat(frames, ignore_index=True)).loc[:, columns]


def format_table(table: pd.DataFrame, measures: Sequence[str] = MEASURES) -> pd.DataFrame:
    """One row per method, as the paper prints it."""
    rows = [
        {"method": method, "layers": layers, **format_scores(scores, (*measures, *BESIDE))}
        for (method, layers), scores in groups_of(table, ["method", "layers"])
    ]
    present = [name for name in (*measures, *BESIDE) if any(name in row for row in rows)]
    return pd.DataFrame(rows, columns=["method", "layers", *present]).fillna("")


if __name__ == "__main__":
    run_script(main)
