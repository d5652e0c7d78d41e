"""Test for an early site: is the gap above zero at any layer?

The largest of many noisy gaps is above zero by chance, so layers cannot be tested one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mechedit.selection.config import SelectConfig
from mechedit.selection.curves import FactEffects, SubjectEffects

NEGLIGIBLE = 1e-3
"""A gap below this part of the largest state effect counts as rounding, however regular it is."""


@dataclass(frozen=True, kw_only=True)
class EarlySite:
    """Result of the test that MLPs at the subject's last token recall facts."""

    found: bool
    """Whether there is an early site."""
    layer: int
    """Layer at which the mean gap is largest."""
    gap: float
    """The mean gap there."""
    p: float
    """Probability of a statistic as large at any layer if every fact's gaps were as likely negative as positive."""


def early_site(subject: SubjectEffects, config: SelectConfig) -> EarlySite:
    """Test that the gap exceeds zero at some layer, all layers at once.

    Under the hypothesis of no site, all gaps of a fact may as well have the other sign; `resamples` random choices of
    signs give the distribution of the largest `skewness_corrected_t` over layers, which keeps the correlation of
    layers and needs no normality (the max-T permutation test; Nichols & Holmes 2002). There is a site when
    p = (1 + #{max T* ≥ max T}) / (1 + resamples) ≤ 1 − confidence, and the gap is not negligible. Beside other
    layers, those whose gaps are rounding take no part: their t statistics are as large as any, and differ from one
    processor to another.
    """
    least = NEGLIGIBLE * np.abs(subject.state.mean(0)).max()
    clear = np.abs(subject.gap).mean(0) > least
    gap = np.where(clear, subject.gap, 0.0) if clear.any() else subject.gap
    signs = np.random.default_rng(config.seed).choice([-1.0, 1.0], size=(config.resamples, len(gap)))
    flipped = skewness_corrected_t(gap, signs).max(1)
    observed = skewness_corrected_t(gap, np.ones((1, len(gap)))).max()
    p = float(1 + np.count_nonzero(flipped >= observed)) / (1 + config.resamples)
    mean = subject.gap.mean(0)
    peak = int(mean.argmax())
    large = mean[peak] > least
    significant = p <= 1 - config.confidence + 1e-12
    return EarlySite(found=bool(large and significant), layer=peak, gap=float(mean[peak]), p=p)


def skewness_corrected_t(values: FactEffects, signs: Float[np.ndarray, "draw fact"]) -> Float[np.ndarray, "draw layer"]:
    """One-sample t statistic of the mean over facts, each taken with a sign, corrected for skewness (Hall 1992).

    T = √(n−1) · mean / sd and g = skewness / √n; the statistic is T + g T²/3 + g² T³/27 + g/6. T alone is too often
    large where a few facts have strongly negative values. A layer without variance gives ±∞.
    """
    n, square = len(values), (values**2).mean(0)
    mean = signs @ values / n
    variance = square - mean**2
    third = signs @ values**3 / n - 3 * mean * square + 2 * mean**3
    varies = variance > 1e-12 * square
    safe = np.where(varies, variance, 1.0)
    t, g = mean * np.sqrt((n - 1) / safe), third / safe**1.5 / np.sqrt(n)
    return np.where(varies, t + g * t**2 / 3 + g**2 * t**3 / 27 + g / 6, np.where(mean > 0, np.inf, -np.inf))
