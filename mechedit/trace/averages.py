"""Averages over facts: AIE with and without severing, and ATE, with bootstrap intervals.

In: effects in memory, in a file, or one frame after another. Out: small tidy tables. Only each fact's means by role
are kept in memory, never all cells, so that a thousand facts take little memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechedit.arguments import checked
from mechedit.bounds import LARGEST_WHOLE
from mechedit.errors import InputError, brief, check_fraction
from mechedit.statistics import bootstrap_means, percentile_interval
from mechedit.tables import iter_table
from mechedit.trace.columns import with_present_metric_names
from mechedit.trace.labels import KIND_LABELS, ROLES, SEVER_LABELS, unit_of

CELL = ["kind", "sever", "metric", "role", "layer"]
"""Columns that identify a mean over facts."""
ORDER: dict[str, Sequence[str]] = {"kind": tuple(KIND_LABELS), "sever": tuple(SEVER_LABELS), "role": ROLES}
ONE_TOKEN = ("subject_first", "subject_last", "after", "last")
"""Roles that exactly one token of a prompt has."""
TOTALS = ["clean", "corrupted", "total"]
BLOCK = 1024
"""Cells whose bootstrap means are computed at once."""

Source = pd.DataFrame | str | Path | Iterable[pd.DataFrame | str | Path]
"""Tidy effects: a frame, a parquet file, or any number of these, over which facts may be spread in any way."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoleMeans:
    """Each fact's mean effect over the tokens of a role, from which averages are computed."""

    facts: tuple[str, ...]
    """Ids of the facts, in order of appearance."""
    cells: pd.DataFrame
    """Columns kind, sever, metric, role, layer; one row per column of `values`."""
    values: Float[np.ndarray, "fact cell"]
    """Mean effects, in units of the metric; NaN where a fact has no such role or no such effect."""
    attrs: dict[Hashable, Any] = field(default_factory=dict)
    """Entries of the frames' attrs that all frames share."""


@checked
def average_effects(effects: Source, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Average indirect effects by kind, severing, metric, role and layer, with intervals over facts.

    AIE = mean over facts of (mean over the role's tokens of the effect): a long subject counts no more than a
    short one, and a one-token subject counts as `subject_last` only. Intervals are percentile bootstraps over
    facts, with the same draws of facts for every cell. Nothing is clipped. Averages of an approximate trace are
    corrected at the subject's last token (`corrected_effects`), and elsewhere as good as its estimates.

    Args:
        effects: tidy effects, in memory or in files; an iterator is consumed.
        resamples: number of bootstrap resamples of the facts.
        confidence: coverage of the intervals.
        seed: seed of the resamples.

    Returns:
        Columns kind, sever, metric, role, layer; mean, low, high (units of the metric); facts (the number of facts
        with such an effect). Roles are in reading order. With fewer than two facts, which give no interval, `low`
        and `high` are NaN. `attrs` are those of the effects.

    Raises:
        InputError: no effects, a column missing, a token measured twice, or settings out of range.
    """
    _check(resamples, confidence, seed)
    means = role_means(effects)
    table = pd.concat([means.cells, _intervals(means.values, resamples, confidence, seed)], axis=1)
    order = np.lexsort([_ranks(table, column) for column in reversed(CELL)])
    table = table.iloc[order].reset_index(drop=True)
    table.attrs = means.attrs
    return table


@checked
def total_effects(effects: Source, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Average total effect by metric: how much the corruption lowers the clean score, over facts.

    ATE = mean over facts of (clean − corrupted), ROME §2; intervals and arguments as in `average_effects`.

    Returns:
        Columns metric; clean, corrupted and total, each with its `_low` and `_high` (units of the metric); facts.

    Raises:
        InputError: as `average_effects`.
    """
    _check(resamples, confidence, seed)
    totals = fact_totals(effects)
    facts = totals["fact"].unique()
    rows = []
    for metric, of_metric in totals.groupby("metric", sort=False):
        scores = of_metric.set_index("fact").reindex(facts)[["clean", "corrupted"]].to_numpy(dtype=float)
        values = np.column_stack([scores, scores[:, 0] - scores[:, 1]])
        intervals = _intervals(values, resamples, confidence, seed)
        row: dict[str, Any] = {"metric": metric}
        for name, entry in zip(TOTALS, intervals.to_dict("records"), strict=True):
            row |= {name: entry["mean"], f"{name}_low": entry["low"], f"{name}_high": entry["high"]}
        rows.append({**row, "facts": int(intervals["facts"].iloc[-1])})
    table = pd.DataFrame(rows)
    table.attrs = totals.attrs
    return table


def fact_totals(effects: Source) -> pd.DataFrame:
    """Clean and corrupted score of each fact: columns fact, metric, clean, corrupted; one row per fact and metric.

    Raises:
        InputError: no effects, or a column missing.
    """
    columns = ["fact", "metric", "clean", "corrupted"]
    scores_of: dict[tuple[str, str], tuple[float, float]] = {}
    attrs: dict[Hashable, Any] | None = None
    for frame in _frames(effects, columns):
        attrs = _shared_attrs(attrs, frame.attrs)
        first = frame.loc[~frame.duplicated(["fact", "metric"]), columns]
        for fact, metric, clean, corrupted in first.itertuples(index=False, name=None):
            scores_of.setdefault((str(fact), str(metric)), (float(clean), float(corrupted)))
        del frame  # so that it is freed before the next one is read
    _check_not_empty(scores_of)
    totals = pd.DataFrame([(*key, *scores) for key, scores in scores_of.items()], columns=columns)
    totals.attrs = dict(attrs or {})
    return totals


def clearest_fact(effects: Source) -> str:
    """The fact that the corruption hurts most (largest clean − corrupted), whose heatmap is easiest to read.

    Probability is compared where it was measured, else the first metric.
    """
    totals = fact_totals(effects)
    metric = main_metric(totals["metric"])
    totals = totals.loc[totals["metric"] == metric]
    damage = unit_of(metric).helps * (totals["clean"] - totals["corrupted"]).to_numpy(dtype=float)
    return str(totals["fact"].iloc[int(np.argmax(np.nan_to_num(damage, nan=-np.inf)))])


def main_metric(metrics: Iterable[str]) -> str:
    """The metric that is shown when only one can be: probability, else the first."""
    names = list(dict.fromkeys(map(str, metrics)))
    return "probability" if "probability" in names else names[0]


def role_means(effects: Source) -> RoleMeans:
    """Each fact's mean effects over the tokens of a role, which is all that averages need.

    Raises:
        InputError: no effects, a column missing, or a token measured twice.
    """
    sums = _Sums()
    for frame in _frames(effects, ["fact", *CELL, "effect"]):
        sums.update(frame)
        del frame  # so that it is freed before the next one is read
    return sums.means()


def corrected_effects(effects: pd.DataFrame) -> Float[np.ndarray, " row"]:
    """Effects whose averages over facts are those of exact effects, on average over draws.

    Of an exact trace these are the effects. Of an approximate one, where cells were drawn with probability π,

        estimate + (effect − estimate) / π  of a cell that was traced exactly, else the estimate,

    the difference estimator of a finite population's mean (Särndal, Swensson & Wretman 1992, §6.3), whose spread over
    facts is also that of the drawn cells' misses, so that intervals need no correction of their own. Single values
    mean nothing. Where `chance` is NaN, nothing is corrected.
    """
    effect = effects["effect"].to_numpy(dtype=float)
    if not {"estimate", "chance"} <= set(effects):
        return effect
    weight = np.nan_to_num(1 / effects["chance"].to_numpy(dtype=float) - 1)
    return effect + weight * (effect - effects["estimate"].to_numpy(dtype=float))


class _Sums:
    """Sums and counts of effects by fact and cell, accumulated frame by frame."""

    def __init__(self) -> None:
        self.facts: dict[Hashable, int] = {}
        self.cells: dict[Hashable, int] = {}
        self.attrs: dict[Hashable, Any] | None = None
        self.frame_sums: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def update(self, frame: pd.DataFrame) -> None:
        """Add a frame's rows to the sums of their facts."""
        self.attrs = _shared_attrs(self.attrs, frame.attrs)
        groups = frame.groupby(CELL, sort=False, dropna=False, observed=True)
        keys = groups.head(1)[CELL].itertuples(index=False, name=None)
        cells = _numbers(self.cells, keys)[groups.ngroup().to_numpy()]
        codes, facts = pd.factorize(frame["fact"])
        facts = _numbers(self.facts, facts)[codes]
        effect = corrected_effects(frame)
        present = ~np.isnan(effect)
        pairs, pair_of_row = np.unique(np.stack([facts, cells], axis=1), axis=0, return_inverse=True)
        sums = np.bincount(pair_of_row.ravel(), np.where(present, effect, 0.0), len(pairs))
        counts = np.bincount(pair_of_row.ravel(), present, len(pairs))
        self.frame_sums.append((pairs[:, 0], pairs[:, 1], sums, counts.astype(np.int32)))

    def means(self) -> RoleMeans:
        """The means of everything added so far."""
        _check_not_empty(self.facts)
        sums = np.zeros((len(self.facts), len(self.cells)))
        counts = np.zeros(sums.shape, dtype=np.int32)
        for facts, cells, total, count in self.frame_sums:
            sums[facts, cells] += total  # pairs are unique within a frame
            counts[facts, cells] += count
        cells = pd.DataFrame(list(self.cells), columns=CELL)
        self._check_once(counts, cells)
        with np.errstate(invalid="ignore"):
            values = sums / counts
        return RoleMeans(facts=tuple(map(str, self.facts)), cells=cells, values=values, attrs=self.attrs or {})

    def _check_once(self, counts: np.ndarray, cells: pd.DataFrame) -> None:
        """Refuse effects of two traces in one table, which roles of a single token give away."""
        twice = (counts > 1) & cells["role"].isin(ONE_TOKEN).to_numpy()
        if not twice.any():
            return
        fact, cell = (int(indices[0]) for indices in np.nonzero(twice))
        description = ", ".join(f"{column} {brief(cells[column].iloc[cell])}" for column in CELL)
        raise InputError(
            f"fact {brief(list(self.facts)[fact])} has {counts[fact, cell]} effects of {description}, expected one: "
            f"the "
            f"effects are of several traces; average each by itself"
        )


def _numbers(known: dict[Hashable, int], keys: Iterable[Hashable]) -> np.ndarray:
    """The number of each key; new keys get the next numbers."""
    return np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int32)


def _frames(effects: Source, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
    """Effects as frames, of a file only the given columns."""
    if isinstance(effects, pd.DataFrame):
        _check_columns(effects, columns)
        return iter([with_present_metric_names(effects)])
    if isinstance(effects, str | Path):
        return map(with_present_metric_names, iter_table(effects, columns, ("estimate", "chance")))
    # A generator expression would keep its frame while the next one is read.
    return itertools.chain.from_iterable(map(partial(_frames, columns=columns), effects))


def _check_columns(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in frame]:
        raise InputError(f"the effects lack {', '.join(missing)}; expected what trace_facts returns")


def _check_not_empty(rows: Any) -> None:
    if not rows:
        raise InputError("the effects hold no rows, expected some: trace facts first")


def _shared_attrs(attrs: dict[Hashable, Any] | None, new: dict[Hashable, Any]) -> dict[Hashable, Any]:
    """Entries with the same value in the attrs of all frames so far and of a new one."""
    return dict(new) if attrs is None else {key: value for key, value in attrs.items() if new.get(key) == value}


def _check(resamples: int, confidence: float, seed: int) -> None:
    for name, value, least, most in (("resamples", resamples, 1, 1_000_000), ("seed", seed, 0, LARGEST_WHOLE)):
        if not least <= value <= most:
            raise InputError(f"{name} is {brief(value)}, expected a number from {least} to {most:,}; choose another")
    check_fraction("confidence", confidence)


def _intervals(values: Float[np.ndarray, "fact cell"], resamples: int, confidence: float, seed: int) -> pd.DataFrame:
    """Columns mean, low, high and facts; one row per cell."""
    facts = (~np.isnan(values)).sum(0)
    ends = np.full((2, values.shape[1]), np.nan)
    # The resamples depend on the seed and the number of facts alone, so every block has the same.
    for start in range(0, values.shape[1], BLOCK):
        resampled = bootstrap_means(values[:, start : start + BLOCK], seed=seed, resamples=resamples)
        ends[:, start : start + BLOCK] = percentile_interval(resampled, confidence)
    ends[:, facts < 2] = np.nan
    with np.errstate(invalid="ignore"):
        mean = np.nansum(values, axis=0) / facts
    return pd.DataFrame({"mean": mean, "low": ends[0], "high": ends[1], "facts": facts})


def _ranks(table: pd.DataFrame, column: str) -> np.ndarray:
    """Ranks in the known order; other values come after, numbers by size and names as they appear."""
    if pd.api.types.is_numeric_dtype(table[column]):
        return table[column].to_numpy()
    ranks = {value: rank for rank, value in enumerate(dict.fromkeys([*ORDER.get(column, ()), *table[column]]))}
    return np.array([ranks[value] for value in table[column]])
