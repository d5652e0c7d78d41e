"""A trial: a window edited with some settings and some facts, and its objective with the same on resamples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mechedit.errors import InputError
from mechedit.statistics import bootstrap_means, harmonic_mean, percentile_interval
from mechedit.sweep import Sweep, Window
from mechedit.sweep.sweep import MAGNITUDES, by_case
from mechedit.sweep.validation import CLOSE
from mechedit.tables import where
from mechedit.tuning.alternatives import WEIGHT, Changes

EXACT, MARGIN = 0.1, 0.01
"""Weights of exact match and of the probability differences in the objective: they decide where S does not."""
EQUAL = 1e-4
"""Points between the highest and lowest objective below which nothing but rounding tells windows apart."""
SURE = 0.75
"""Share of resamples that must prefer another value of a setting before it is taken."""
WORTH = 0.5
"""Points of the objective by which they must: what decides ties between windows is no reason to leave a default."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One window with one choice of settings."""

    stage: str
    """What was being chosen: `windows`, `widths`, or the name of a setting."""
    window: Window
    changes: Changes
    """Settings in place of those that the search began with."""
    facts: int
    """Number of facts, the first of the tuning's order."""
    scores: dict[str, float | None]
    """Measures in percent: S or what stands for it, its parts, exact match, mean probability difference, what was left
    unwritten, and the share of facts whose search converged; None without data."""
    objective: float
    """Score + exact match / 10 + mean probability difference / 100, all in percent."""
    draws: Float[np.ndarray, " resample"]
    """The objective on resamples of the facts, the same for all trials with as many facts."""
    edits: int = 0
    """Searches for z that it took, which earlier trials had not made."""
    seconds: float | int = 0.0
    """Time that it took, shared evenly among trials that were made at once."""

    @property
    def interval(self) -> tuple[float, float]:
        """Percentile interval of the objective."""
        low, high = percentile_interval(self.draws[:, None])
        return float(low[0]), float(high[0])

    def plain(self) -> dict[str, Any]:
        """The trial as `tuned.json` holds it."""
        low, high = self.interval
        return {
            "stage": self.stage,
            "layers": self.window.layers,
            "settings": dict(self.changes),
            "facts": self.facts,
            **self.scores,
            "objective": self.objective,
            "low": low,
            "high": high,
            "edits": self.edits,
            "seconds": self.seconds,
        }


def trials_of(sweep: Sweep, stage: str, changes: Changes, facts: int, edits: int, seconds: float | int) -> list[Trial]:
    """The trials of one sweep, by window."""
    cases, cost = list(dict.fromkeys(sweep.cases["case"])), len(sweep.windows)
    measured = set(sweep.cases["measure"])
    joined, exact = list(sweep.score_measures), ["exact_match"]
    magnitudes = [name for name in MAGNITUDES if name in measured]
    names = list(dict.fromkeys([*joined, *exact, *magnitudes, "left", "converged"]))
    trials = []
    for index, window in enumerate(sweep.windows):
        rows = where(sweep.cases, first=window.first, last=window.last)
        values = by_case(rows, cases, names)
        draws = bootstrap_means(values, seed=sweep.config.seed, resamples=sweep.config.resamples)
        means = _means(values)
        trials.append(
            Trial(
                stage=stage,
                window=window,
                changes=changes,
                facts=facts,
                scores={
                    "score": float(harmonic_mean(means[None, : len(joined)])[0]),
                    **{name: _finite(means[names.index(name)]) for name in names},
                },
                objective=float(_objective(means[None], names, joined, magnitudes)[0]),
                draws=_objective(draws, names, joined, magnitudes),
                edits=edits // cost + (index < edits % cost),
                seconds=seconds / cost,
            )
        )
    return trials


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest objective, the first of equal ones."""
    return max(trials, key=lambda trial: trial.objective)


def windows_of(trials: Sequence[Trial]) -> list[Window]:
    """The windows of some trials, each once."""
    return list(dict.fromkeys(trial.window for trial in trials))


def preferred(current: Trial, rivals: Sequence[Trial]) -> Trial:
    """The best trial where it beats the current one by `WORTH` on `SURE` of the resamples, else the current one."""
    best = best_of([current, *rivals])
    return best if (best.draws >= current.draws + WORTH).mean() >= SURE else current


def central(trials: Sequence[Trial]) -> Trial:
    """Of the trials about as good as the best, that whose layers most of them share: the middle of a plateau.

    As good are those within `CLOSE` points to which resamples do not prefer the best. Of windows beside each other,
    which have most layers in common, chance makes one the best, while all say that the layers they share are good ones.
    """
    best = best_of(trials)
    near = [t for t in trials if (best.objective - t.objective <= CLOSE and preferred(t, [best]) is t) or t is best]
    sharing = Counter(layer for trial in near for layer in trial.window.layers)

    def shared_by(trial: Trial) -> float:
        return sum(sharing[layer] for layer in trial.window.layers) / trial.window.width

    return max(near, key=lambda trial: (shared_by(trial), trial.objective))


def _means(values: Float[np.ndarray, "case measure"]) -> Float[np.ndarray, " measure"]:
    counts = (~np.isnan(values)).sum(0)
    return np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan)


def _objective(
    means: Float[np.ndarray, "row measure"], names: Sequence[str], joined: Sequence[str], magnitudes: Sequence[str]
) -> Float[np.ndarray, " row"]:
    columns = {name: means[:, names.index(name)] for name in names}
    score = harmonic_mean(np.stack([columns[name] for name in joined], axis=1))
    margin = np.stack([columns[name] for name in magnitudes], axis=1).mean(1) if magnitudes else 0.0
    return np.nan_to_num(score + EXACT * columns["exact_match"] + MARGIN * margin)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def weight_of(changes: Changes) -> float | int | None:
    """The λ that some changes set; None where they leave it as it was."""
    return next((changes[name] for name in (WEIGHT, "covariance_weight") if name in changes), None)


def check_not_equal(trials: Sequence[Trial]) -> None:
    """Refuse to choose among windows that all score the same.

    Raises:
        InputError: they do.
    """
    objectives = [trial.objective for trial in trials]
    if len({trial.window for trial in trials}) > 1 and max(objectives) - min(objectives) < EQUAL:
        raise InputError(
            f"all {len(trials)} trials of windows score the same ({in_words(trials[0])}), so that nothing tells them "
            f"apart; expected scores that differ: give more or harder requests (with paraphrases and neighbors), or "
            f"settings with which edits do something (--set)"
        )


def in_words(trial: Trial) -> str:
    """A trial's score and exact match."""
    exact = trial.scores["exact_match"]
    return f"score {trial.scores['score']:.1f}" + ("" if exact is None else f", exact match {exact:.0f}")
