"""Every rule on all facts and on the same bootstrap resamples of them: how often each range and layer is selected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from mechedit.errors import InputError, brief
from mechedit.selection.config import SelectConfig
from mechedit.selection.curves import MeanCurves, ResampledCurves, SubjectEffects, ablation, contribution
from mechedit.selection.rules import RULES, Layers, traced_rules
from mechedit.statistics import bootstrap_means


@dataclass(frozen=True, kw_only=True)
class BootstrapSelections:
    """The range that one rule selects on all facts, and those that it selects on resamples of them."""

    layers: Layers
    """Range on all facts."""
    counts: Counter[Layers]
    """Range → number of resamples that give it."""

    @property
    def modal(self) -> Layers:
        """The range selected most often."""
        return self.counts.most_common(1)[0][0]

    @property
    def stability(self) -> float:
        """Share of resamples that give exactly `layers`."""
        return self.counts[self.layers] / self.counts.total()

    def agreement(self, overlap: float | int) -> float:
        """Share of resamples whose range overlaps `layers` by at least `overlap` (intersection over union)."""
        agreeing = [
            count for layers, count in self.counts.items() if intersection_over_union(layers, self.layers) >= overlap
        ]
        return sum(agreeing) / self.counts.total()

    def candidates(self, most: int = 5) -> list[tuple[Layers, float]]:
        """The ranges that resamples give most often, with their shares, the likeliest first."""
        return [(layers, count / self.counts.total()) for layers, count in self.counts.most_common(most)]

    def membership(self, n_layers: int) -> list[float]:
        """Share of resamples whose range holds each layer."""
        resamples: Float[np.ndarray, " layer"] = np.zeros(n_layers)
        for layers, count in self.counts.items():
            resamples[list(layers)] += count
        return (resamples / self.counts.total()).tolist()


def intersection_over_union(first: Layers, second: Layers) -> float:
    """Layers that two ranges have in common, over those that either has; 1 for two empty ranges."""
    union = set(first) | set(second)
    return len(set(first) & set(second)) / len(union) if union else 1.0


def resampled_curves(subject: SubjectEffects, config: SelectConfig) -> dict[str, ResampledCurves]:
    """Means of every measure by layer over bootstrap resamples of the facts, the same resamples for all measures."""
    measures = {
        "state": subject.state,
        "mlp_severed": subject.mlp_severed,
        "attn_severed": subject.attn_severed,
        "mlp_window": subject.window,
        "ablation": ablation(subject)[0] if subject.single_severed else None,
    }
    traced = {name: effects for name, effects in measures.items() if effects is not None}
    means = bootstrap_means(np.hstack(list(traced.values())), seed=config.seed, resamples=config.resamples)
    curves = dict(zip(traced, np.split(means, len(traced), axis=1), strict=True))
    curves["gap"] = curves["state"] - curves["mlp_severed"]
    curves["contribution"] = contribution(curves["gap"])
    return curves


def bootstrap_selections(
    subject: SubjectEffects, resampled: Mapping[str, ResampledCurves], config: SelectConfig, has_site: bool
) -> dict[str, BootstrapSelections]:
    """Apply every traced rule to all facts and to each resample; without an early site, no rule selects on all facts.

    Raises:
        InputError: the effects for the rule asked for were not traced.
    """
    window = None if subject.window is None else subject.window.mean(0)
    curves = MeanCurves(gap=subject.gap.mean(0), window=window, spans=subject.spans)
    windows = resampled.get("mlp_window", [None] * config.resamples)
    of_resamples = [
        replace(curves, gap=gap, window=window) for gap, window in zip(resampled["gap"], windows, strict=True)
    ]
    names = traced_rules(curves)
    if config.rule not in names:
        raise InputError(
            f"the effects hold no MLP windows at subject_last, which the rule {brief(config.rule)} needs; trace again "
            f"with kinds state and mlp"
        )
    return {
        name: BootstrapSelections(
            layers=RULES[name](curves, config) if has_site else (),
            counts=Counter(RULES[name](of_resample, config) for of_resample in of_resamples),
        )
        for name in names
    }
