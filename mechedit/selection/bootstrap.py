"""Every rule on all facts and on the same bootstrap resamples of them: how often each range and layer comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mechedit.errors import InputError
from mechedit.selection.config import SelectConfig
from mechedit.selection.curves import Curves, Draws, SubjectEffects
from mechedit.selection.rules import RULES, Layers, traced_rules


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What one rule says of the facts, and of resamples of them."""

    layers: Layers
    votes: Counter[Layers]

    @property
    def modal(self) -> Layers:
        """The range given most often."""
        return self.votes.most_common(1)[0][0]

    @property
    def stability(self) -> float:
        """Share of resamples that give exactly `layers`."""
        return self.votes[self.layers] / self.votes.total()

    def membership(self, n_layers: int) -> list[float]:
        """Share of resamples whose range holds each layer."""
        held = np.zeros(n_layers)
        for layers, count in self.votes.items():
            held[list(layers)] += count
        return (held / self.votes.total()).tolist()


def vote(subject: SubjectEffects, draws: Mapping[str, Draws], config: SelectConfig, found: bool) -> dict[str, Vote]:
    """Every traced rule on all facts and on each resample; without an early site, none on all facts.

    Raises:
        InputError: the effects for the rule asked for were not traced.
    """
    mean = None if subject.window is None else subject.window.mean(0)
    whole = Curves(gap=subject.gap.mean(0), window=mean, spans=subject.spans)
    windows = draws.get("mlp_window", [None] * config.resamples)
    parts = [replace(whole, gap=gap, window=window) for gap, window in zip(draws["gap"], windows, strict=True)]
    names = traced_rules(whole)
    if config.rule not in names:
        raise InputError(
            f"the effects hold no MLP windows at subject_last, which the rule {config.rule!r} needs; trace again "
            f"with kinds state and mlp"
        )
    return {
        name: Vote(
            layers=RULES[name](whole, config) if found else (),
            votes=Counter(RULES[name](part, config) for part in parts),
        )
        for name in names
    }
