"""How well an approximate trace agrees with the exact one: on cells that were drawn and traced both ways."""

from __future__ import annotations

import math
from collections.abc import Iterable
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


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Estimated against exact effects, on the drawn cells of a kind, severing and metric."""

    kind: str
    sever: str
    metric: str
    cells: int
    """Number of cells, drawn from all facts, layers and positions."""
    correlation: float
    """Spearman's rank correlation of estimates and exact effects."""
    largest_miss: float
    """Largest |estimate − exact effect|, in units of the metric."""
    mean_miss: float
    """Mean of the same."""
    mean_effect: float
    """Mean |exact effect|, to hold the misses against."""

    def in_words(self) -> str:
        """The agreement for people, in a line."""
        unit = unit_of(self.metric)
        miss, mean, effect = (
            f"{unit.factor * value:.3g}{unit.short}" for value in (self.largest_miss, self.mean_miss, self.mean_effect)
        )
        return (
            f"{KIND_LABELS[self.kind]}, {sever_in_words(self.sever)}, {self.metric}: rank correlation "
            f"{self.correlation:.3f} on {self.cells} cells, missed by {mean} on average and {miss} at most "
            f"(mean effect {effect})"
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
        estimate, effect = (rows[name].to_numpy(dtype=float) for name in ("estimate", "effect"))
        miss = np.abs(estimate - effect)
        agreements.append(
            Agreement(
                kind=kind,
                sever=sever,
                metric=metric,
                cells=len(rows),
                correlation=float(spearman(estimate[None], effect[None])[0]),
                largest_miss=float(miss.max()),
                mean_miss=float(miss.mean()),
                mean_effect=float(np.abs(effect).mean()),
            )
        )
    return agreements


def check_agreement(agreements: Iterable[Agreement], approximation: Approximation) -> None:
    """Refuse estimates that do not rank cells as exact effects do; a bound of 0 refuses nothing.

    Raises:
        InputError: the rank correlation is below `least_correlation` in a kind and severing, or there is none because
            all effects are equal.
    """
    least = approximation.least_correlation
    failing = [agreement for agreement in agreements if least and not agreement.correlation >= least]
    if failing:
        # One whose effects are all equal has no correlation.
        worst = min(failing, key=lambda agreement: -2 if math.isnan(agreement.correlation) else agreement.correlation)
        more = f", and {len(failing) - 1} more that fail" if len(failing) > 1 else ""
        kinds = ", ".join(dict.fromkeys(agreement.kind for agreement in failing))
        raise InputError(
            f"estimates do not stand for exact effects here ({worst.in_words()}{more}), expected a rank correlation of "
            f"at least {least:g}: trace {kinds} without approximation, or lower least_correlation and trust no single "
            f"cell"
        )


def agreement_records(agreements: Iterable[Agreement]) -> list[dict[str, Any]]:
    """Agreements as JSON holds them, NaN as null."""
    return [
        {name: None if value != value else value for name, value in asdict(agreement).items()}
        for agreement in agreements
    ]
