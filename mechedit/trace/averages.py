"""Averages over facts: AIE whole and severed, and ATE, with bootstrap intervals.

In: effects in memory, in a file, or one frame after another. Out: small tidy tables. Only each fact's means
by role are ever held, never all cells: a thousand facts need no thousand grids.
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

from mechedit.errors import InputError, check_at_least, check_fraction
from mechedit.statistics import bootstrap_means, percentile_interval
from mechedit.tables import iter_table
from mechedit.trace.labels import KIND_LABELS, ROLES, SEVER_LABELS, unit_of

CELL = ["kind", "sever", "metric", "role", "layer"]
"""What a mean over facts is taken for."""
ORDER: dict[str, Sequence[str]] = {"kind": tuple(KIND_LABELS), "sever": tuple(SEVER_LABELS), "role": ROLES}
ONE_TOKEN = ("subject_first", "subject_last", "after", "last")
"""Roles that one token of a prompt has."""
TOTALS = ["clean", "corrupted", "total"]
BLOCK = 1024
"""Cells whose bootstrap means are held at once."""

Source = pd.DataFrame | str | Path | Iterable[pd.DataFrame | str | Path]
"""Tidy effects: a frame, a parquet file, or any number of these, over which facts may be spread in any way."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoleMeans:
    """What averages are made of: each fact's effect, meaned over the tokens of a role."""

    facts: tuple[str, ...]
    """In order of appearance."""
    cells: pd.DataFrame
    """Columns kind, sever, metric, role, layer; one row a column of `values`."""
    values: Float[np.ndarray, "fact cell"]
    """In units of the metric; NaN where a fact has no such role or no such effect."""
    attrs: dict[Hashable, Any] = field(default_factory=dict)
    """What the frames' attrs agree on."""


def average_effects(effects: Source, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Average indirect effects by kind, severing, metric, role and layer, with intervals over facts.

    AIE = mean over facts of (mean over the role's tokens of the effect): a long subject counts no more than a
    short one, and a one-token subject counts as `subject_last` only. Intervals are percentile bootstraps over
    facts, with the same draws of facts for every cell. Nothing is clipped.

    Args:
        effects: tidy effects, in memory or not; an iterator is used up.
        resamples: bootstrap draws of the facts.
        confidence: coverage of the intervals.
        seed: of the draws.

    Returns:
        Columns kind, sever, metric, role, layer; mean, low, high (units of the metric); facts (how many have
        such an effect). Roles are in reading order. With fewer than two facts, which say nothing of their
        spread, `low` and `high` are NaN. `attrs` are those of the effects.

    Raises:
        InputError: no effects, a column missing, a token measured twice, or settings out of range.
    """
    _check(resamples, confidence)
    means = role_means(effects)
    table = pd.concat([means.cells, _intervals(means.values, resamples, confidence, seed)], axis=1)
    order = np.lexsort([_ranks(table, column) for column in reversed(CELL)])
    table = table.iloc[order].reset_index(drop=True)
    table.attrs = means.attrs
    return table


def total_effects(effects: Source, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Average total effect by metric: how much of the clean score the corruption takes, over facts.

    ATE = mean over facts of (clean − corrupted), ROME §2; intervals and arguments as in `average_effects`.

    Returns:
        Columns metric; clean, corrupted and total, each with its `_low` and `_high` (units of the metric); facts.

    Raises:
        InputError: as `average_effects`.
    """
    _check(resamples, confidence)
    totals = fact_totals(effects)
    facts = totals["fact"].unique()
    rows = []
    for metric, of_metric in totals.groupby("metric", sort=False):
        scores = of_metric.set_index("fact").reindex(facts)[["clean", "corrupted"]].to_numpy(dtype=float)
        values = np.column_stack([scores, scores[:, 0] - scores[:, 1]])
        found = _intervals(values, resamples, confidence, seed)
        row: dict[str, Any] = {"metric": metric}
        for name, entry in zip(TOTALS, found.to_dict("records"), strict=True):
            row |= {name: entry["mean"], f"{name}_low": entry["low"], f"{name}_high": entry["high"]}
        rows.append({**row, "facts": int(found["facts"].iloc[-1])})
    table = pd.DataFrame(rows)
    table.attrs = totals.attrs
    return table


def fact_totals(effects: Source) -> pd.DataFrame:
    """Clean and corrupted score of each fact: columns fact, metric, clean, corrupted, a row a fact and metric.

    Raises:
        InputError: no effects, or a column missing.
    """
    columns = ["fact", "metric", "clean", "corrupted"]
    found: dict[tuple[str, str], tuple[float, float]] = {}
    attrs: dict[Hashable, Any] | None = None
    for frame in _frames(effects, columns):
        _need(frame, columns)
        attrs = _agreed(attrs, frame.attrs)
        first = frame.loc[~frame.duplicated(["fact", "metric"]), columns]
        for fact, metric, clean, corrupted in first.itertuples(index=False, name=None):
            found.setdefault((str(fact), str(metric)), (float(clean), float(corrupted)))
        del frame  # before the next one is made
    _need_any(found)
    totals = pd.DataFrame([(*key, *scores) for key, scores in found.items()], columns=columns)
    totals.attrs = dict(attrs or {})
    return totals


def clearest_fact(effects: Source) -> str:
    """The fact that the corruption hurts most (largest clean − corrupted), the one that is easiest to read.

    By probability where it was measured, else by the first metric.
    """
    totals = fact_totals(effects)
    metric = main_metric(totals["metric"])
    totals = totals.loc[totals["metric"] == metric]
    hurt = unit_of(metric).helps * (totals["clean"] - totals["corrupted"]).to_numpy(dtype=float)
    return str(totals["fact"].iloc[int(np.argmax(np.nan_to_num(hurt, nan=-np.inf)))])


def main_metric(metrics: Iterable[str]) -> str:
    """The metric that is shown when only one can be: probability, else the first."""
    found = list(dict.fromkeys(map(str, metrics)))
    return "probability" if "probability" in found else found[0]


def role_means(effects: Source) -> RoleMeans:
    """Each fact's effects meaned over the tokens of a role, which is all that averages need.

    Raises:
        InputError: no effects, a column missing, or a token measured twice.
    """
    gathered = _Sums()
    for frame in _frames(effects, ["fact", *CELL, "effect"]):
        gathered.update(frame)
        del frame  # before the next one is made
    return gathered.means()


class _Sums:
    """Sums and counts of effects by fact and cell, gathered frame by frame."""

    def __init__(self) -> None:
        self.facts: dict[Hashable, int] = {}
        self.cells: dict[Hashable, int] = {}
        self.attrs: dict[Hashable, Any] | None = None
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def update(self, frame: pd.DataFrame) -> None:
        """Add a frame's rows to what is known of their facts."""
        _need(frame, ["fact", *CELL, "effect"])
        self.attrs = _agreed(self.attrs, frame.attrs)
        groups = frame.groupby(CELL, sort=False, dropna=False, observed=True)
        keys = groups.head(1)[CELL].itertuples(index=False, name=None)
        cells = _numbers(self.cells, keys)[groups.ngroup().to_numpy()]
        codes, facts = pd.factorize(frame["fact"])
        facts = _numbers(self.facts, facts)[codes]
        effect = frame["effect"].to_numpy(dtype=float)
        present = ~np.isnan(effect)
        pairs, place = np.unique(np.stack([facts, cells], axis=1), axis=0, return_inverse=True)
        sums = np.bincount(place.ravel(), np.where(present, effect, 0.0), len(pairs))
        counts = np.bincount(place.ravel(), present, len(pairs))
        self.parts.append((pairs[:, 0], pairs[:, 1], sums, counts.astype(np.int32)))

    def means(self) -> RoleMeans:
        """What has been gathered, as means."""
        _need_any(self.facts)
        sums = np.zeros((len(self.facts), len(self.cells)))
        counts = np.zeros(sums.shape, dtype=np.int32)
        for facts, cells, total, count in self.parts:
            sums[facts, cells] += total  # pairs are unique within a part
            counts[facts, cells] += count
        cells = pd.DataFrame(list(self.cells), columns=CELL)
        self._check_once(counts, cells)
        with np.errstate(invalid="ignore"):
            values = sums / counts
        return RoleMeans(facts=tuple(map(str, self.facts)), cells=cells, values=values, attrs=self.attrs or {})

    def _check_once(self, counts: np.ndarray, cells: pd.DataFrame) -> None:
        """Effects of two traces in one table would be meaned in silence; roles of one token give them away."""
        twice = (counts > 1) & cells["role"].isin(ONE_TOKEN).to_numpy()
        if not twice.any():
            return
        fact, cell = (int(place[0]) for place in np.nonzero(twice))
        what = ", ".join(f"{column} {cells[column].iloc[cell]!r}" for column in CELL)
        raise InputError(
            f"fact {list(self.facts)[fact]!r} has {counts[fact, cell]} effects of {what}, expected one: the effects "
            f"are of several traces; average each by itself"
        )


def _numbers(known: dict[Hashable, int], keys: Iterable[Hashable]) -> np.ndarray:
    """The number of each key, new ones counted on."""
    return np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int32)


def _frames(effects: Source, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
    """Effects as frames, of a file only the given columns."""
    if isinstance(effects, pd.DataFrame):
        return iter([effects])
    if isinstance(effects, str | Path):
        return iter_table(effects, columns)
    # A generator expression would keep its frame while the next one is made.
    return itertools.chain.from_iterable(map(partial(_frames, columns=columns), effects))


def _need(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in frame]:
        raise InputError(f"the effects lack {', '.join(missing)}; expected what trace_facts returns")


def _need_any(found: Any) -> None:
    if not found:
        raise InputError("the effects hold no rows, expected some: trace facts first")


def _agreed(attrs: dict[Hashable, Any] | None, more: dict[Hashable, Any]) -> dict[Hashable, Any]:
    """Entries that all frames agree on."""
    return dict(more) if attrs is None else {key: value for key, value in attrs.items() if more.get(key) == value}


def _check(resamples: int, confidence: float) -> None:
    check_at_least("resamples", resamples, 1)
    check_fraction("confidence", confidence)


def _intervals(values: Float[np.ndarray, "fact cell"], resamples: int, confidence: float, seed: int) -> pd.DataFrame:
    """Mean, low, high and facts of each cell."""
    facts = (~np.isnan(values)).sum(0)
    ends = np.full((2, values.shape[1]), np.nan)
    # The draws depend on the seed and the number of facts alone: every block has the same.
    for start in range(0, values.shape[1], BLOCK):
        draws = bootstrap_means(values[:, start : start + BLOCK], seed=seed, resamples=resamples)
        ends[:, start : start + BLOCK] = percentile_interval(draws, confidence)
    ends[:, facts < 2] = np.nan
    with np.errstate(invalid="ignore"):
        mean = np.nansum(values, axis=0) / facts
    return pd.DataFrame({"mean": mean, "low": ends[0], "high": ends[1], "facts": facts})


def _ranks(table: pd.DataFrame, column: str) -> np.ndarray:
    """Places in the known order; what is not in it comes after, numbers by size and names as they appear."""
    if pd.api.types.is_numeric_dtype(table[column]):
        return table[column].to_numpy()
    places = {value: place for place, value in enumerate(dict.fromkeys([*ORDER.get(column, ()), *table[column]]))}
    return np.array([places[value] for value in table[column]])
