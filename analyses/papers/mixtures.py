"""MEMIT Fig. 7 and 10: facts of two relations edited together, against the mean of either alone.

    python -m analyses.papers.mixtures [--model MODEL] [--requests FILE] [--edits 100,300,700] [--pairs both=P27+P937]

Four cases: the two relations have the same type of subjects, of objects, of both or of neither; `categories.py` has
the rule by which pairs are found where none is given and the paper's are not in the file. For each case and number
of edits three edits are made of the unedited model: as many facts of either relation, and half of them of each. As in
the paper that is done ten times with facts drawn anew, and the intervals are of 90 %, of the mean over the draws; with
`--draws 1` they are of 95 %, over the requests of the one draw. Writes mixtures.parquet, mixtures.csv (mixture, mean of
the two, and their difference with its interval), the figure (S), and mixtures_detail (ES, PS, NS).
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from analyses.common.categories import SAME, Pair, by_relation, find_pairs
from analyses.common.command import open_experiment, options, run_script
from analyses.common.experiment import Experiment
from analyses.common.frames import groups_of, records
from analyses.common.printing import format_interval
from analyses.common.variants import Variant
from analyses.plots.mixtures import plot_mixture
from mechedit.cli import parse_names
from mechedit.data import EditRequest
from mechedit.errors import InputError
from mechedit.figures import PAGE_WIDTH, paper_style, save_figure, share_legend
from mechedit.statistics import bootstrap_means, harmonic_mean, percentile_interval
from mechedit.tables import where

MEASURES = ("ES", "PS", "NS")
SCORES = ("S", *MEASURES)
PARTS = ("first", "second", "mean", "mixture", "difference")
TITLES = {
    "neither": "subjects and objects differ",
    "subjects": "same type of subjects",
    "objects": "same type of objects",
    "both": "same subjects and objects",
}
EDITS, QUICK_EDITS = "4,8,16,32", "2,4"
"""Facts edited at once, by default and with `--quick`."""
RESAMPLES = 2000
DRAWS = 10
"""Draws of facts, as in the paper."""
CONFIDENCE = 0.9
"""Coverage of the intervals over draws, as in the paper."""
Cases = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]
"""`case, measure, value` in percent: of either relation edited alone, and of the mixture."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Edit every pair apart and together, compare, write."""
    parser = options(__doc__, quick_count=None)
    parser.add_argument("--edits", help=f"facts edited at once (default {EDITS}; the paper: up to 700)")
    parser.add_argument("--pairs", default="", help="relations to use, such as neither=P27+P37,both=P27+P937")
    parser.add_argument("--method", default="memit")
    parser.add_argument("--draws", type=int, help=f"times that facts are drawn (default {DRAWS}; with --quick 1)")
    experiment = open_experiment("mixtures", parser, arguments)
    text, draws = experiment.arguments.edits, parse_draws(experiment)
    edits = parse_edits((QUICK_EDITS if experiment.quick else EDITS) if text is None else text)
    pairs = found_pairs(experiment, edits)
    variant = experiment.variant(experiment.arguments.method)
    table = pd.concat([compared(experiment, variant, pair, edits, draws) for pair in pairs], ignore_index=True)
    save_figure(detail(table), experiment.out, "mixtures_detail")
    experiment.write(table, format_table(table), overview(table))


def parse_edits(text: str) -> list[int]:
    """Even numbers between commas, in order.

    Raises:
        InputError: anything else.
    """
    names = parse_names(text)
    if not all(name.isdecimal() and int(name) > 0 and int(name) % 2 == 0 for name in names):
        raise InputError(
            f"--edits {text!r} cannot be read, expected even numbers such as 8,16: half are of each relation"
        )
    return sorted({int(name) for name in names})


def parse_pairs(text: str) -> dict[str, tuple[str, str]]:
    """`case=relation+relation` between commas.

    Raises:
        InputError: anything else.
    """
    pairs: dict[str, tuple[str, str]] = {}
    for part in filter(None, parse_names(text)):
        same, equals, relations = part.partition("=")
        names = relations.split("+")
        if not equals or len(names) != 2 or not all(names):
            raise InputError(f"--pairs {part!r} cannot be read, expected such as neither=P27+P37")
        pairs[same] = (names[0], names[1])
    return pairs


def parse_draws(experiment: Experiment) -> int:
    """How often facts are drawn."""
    draws = experiment.arguments.draws
    return (1 if experiment.quick else DRAWS) if draws is None else draws


def found_pairs(experiment: Experiment, edits: Sequence[int]) -> list[Pair]:
    """The pairs of the four cases that allow the smallest number of edits; says which were found, and how.

    Raises:
        InputError: none is.
    """
    groups = by_relation(experiment.requests, seed=experiment.seed)
    pairs = find_pairs(groups, parse_pairs(experiment.arguments.pairs), least=edits[0])
    if not pairs:
        raise InputError(
            f"no two of the relations {', '.join(groups) or '(none)'} have {edits[0]} requests each; ask for fewer "
            f"edits, and check that the requests name their relations"
        )
    for same in SAME:
        pair = pairs.get(same)
        print(f"{same}: " + (f"{' and '.join(pair.names)} ({pair.rule}), {pair.size} of each" if pair else "no pair"))
        if pair and pair.size < edits[-1]:
            print(f"  left out: {', '.join(str(n) for n in edits if n > pair.size)} edits")
    return [pairs[same] for same in SAME if same in pairs]


def compared(experiment: Experiment, variant: Variant, pair: Pair, edits: Sequence[int], draws: int) -> pd.DataFrame:
    """`same, first_relation, second_relation, rule, edits, draws, measure, part, mean, low, high` of one pair."""
    possible = [n for n in edits if n <= pair.size]
    orders = [drawn(pair, f"{experiment.seed}/{draw}" if draw else None) for draw in range(draws)]
    chosen = {request.id: request for order in orders for part in order for request in part[: possible[-1]]}
    experiment.search(variant, list(chosen.values()))
    about = {"same": pair.same, "first_relation": pair.names[0], "second_relation": pair.names[1], "rule": pair.rule}
    tables = []
    for n in possible:
        cases = [edited_cases(experiment, variant, order, n) for order in orders]
        comparison = compare(*cases[0], seed=experiment.seed) if draws == 1 else compare_draws(cases)
        tables.append(comparison.assign(**about, edits=n, draws=draws))
    return pd.concat(tables, ignore_index=True)


def drawn(pair: Pair, seed: str | None) -> tuple[list[EditRequest], list[EditRequest]]:
    """The requests of a pair's two relations, shuffled by a seed; without one, in the order in which they stand."""
    first, second = (list(requests) for requests in pair.requests)
    if seed is not None:
        for name, requests in zip(pair.names, (first, second), strict=True):
            random.Random(f"{seed}/{name}").shuffle(requests)
    return first, second


def edited_cases(
    experiment: Experiment, variant: Variant, requests: tuple[list[EditRequest], list[EditRequest]], n: int
) -> Cases:
    """The scores of n requests of either relation edited alone, and of a mixture of half of each."""
    first, second = requests[0][:n], requests[1][:n]
    mixture = [*first[: n // 2], *second[: n // 2]]
    alone = [experiment.cases(variant, part) for part in (first, second)]
    return alone[0], alone[1], experiment.cases(variant, mixture)


def compare_draws(draws: Sequence[Cases], *, confidence: float = CONFIDENCE) -> pd.DataFrame:
    """As `compare`, of several draws: the mean over draws x̄ with Student's interval x̄ ± t s / √draws.

    Facts that several draws have in common make it narrower than one over new facts would be.
    """
    wide = [[_means(part, mixture) for part in (first, second)] for first, second, mixture in draws]
    rows = []
    for measure in SCORES:
        parts = _parts(np.vstack([first for first, _ in wide]), np.vstack([second for _, second in wide]), measure)
        for part in PARTS:
            mean, spread = float(parts[part].mean()), float(parts[part].std(ddof=1))
            half = float(student_t.ppf((1 + confidence) / 2, len(draws) - 1)) * spread / len(draws) ** 0.5
            rows.append((measure, part, mean, mean - half, mean + half))
    return pd.DataFrame(rows, columns=["measure", "part", "mean", "low", "high"])


def compare(
    first: pd.DataFrame, second: pd.DataFrame, mixture: pd.DataFrame, *, seed: int, resamples: int = RESAMPLES
) -> pd.DataFrame:
    """The mixture's scores, the mean of the two relations', and what the mixture has more.

    The intervals resample the requests of each relation; those that are also in the mixture are drawn together with
    their values there, and the mixture's two halves weigh alike.

    Args:
        first: `case, measure, value` in percent, of the first relation edited alone.
        second: of the other.
        mixture: of the mixture, whose cases are some of both.
        seed: of the bootstrap.
        resamples: how many.

    Returns:
        `measure, part, mean, low, high` with the parts first, second, mean, mixture and difference.
    """
    draws = (_draws(first, mixture, seed, resamples), _draws(second, mixture, seed + 1, resamples))
    means = (_means(first, mixture), _means(second, mixture))
    rows = []
    for measure in SCORES:
        parts, at = _parts(*draws, measure), _parts(*means, measure)
        for part in PARTS:
            low, high = percentile_interval(parts[part][:, None])
            rows.append((measure, part, float(at[part][0]), float(low[0]), float(high[0])))
    return pd.DataFrame(rows, columns=["measure", "part", "mean", "low", "high"])


def _draws(
    alone: pd.DataFrame, mixture: pd.DataFrame, seed: int, resamples: int
) -> Float[np.ndarray, "resample column"]:
    return bootstrap_means(_joint(alone, mixture), seed=seed, resamples=resamples)


def _means(alone: pd.DataFrame, mixture: pd.DataFrame) -> Float[np.ndarray, "one column"]:
    return np.nanmean(_joint(alone, mixture), axis=0, keepdims=True)


def _joint(alone: pd.DataFrame, mixture: pd.DataFrame) -> Float[np.ndarray, "case column"]:
    """ES, PS, NS of a relation's cases edited alone, then in the mixture; NaN for cases that the mixture lacks."""
    wide = [
        frame.pivot(index="case", columns="measure", values="value").reindex(columns=list(MEASURES))
        for frame in (alone, mixture)
    ]
    return np.hstack([wide[0].to_numpy(dtype=float), wide[1].reindex(wide[0].index).to_numpy(dtype=float)])


def _parts(
    first: Float[np.ndarray, "row column"], second: Float[np.ndarray, "row column"], measure: str
) -> Mapping[str, Float[np.ndarray, " row"]]:
    """One measure of either relation and of the mixture, from means of ES, PS, NS alone and in the mixture."""
    width = len(MEASURES)
    alone = [_score(means[:, :width], measure) for means in (first, second)]
    mixture = _score((first[:, width:] + second[:, width:]) / 2, measure)
    mean = (alone[0] + alone[1]) / 2
    return dict(zip(PARTS, (*alone, mean, mixture, mixture - mean), strict=True))


def _score(means: Float[np.ndarray, "row measure"], measure: str) -> Float[np.ndarray, " row"]:
    return harmonic_mean(means) if measure == "S" else means[:, MEASURES.index(measure)]


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per case, number of edits and measure; the difference with the ends of its interval."""
    rows = []
    keys = ["same", "first_relation", "second_relation", "edits", "measure"]
    for values, rows_of_pair in groups_of(table, keys):
        parts = {row["part"]: row for row in records(rows_of_pair)}
        cells = {part: format_interval(*_ends(parts[part])) for part in PARTS[:-1]}
        mean, low, high = _ends(parts["difference"])
        cells |= {"difference": f"{mean:+.1f}", "low": f"{low:+.1f}", "high": f"{high:+.1f}"}
        rows.append({**dict(zip(keys, values, strict=True)), **cells})
    return pd.DataFrame(rows)


def _ends(row: Mapping[str, Any]) -> tuple[float, float, float]:
    return float(row["mean"]), float(row["low"]), float(row["high"])


def overview(table: pd.DataFrame) -> Figure:
    """Fig. 7: S of each case."""
    return _panels(table, ("S",), height=2.3)


def detail(table: pd.DataFrame) -> Figure:
    """Fig. 10: ES, PS and NS of each case."""
    return _panels(table, MEASURES, height=4.6)


def _panels(table: pd.DataFrame, measures: Sequence[str], *, height: float) -> Figure:
    """One column per case, one row per measure, on one scale."""
    cases = [same for same in SAME if same in set(table["same"])]
    with paper_style():
        figure = Figure(figsize=(PAGE_WIDTH, height))
        grid = figure.subplots(len(measures), len(cases), squeeze=False, sharex="col", sharey="row")
        for row, measure in zip(grid, measures, strict=True):
            for ax, same in zip(row, cases, strict=True):
                plot_mixture(where(table, same=same, measure=measure), ax, measure=measure)
                if measure == measures[0]:
                    first_row = table[table["same"] == same].iloc[0]
                    names = textwrap.fill(f"{first_row['first_relation']} + {first_row['second_relation']}", 24)
                    ax.set_title(f"{TITLES[same]}\n{names}", verticalalignment="bottom")
                if measure != measures[-1]:
                    ax.set_xlabel("")
        share_legend(figure, list(grid.flat))
        for row, measure in zip(grid, measures, strict=True):
            row[0].set_ylabel(f"{measure} (%)")
    return figure


if __name__ == "__main__":
    run_script(main)
