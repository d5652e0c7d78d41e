"""Summaries of measurements: for each measure its mean over cases, an interval, and the number of cases.

In: a grid of values by case and measure (prompts are averaged within a case first). Out: a `Summary`, in the papers'
units (MEMIT Appendix C.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from jaxtyping import Float

from mechedit.evaluation.config import EvaluationConfig
from mechedit.evaluation.measures import PERCENT, measure_named
from mechedit.statistics import bootstrap_means, harmonic_mean, percentile_interval, rate_interval

ROUNDING: Final = 1e-12
"""Relative difference below which two means of float64 differ by their rounding alone."""
Entry = dict[str, float | int]
"""`mean`, the ends `low` and `high` of its interval, and `n`, the number of cases that the mean is over."""
Summary = dict[str, Entry]
"""An entry for each measure that has data."""


def summarize_cases(
    values: Float[np.ndarray, "case measure"],
    measures: Sequence[str],
    config: EvaluationConfig,
    *,
    score: str | None = None,
    score_measures: Sequence[str] = (),
    in_percent: bool = False,
) -> Summary:
    """Mean, interval and number of cases of each measure, in its unit; last the score that joins some of them.

    Rates have `rate_interval`: a percentile bootstrap would claim a width of 0 where all cases succeed. Magnitudes
    have the percentile bootstrap; its width is 0 where all cases hold one value, a single case among them, since
    nothing then says how far apart cases lie. The score, the harmonic mean of its measures, has the percentile
    bootstrap with its measures resampled together. Where all resamples give one score, its ends are the harmonic
    means of its measures' ends: it grows with each of them, so this is right if they rise and fall together, which is
    the widest that their intervals allow. Short of that limit the interval of the score is too narrow, as all
    percentile intervals of few cases are.

    Args:
        values: NaN where a case lacks a measure; each measure has at least one value.
        measures: names of the columns.
        config: seed, resamples and confidence.
        score: name of the harmonic mean; None leaves it out.
        score_measures: the rates that it joins, all among `measures`.
        in_percent: whether values are × 100 already.
    """
    draws = bootstrap_means(values, seed=config.seed, resamples=config.resamples)
    means, counts = np.nanmean(values, axis=0), (~np.isnan(values)).sum(axis=0).tolist()
    summary: Summary = {}
    for column, name in enumerate(measures):
        measure, cases = measure_named(name), values[:, column]
        cases, factor = cases[~np.isnan(cases)], 1.0 if in_percent else measure.factor
        if measure.is_rate:
            success = PERCENT / factor  # the value of a case that succeeds wholly
            low, high = rate_interval(cases / success, draws[:, column] / success, config.confidence)
            ends = low * PERCENT, high * PERCENT
        elif len(cases) and np.ptp(cases) == 0:
            mean = float(means[column]) * factor
            ends = mean, mean  # means of resamples round, each in its way
        else:
            ends = _percentiles(draws[:, column] * factor, config)
        summary[name] = entry(float(means[column]) * factor, ends, counts[column])
    if score is not None:
        columns = [list(measures).index(name) for name in score_measures]
        factor = 1.0 if in_percent else PERCENT
        ends = _percentiles(harmonic_mean(draws[:, columns]) * factor, config)
        if math.isclose(*ends, rel_tol=ROUNDING):
            rates = [[summary[name][end] for name in score_measures] for end in ("low", "high")]
            low, high = harmonic_mean(np.array(rates, dtype=float)).tolist()
            ends = low, high
        mean = float(harmonic_mean(means[None, columns])[0]) * factor
        summary[score] = entry(mean, ends, min(counts[column] for column in columns))
    return summary


def summarize_texts(losses: Float[np.ndarray, "text 2"], config: EvaluationConfig) -> Entry:
    """PPL = exp(Σ NLL / Σ tokens) over texts, with its percentile bootstrap over texts.

    Args:
        losses: of each text, the sum of −log P(token) in nats, and the tokens it sums over.
        config: seed, resamples and confidence.
    """
    draws = bootstrap_means(losses, seed=config.seed, resamples=config.resamples)
    loss, tokens = losses.mean(axis=0)
    ends = _percentiles(np.exp(draws[:, 0] / draws[:, 1]), config)
    return entry(float(np.exp(loss / tokens)), ends, len(losses))


def entry(mean: float, ends: tuple[float, float], n: int) -> Entry:
    """One entry of a summary."""
    return {"mean": mean, "low": ends[0], "high": ends[1], "n": n}


def _percentiles(draws: Float[np.ndarray, " resample"], config: EvaluationConfig) -> tuple[float, float]:
    low, high = percentile_interval(draws[:, None], config.confidence)
    return float(low[0]), float(high[0])
