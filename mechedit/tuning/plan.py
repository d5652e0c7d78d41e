"""How the edits of a budget are dealt out: successive halving over windows, then one setting after another.

The windows come first: of the best few, a dozen facts often prefer one that others do not, while the settings of the
search seldom change anything. So none of these is tried until the windows have 40 facts.

An edit is one search for z, of one fact at one layer with one setting of the search. Windows that end at the same layer
share it, and so do all λ; what these cost is to be written and scored, a tenth of a search or less.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from mechedit.errors import InputError

ENDS = (12, 8, 6, 5, 4, 3, 2)
"""Numbers of end layers that a search may begin with, the most thorough first."""
ENOUGH = 40
"""Facts that the last windows are compared with before any setting of the search is tried."""
FACTS = (16, 12, 8, 4)
"""Facts that they should be compared with where a budget is too small for that: as many ends are tried as leave so
many."""
MOST_EDITS = 100_000_000
"""Edits of any budget at most."""
FEW_ENDS = 4
"""End layers below which a plan goes only where facts are fewest."""
FEWEST = 4
"""Facts without which no setting is compared."""
RUNGS = 3
"""Most rounds of halving."""
WIDE_ENDS = 2
"""End layers at which other widths are tried, the best ones."""
WIDTHS, WEIGHTS = 6, 8
"""Widths that are tried at one end layer, and λ on the best window, about."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds that the parts of a search take."""

    edit: float | int
    """One search for z at the middle one of the end layers."""
    low_edit: float | int
    """One at the lowest end layer, above which most blocks are run."""
    trial: float | int
    """One choice of window and settings written and scored, besides its facts."""
    fact: float | int
    """Each fact that is written and scored in a trial."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A round in which each of some end layers is tried with the same facts."""

    ends: int
    """End layers."""
    facts: int
    """Facts."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a search for settings tries."""

    rungs: tuple[Rung, ...]
    """The rounds of halving; the facts of a later one include those of the earlier ones."""
    neighbors: int
    """End layers beside the best that are tried after that, with the facts of the last round."""
    searched: tuple[str, ...]
    """Settings of the search for z that are tried on the best window alone, each with two values."""
    selected: int = 0
    """1 where a window that a trace selected is tried with the facts of the last round in any case, else 0."""

    @property
    def facts(self) -> int:
        """Facts of the last round, and of all that follows."""
        return self.rungs[-1].facts

    @property
    def edits(self) -> int:
        """Edits that the plan takes at most."""
        total, before = 0, 0
        for rung in self.rungs:
            total += rung.ends * (rung.facts - before)
            before = rung.facts
        return total + (self.neighbors + self.selected + 2 * len(self.searched)) * self.facts

    def seconds(self, speed: Speed) -> float | int:
        """Time that the plan takes at most, about: after the first round all windows may be low ones."""
        trials = [(2 * rung.ends, rung.facts) for rung in self.rungs]
        after = 2 * (self.neighbors + self.selected) + WIDE_ENDS * WIDTHS + 2 * WEIGHTS + 2 * len(self.searched)
        trials.append((after, self.facts))
        written = sum(count * (speed.trial + facts * speed.fact) for count, facts in trials)
        first = self.rungs[0].ends * self.rungs[0].facts
        return speed.edit * first + speed.low_edit * (self.edits - first) + written

    def in_words(self) -> str:
        """What is tried, for those who wait for it."""
        rungs = ", then ".join(f"{rung.ends} end layers with {rung.facts} facts" for rung in self.rungs)
        beside = f", {self.neighbors} beside the best" if self.neighbors else ""
        selected = ", the selected window" if self.selected else ""
        searched = f", {', '.join(self.searched)} with two more values each" if self.searched else ""
        return (
            f"{rungs}{beside}{selected}; widths at the best {WIDE_ENDS}; on the best, λ{searched}: "
            f"at most {self.edits} edits"
        )


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What a search for settings chooses among."""

    ends: int
    """End layers that there are to try."""
    requests: int
    """Facts that there are, at least `FEWEST`."""
    searched: tuple[str, ...] = ()
    """Settings of the search for z, the most important first."""
    fixed: bool = False
    """Whether all end layers must be tried, because windows were chosen, and none beside them."""
    selected: bool = False
    """Whether a trace selected a window, which is tried whatever its score in the first rounds."""

    def end_counts(self) -> list[int]:
        """Numbers of end layers to begin with, the most thorough first."""
        if self.fixed or self.ends < ENDS[-1]:
            return [self.ends]
        return sorted({min(count, self.ends) for count in ENDS}, reverse=True)

    def most_facts(self, edits: int, ends: int, n_searched: int) -> int:
        """Most facts with which a plan of this shape stays within the budget; 0 where none does."""
        counts = range(FEWEST, self.requests + 1)
        fitting = bisect_right(counts, edits, key=lambda facts: self.plan(facts, ends, n_searched).edits)
        return counts[fitting - 1] if fitting else 0

    def plan(self, facts: int, ends: int, n_searched: int) -> Plan:
        """The plan that begins with so many end layers, ends with so many facts, and tries so many settings."""
        counts = [ends]
        while counts[-1] > 3 and len(counts) < RUNGS:
            counts.append(-(-counts[-1] // 2))
        rungs = tuple(
            Rung(ends=count, facts=max(2, facts >> (len(counts) - 1 - index))) for index, count in enumerate(counts)
        )
        # Where all are tried with all facts, or none is left beside them, nothing more is to be searched for.
        selected = self.selected and (len(rungs) > 1 or ends < self.ends)
        neighbors = 0 if self.fixed or ends == self.ends else 2
        searched = self.searched[:n_searched]
        return Plan(rungs=rungs, neighbors=neighbors, searched=searched, selected=int(selected))


def make_plan(edits: int, scope: Scope) -> Plan:
    """The most thorough plan within a budget.

    Raises:
        InputError: the budget is too small for any plan.
    """
    counts = scope.end_counts()
    enough = ENOUGH if scope.ends > 1 else FACTS[0]
    for n_searched in range(len(scope.searched), 0, -1):
        facts = scope.most_facts(edits, counts[0], n_searched)
        if facts >= min(enough, scope.requests):
            return scope.plan(facts, counts[0], n_searched)
    for least in FACTS:
        for count in counts:
            facts = scope.most_facts(edits, count, 0)
            enough_ends = count >= min(FEW_ENDS, scope.ends) or least == FEWEST
            if enough_ends and facts >= min(least, scope.requests):
                return scope.plan(facts, count, 0)
    smallest = smallest_plan(scope)
    raise InputError(
        f"the budget is {edits} edits, expected at least {smallest.edits} ({smallest.in_words()}); raise it"
    )


def smallest_plan(scope: Scope) -> Plan:
    """The plan with fewest edits."""
    return min((scope.plan(FEWEST, count, 0) for count in scope.end_counts()), key=lambda plan: plan.edits)


def plan_for_seconds(seconds: float | int, speed: Speed, scope: Scope) -> Plan:
    """The most thorough plan that takes no more than so many seconds at a speed.

    Raises:
        InputError: even the smallest plan takes longer.
    """
    low = smallest_plan(scope).edits

    def takes(edits: int) -> float | int:
        return make_plan(edits, scope).seconds(speed)

    if takes(low) > seconds:
        raise InputError(
            f"the budget is {seconds / 60:.2g} minutes, expected at least {takes(low) / 60:.2g} at {speed.edit:.2g} "
            f"to {speed.low_edit:.2g} seconds per edit ({make_plan(low, scope).in_words()}); raise it"
        )
    high = max(low + 1, int(min(seconds / speed.edit, MOST_EDITS)) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if takes(middle) <= seconds else (low, middle)
    return make_plan(low, scope)
