"""How well an approximate trace agrees with the exact one: on cells that were drawn and traced both ways."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from mechedit.errors import InputError
from mechedit.statistics import spearman
from mechedit.tables import where
from mechedit.trace.approximation import Approximation
from mechedit.trace.labels import KIND_LABELS, unit_of
from mechedit.trace.severing import sever_in_words

ROUNDING = 1e-5
"""Differences up to this part of the largest score are taken for rounding, as of results in float32."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Estimated against exact effects, on the drawn cells of a kind, severing and metric."""

    kind: str
    sever: str
    metric: str
    cells: int
    """Number of cells, drawn from all facts, layers and positions."""
    correlation: float
    """Spearman's rank correlation of estimates and exact effects, those that are `rounding` counted as 0."""
    largest_miss: float
    """Largest |estimate − exact effect|, in units of the metric."""
    mean_miss: float
    """Mean of the same."""
    mean_effect: float
    """Mean |exact effect|, to hold the misses against."""
    rounding: float = 0.0
    """Effects and misses up to this are taken for rounding, in the same units: `ROUNDING` of the largest score."""

    def holds(self, least: float | int) -> bool:
        """Whether estimates rank cells well enough, or none misses by more than rounding.

        Where a severing leaves no path to the output, all effects are rounding, and their ranks mean nothing.
        """
        return self.correlation >= least or self.largest_miss <= self.rounding

    def in_words(self) -> str:
        """The agreement for people, in a line."""
        unit = unit_of(self.metric)
        miss, mean, effect = (
            f"{unit.factor * value:.3g}{unit.short}" for value in (self.largest_miss, self.mean_miss, self.mean_effect)
        )
        return (
            f"{KIND_LABELS[self.kind]}, {sever_in_words(self.sever)}, {self.metric}: rank correlation "
            f"{self.correlation:.3f} on {self.cells} cells, missed by {mean} on average and {miss} at most "
            f"(mean effect {effect}{', no more than rounding' if self.largest_miss <= self.rounding else ''})"
        )


def measure_agreement(frames: Iterable[pd.DataFrame]) -> list[Agreement]:
    """Hold estimates against exact effects, by kind, severing and metric.

    Args:
        frames: effects of an approximate trace, a group of facts after another; only drawn cells are kept in memory.
    """
    drawn = pd.concat([where(frame, drawn=True) for frame in frames], ignore_index=True)
    agreements = []
    for _, rows in drawn.groupby(["kind", "sever", "metric"], sort=False):
        kind, sever, metric = (str(rows[name].iloc[0]) for name in ("kind", "sever", "metric"))
        estimate, effect, score = (rows[name].to_numpy(dtype=float) for name in ("estimate", "effect", "score"))
        miss, rounding = np.abs(estimate - effect), ROUNDING * float(np.abs(score).max())
        ranked = (np.where(np.abs(values) > rounding, values, 0.0)[None] for values in (estimate, effect))
        agreements.append(
            Agreement(
                kind=kind,
                sever=sever,
                metric=metric,
                cells=len(rows),
                correlation=float(spearman(*ranked)[0]),
                largest_miss=float(miss.max()),
                mean_miss=float(miss.mean()),
                mean_effect=float(np.abs(effect).mean()),
                rounding=rounding,
            )
        )
    return agreements


class DisagreementError(InputError):
    """Estimates do not rank cells as exact effects do."""

    def __init__(self, agreements: Sequence[Agreement], least: float | int, remedy: str = "") -> None:
        """Say every kind and severing that fails, the worst of a kind first, and what to do.

        Args:
            agreements: of all kinds and severings, those that fail among them.
            least: least rank correlation.
            remedy: what to do in place of a trace without approximation.
        """
        self.agreements, self.least = tuple(agreements), least
        failing = [agreement for agreement in agreements if not agreement.holds(least)]
        kinds = list(dict.fromkeys(agreement.kind for agreement in failing))
        kind = f"{kinds[0]} " if len(kinds) == 1 else ""
        super().__init__(
            f"estimates do not stand for exact effects here ({_failures(failing)}; rank correlation / largest miss on "
            f"{_cells(failing)} cells), expected at least {least:g}: trace {kind}without approximation, or "
            f"{remedy or 'lower least_correlation and trust no single cell'}"
        )


def check_agreement(agreements: Iterable[Agreement], approximation: Approximation) -> None:
    """Refuse estimates that do not rank cells as exact effects do; a bound of 0 refuses nothing.

    Raises:
        DisagreementError: in a kind and severing the rank correlation is below `least_correlation`, or there is none
            because all effects are equal, and an estimate misses by more than rounding.
    """
    agreements, least = list(agreements), approximation.least_correlation
    if least and not all(agreement.holds(least) for agreement in agreements):
        raise DisagreementError(agreements, least)


def _failures(failing: Sequence[Agreement]) -> str:
    """Rank correlation and largest miss of every severing, by kind and metric."""
    groups: dict[str, list[Agreement]] = {}
    several = len({agreement.metric for agreement in failing}) > 1
    for agreement in failing:
        head = KIND_LABELS[agreement.kind] + (f", {agreement.metric}" if several else "")
        groups.setdefault(head, []).append(agreement)
    return "; ".join(f"{head}: {', '.join(map(_failure, sorted(group, key=_rank)))}" for head, group in groups.items())


def _rank(agreement: Agreement) -> float:
    """The rank correlation; lowest where all effects are equal, so that there is none."""
    return -2.0 if math.isnan(agreement.correlation) else agreement.correlation


def _failure(agreement: Agreement) -> str:
    unit = unit_of(agreement.metric)
    miss = f"{unit.factor * agreement.largest_miss:.2g}{unit.short}"
    return f"{sever_in_words(agreement.sever)} {agreement.correlation:.3f}/{miss}"


def _cells(failing: Sequence[Agreement]) -> str:
    counts = sorted({agreement.cells for agreement in failing})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def checked_agreement(traces: Iterable[Iterable[pd.DataFrame]], approximation: Approximation | None) -> dict[str, Any]:
    """How well the estimates of all traces agree with exact effects, as the entry `agreement` of attrs.

    Args:
        traces: effects of each, one group of facts after another; all are read before any is refused.
        approximation: settings of the traces; None where they are exact, of which nothing is read.

    Raises:
        DisagreementError: the rank correlation is below the bound in a kind and severing; all that fail are named.
    """
    if approximation is None:
        return {}
    agreements = [agreement for frames in traces for agreement in measure_agreement(frames)]
    check_agreement(agreements, approximation)
    return {"agreement": agreement_records(agreements)}


def agreement_records(agreements: Iterable[Agreement]) -> list[dict[str, Any]]:
    """Agreements as JSON holds them, NaN as null."""
    return [
        {name: None if value != value else value for name, value in asdict(agreement).items()}
        for agreement in agreements
    ]
