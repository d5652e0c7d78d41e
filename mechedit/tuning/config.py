"""How much a search for settings may cost, and which windows it looks at."""

from __future__ import annotations

from dataclasses import dataclass

from mechedit.bounds import check_numbers, check_sequences
from mechedit.errors import InputError, check_at_least, check_positive
from mechedit.sweep import Window
from mechedit.tuning.plan import MOST_EDITS

MINUTES = 20
"""Budget where none is set."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Budget of a search for settings, and the windows that it looks at."""

    minutes: float | int | None = None
    """Minutes that the search may take, without second moments; by default 20, where no edits are given. They become
    a number of edits by the speed of the first ones."""
    edits: int | None = None
    """Edits that the search may take: searches for z of one fact at one layer, which take nearly all of its time. The
    same number gives the same result on any machine of the same products."""
    windows: tuple[Window, ...] | None = None
    """Windows to edit, such as 1-4,2-5; by default some that are spread over the depth."""
    width: int | None = None
    """Width of these in layers; None means 5, scaled to depth below 28 layers."""
    facts: int = 64
    """Most facts that a setting is tried with."""
    seed: int = 0
    """Seed of the order of the facts and of the bootstrap."""

    def __post_init__(self) -> None:
        check_sequences(self)
        check_numbers(self, width=10_000, facts=1_000_000, edits=MOST_EDITS)
        check_positive("minutes", self.minutes, optional=True)
        check_at_least("edits", self.edits, 1, optional=True)
        check_at_least("width", self.width, 1, optional=True)
        check_at_least("facts", self.facts, 4, "fewer say nothing of a setting")
        if self.minutes is not None and self.edits is not None:
            raise InputError(
                f"the budget is {self.minutes:g} minutes and {self.edits} edits, expected one of the two; leave the "
                f"other out"
            )
