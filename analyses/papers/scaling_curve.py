"""MEMIT Fig. 5: how the scores of each method fall as more facts are edited at once.

    python -m analyses.papers.scaling_curve [--model tiny] [--requests known] [--count 150] [--methods M] [--quick]

Edited are n = exp(ln N · i/16) of N requests at once, i = 0 … 16 (rounded, each once), by every method with the
settings that ship with the model: MEMIT's λ counts old keys in units of one new fact and is the same for all n. Where n
is less than `--min-records`, the first so many requests are edited in disjoint batches of n, each from the unedited
model, and all are averaged, as in the published code. Scores are on the facts edited. Writes, with 95 % intervals over
cases:

- `scaling_curve.parquet`: edits, method, layers, measure, mean, low, high, n (cases, of all batches);
- `scaling_curve.csv`: the same, one row per edit, as the papers print numbers;
- `scaling_curve_order.csv`: the methods at the largest n, by S;
- `scaling_curve.pdf`, `.png`: S, ES, PS, NS, and GE and RS with `--free`, with the paper's last points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from analyses.common.batches import disjoint_batches, scored_in_batches
from analyses.common.beside import paper_scores
from analyses.common.command import open_experiment, options, run_script
from analyses.common.csv_files import write_csv
from analyses.common.experiment import Experiment
from analyses.common.frames import groups_of
from analyses.common.free_text import OWN, free_text
from analyses.common.printing import format_scores
from analyses.common.variants import Variant, by_name
from mechedit.data import EditRequest
from mechedit.edit import Edit, Factors
from mechedit.figures import scores_figure
from mechedit.methods import SearchConfig
from mechedit.report import span
from mechedit.tables import where

MEASURES = ("S", "ES", "PS", "NS", "GE", OWN, "RS")
"""The panels of the paper's figure."""
BESIDE = ("exact_match", "KL")
"""Further measures in the table."""

QUICK_METHODS = ("memit", "rome", "ft")
RECORDS = 10
"""Records at least that are edited at each number of edits."""
PAPER, PAPER_EDITS = ("memit_table_2", ("GPT-J",)), 10_000.0
"""The curves' last points in the paper, and their number of edits."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Edit more and more, score, draw, write."""
    parser = options(__doc__, count=150, quick_count=8)
    parser.add_argument("--methods", help="such as memit,rome@5,memit:strategy=sqrt (default: all; some with --quick)")
    parser.add_argument("--free", type=int, default=0, help="free texts per case, for GE and RS (default 0, none)")
    parser.add_argument(
        "--min-records", type=int, help=f"edited in batches of fewer (default {RECORDS}; with --quick 1, one batch)"
    )
    experiment = open_experiment("scaling_curve", parser, arguments)
    variants = by_name(experiment.requested_variants(lambda: QUICK_METHODS if experiment.quick else experiment.methods))
    counts = sizes(len(experiment.requests), 4 if experiment.quick else 16)
    records = experiment.arguments.min_records
    if records is None:
        records = 1 if experiment.quick else RECORDS
    table = scaled(experiment, variants, counts, records)
    best_first = order(table)
    write_csv(best_first, experiment.out / f"{experiment.name}_order.csv")
    experiment.write(table, format_table(table), scaling_figure(table))
    print(f"\nby S at {counts[-1]} edits:\n{best_first.to_string(index=False)}")
    return 0


def sizes(most: int, steps: int = 16) -> list[int]:
    """Numbers of edits, exp(ln N · i/steps) for i = 0 … steps, rounded, each once."""
    return sorted({round(math.exp(math.log(most) * i / steps)) for i in range(steps + 1)})


def scaled(
    experiment: Experiment, variants: Mapping[str, Variant], counts: Sequence[int], records: int
) -> pd.DataFrame:
    """The scores of every method on the requests edited n at once, and of the unedited model on the same.

    Args:
        experiment: the requests.
        variants: the methods by name.
        counts: each n.
        records: that are edited at least at each n, in batches.
    """
    free = free_text(experiment)
    edit_of_all = cache(lambda name: experiment.cached_edit(variants[name], experiment.requests))
    frames = []
    for count in tqdm(counts, desc="scaling", unit="size"):
        batches = disjoint_batches(free.requests, count, records)
        makes = {
            name: nested(experiment, variant, partial(edit_of_all, name), batches[0])
            for name, variant in variants.items()
        }
        states = {"unedited": None, **variants}
        frames += [
            rows.assign(edits=count, method=name, layers=span(variants[name].layers) if name in variants else "")
            for name, rows in scored_in_batches(
                experiment, states, batches, free.config, free.references, makes
            ).items()
        ]
    columns = ["edits", "method", "layers", "measure", "mean", "low", "high", "n"]
    return free.named(pd.concat(frames, ignore_index=True)).loc[:, columns]


def nested(
    experiment: Experiment, variant: Variant, edit_of_all: Callable[[], Edit], requests: Sequence[EditRequest]
) -> Callable[[], Edit] | None:
    """For a method that edits one fact after another, how to take its edit of the first requests from that of all.

    So the long search, each fact's on the model edited so far, is made once. None where all are edited at once.
    """
    config = experiment.config(variant)
    if config.shares_targets or not isinstance(config, SearchConfig):
        return None
    return lambda: first(edit_of_all(), len(requests))


def first(edit: Edit, count: int) -> Edit:
    """The first rank-one updates of an edit that has one per request, in their order.

    What the manifest says of the whole, of residuals and of what is left, is not said of the part.
    """
    factors = {
        layer: Factors(left=layer_factors.left[:, :count], right=layer_factors.right[:count])
        for layer, layer_factors in edit.factors.items()
    }
    of_all_requests = ("residuals", "left", "facts", "unconverged", "probability")
    manifest = {name: value for name, value in edit.manifest.items() if name not in of_all_requests}
    return Edit(factors=factors, manifest={**manifest, "requests": list(edit.manifest["requests"])[:count]})


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per edit: each measure with half its interval in brackets."""
    rows = [
        {"edits": edits, "method": method, "layers": layers, **format_scores(scores, (*MEASURES, *BESIDE))}
        for (edits, method, layers), scores in groups_of(table, ["edits", "method", "layers"])
    ]
    return pd.DataFrame(rows)


def order(table: pd.DataFrame) -> pd.DataFrame:
    """The methods at the largest n, best S first, with the other measures; the unedited model is none."""
    rows = where(table, edits=table["edits"].max())
    rows = rows.loc[rows["method"] != "unedited", :]
    means = where(rows, measure="S").sort_values("mean", ascending=False, kind="stable")
    lines = [
        {"place": rank, "method": name, **format_scores(where(rows, method=name), (*MEASURES, *BESIDE))}
        for rank, name in enumerate(means["method"], start=1)
    ]
    return pd.DataFrame(lines)


def scaling_figure(table: pd.DataFrame) -> Figure:
    """One panel per measure; as in the paper, a dashed line for the unedited model, to which NS and GE should keep.

    At its end stand the paper's last points, those of its Table 2.
    """
    unedited = table["method"] == "unedited"
    before = table.loc[unedited & (table["edits"] == table["edits"].max()), :]
    paper = paper_scores(*PAPER)
    of_paper = paper.loc[paper["measure"].isin(table["measure"]) & ~paper["method"].str.startswith("unedited"), :]
    shown = pd.concat(
        [
            table.loc[~unedited, :].astype({"edits": float}),
            before.assign(edits=math.nan),
            of_paper.assign(edits=PAPER_EDITS),
        ]
    )
    return scores_figure(shown, MEASURES, x="edits", log=True, label="facts edited at once")


if __name__ == "__main__":
    run_script(main)
