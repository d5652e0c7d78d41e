"""MEMIT Fig. 6: how well each relation's facts are edited, and what generalization costs in specificity.

    python -m analyses.papers.relations [--model MODEL] [--requests FILE] [--per-relation 300] [--methods memit,ft_w]

As many facts of each relation are edited at once, each relation from the unedited model, and scored. The mark
`all mixed` is an edit of as many facts of all relations in turn. Writes relations.parquet (one row per method, relation
and measure), relations.csv, and the figure: S by relation, and for each method NS against PS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from analyses.common.categories import by_relation, mixed
from analyses.common.command import open_experiment, options, run_script
from analyses.common.experiment import Experiment
from analyses.common.frames import groups_of
from analyses.common.printing import format_interval
from analyses.common.variants import Variant
from analyses.plots.groups import plot_groups, plot_tradeoff
from mechedit.data import EditRequest
from mechedit.errors import InputError
from mechedit.figures import PAGE_WIDTH, paper_style
from mechedit.tables import where

MIXED = "all mixed"
MEASURES = ("S", "ES", "PS", "NS")
METHODS = ("memit", "ft_w", "mend")
"""Those of the paper's figure."""
SIZE = 30
QUICK_RELATIONS, QUICK_SIZE = 4, 4
"""Relations, and facts per relation, that `--quick` edits."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Edit every relation by every method, score, write."""
    parser = options(__doc__, quick_count=None)
    parser.add_argument("--per-relation", type=int, help=f"facts edited at once (default {SIZE}; the paper: 300)")
    parser.add_argument("--methods", help="such as memit,rome@2 (default memit, ft_w, and mend where it has an editor)")
    experiment = open_experiment("relations", parser, arguments)
    groups = chosen(experiment)
    variants = experiment.requested_variants(lambda: [name for name in METHODS if name in experiment.methods])
    rows = [scored(experiment, variant, groups) for variant in (None, *variants)]
    table = pd.concat(rows, ignore_index=True)
    experiment.write(table, format_table(table), figure(table))


def chosen(experiment: Experiment) -> dict[str, list[EditRequest]]:
    """Equally many requests of each relation that has enough, and as many of all relations in turn.

    Raises:
        InputError: no relation has enough.
    """
    size = experiment.arguments.per_relation
    if size is None:
        size = QUICK_SIZE if experiment.quick else SIZE
    groups = by_relation(experiment.requests, seed=experiment.seed)
    enough = {name: group[:size] for name, group in groups.items() if len(group) >= size}
    if not enough:
        most = max((len(group) for group in groups.values()), default=0)
        raise InputError(
            f"no relation has {size} requests, the largest has {most}; ask for fewer by --per-relation, "
            f"and check that the requests name their relations"
        )
    if too_small := [name for name in groups if name not in enough]:
        print(f"left out, with fewer than {size} requests: {', '.join(too_small)}")
    if experiment.quick:
        enough = dict(list(enough.items())[:QUICK_RELATIONS])
    return {**enough, MIXED: mixed(enough, size)}


def scored(
    experiment: Experiment, variant: Variant | None, groups: Mapping[str, Sequence[EditRequest]]
) -> pd.DataFrame:
    """`method, relation, measure, mean, low, high, n` of one method, or of the unedited model."""
    method = "unedited" if variant is None else variant.name
    rows = [
        experiment.scored(variant, requests).assign(method=method, relation=name) for name, requests in groups.items()
    ]
    columns = ["method", "relation", "measure", "mean", "low", "high", "n"]
    return pd.concat(rows, ignore_index=True).loc[:, columns]


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method and relation: the scores with half their intervals, the best S first within a method."""
    rows = []
    for (method, relation), scores in groups_of(table, ["method", "relation"]):
        entries = scores.set_index("measure")
        rows_by_measure = {m: entries.loc[m] for m in MEASURES if m in entries.index}
        cells = {m: format_interval(e["mean"], e["low"], e["high"]) for m, e in rows_by_measure.items()}
        order = -float(rows_by_measure["S"]["mean"]) if "S" in rows_by_measure else 1.0
        rows.append(
            {"method": method, "relation": relation, "n": int(scores["n"].to_numpy().max()), **cells, "order": order}
        )
    frame = pd.DataFrame(rows)
    methods = list(dict.fromkeys(frame["method"]))
    places = [methods.index(method) for method in frame["method"]]
    frame = frame.assign(place=places).sort_values(["place", "order"], kind="stable")
    return frame.drop(columns=["place", "order"]).reset_index(drop=True)


def figure(table: pd.DataFrame) -> Figure:
    """S of each relation by each method; and for each method, NS against PS."""
    edits = table.loc[table["method"] != "unedited", :]
    methods = list(dict.fromkeys(edits["method"]))
    columns = min(3, 1 + len(methods))
    rows = -(-(1 + len(methods)) // columns)
    with paper_style():
        drawn = Figure(figsize=(PAGE_WIDTH, 2.6 * rows))
        first, *others = drawn.subplots(rows, columns, squeeze=False).flat
        plot_groups(edits, first, by="relation", reference=MIXED)
        for ax in others[len(methods) :]:
            ax.remove()
        for method, ax in zip(methods, others, strict=False):
            ax.set_title(method)
            plot_tradeoff(where(edits, method=method), ax, by="relation", reference=MIXED)
    return drawn


if __name__ == "__main__":
    run_script(main)
