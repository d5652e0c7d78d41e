"""Settings of the selection: the rule, its bounds, and how certain it must be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mechedit.bounds import check_numbers
from mechedit.errors import InputError, brief, check_at_least, check_choice, check_fraction

Rule = Literal["contribution", "gap-peak", "mlp-window", "moving-average"]


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """The rule that selects layers, its bounds, and how certain it must be."""

    rule: str = "contribution"
    """Rule that selects the layers: contribution, gap-peak, mlp-window or moving-average."""
    share: float | int = 0.9
    """Part of the gap's largest fall (`contribution`) or of its peak (`gap-peak`) that the range must hold."""
    min_width: int | None = None
    """Fewest layers; a narrower range grows by its better neighbor."""
    max_width: int | None = None
    """Most layers; a wider range shrinks to its best part of this width."""
    width: int | None = None
    """Width of the range of `moving-average`; None means 5, scaled to depth below 28 layers."""
    metric: str | None = None
    """Metric of the effects; None means probability, or the only metric traced."""
    resamples: int = 1000
    """Bootstrap resamples of the facts, and random signs in the test for an early site."""
    overlap: float | int = 0.8
    """Overlap (intersection over union) from which on a resample's range counts as agreeing with the selected one."""
    agreement: float | int = 0.8
    """Share of resamples that must agree for the selection to be settled."""
    confidence: float | int = 0.95
    """Coverage of the intervals, and one minus the level of the test for an early site."""
    min_facts: int = 10
    """Fewest facts; with fewer, percentile intervals cover the truth too seldom (measured in the tests)."""
    seed: int = 0
    """Seed of the resamples and of the random signs."""

    def __post_init__(self) -> None:
        check_numbers(self, resamples=1_000_000, width=10_000, min_width=10_000, max_width=10_000)
        check_choice("the rule", self.rule, get_args(Rule))
        for name in ("share", "overlap", "agreement"):
            if getattr(self, name) != 1:
                check_fraction(name, getattr(self, name), "choose a number above 0 and up to 1")
        check_fraction("confidence", self.confidence)
        for name in ("min_width", "max_width", "width", "resamples", "min_facts"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{name} is {brief(value)}, expected a whole number of at least 1")
        low, high = self.min_width or 1, self.max_width or math.inf
        if low > high:
            raise InputError(f"min_width is {low} and max_width {high}, expected min_width up to max_width")
        if self.width is not None and not low <= self.width <= high:
            raise InputError(f"width is {self.width}, expected a number from min_width to max_width ({low} to {high})")
        check_at_least("resamples", self.resamples, 100, "choose more, as fewer give no interval")
        # Flipping signs gives 2^n outcomes, so that fewer facts could never show an early site.
        least = math.ceil(-math.log2(1 - self.confidence))
        check_at_least(
            "min_facts", self.min_facts, least, f"so few facts can show nothing with confidence {self.confidence}"
        )
