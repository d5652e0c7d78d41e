"""How the edits of a budget are dealt out: successive halving over windows, then one setting after another.

An edit is one search for z, of one fact at one layer with one setting of the search. Windows that end at the same layer
share it, and so do all λ; what these cost is to be written and scored, a tenth of a search or less.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from mechedit.errors import InputError

ENDS = (12, 8, 6, 5, 4, 3, 2)
"""Numbers of end layers that a search may begin with, the most thorough first."""
FACTS = (16, 12, 8, 4)
"""Facts that the last windows should be compared with: as many ends and settings are tried as leave so many."""
MOST_EDITS = 100_000_000
"""Edits of any budget at most."""
FEW_ENDS = 4
"""End layers below which a plan goes only where facts are fewest."""
FEWEST = 4
"""Facts without which no setting is compared."""
RUNGS = 3
"""Most rounds of halving."""
WIDTHS, WEIGHTS = 5, 8
"""Widths and λ that are tried on the best window, about."""


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
        return total + (self.neighbors + 2 * len(self.searched)) * self.facts

    def seconds(self, speed: Speed) -> float | int:
        """Time that the plan takes at most, about: after the first round all windows may be low ones."""
        trials = [(2 * rung.ends, rung.facts) for rung in self.rungs]
        trials.append((2 * self.neighbors + WIDTHS + 2 * WEIGHTS + 2 * len(self.searched), self.facts))
        written = sum(count * (speed.trial + facts * speed.fact) for count, facts in trials)
        first = self.rungs[0].ends * self.rungs[0].facts
        return speed.edit * first + speed.low_edit * (self.edits - first) + written

    def in_words(self) -> str:
        """What is tried, for those who wait for it."""
        rungs = ", then ".join(f"{rung.ends} end layers with {rung.facts} facts" for rung in self.rungs)
        beside = f", {self.neighbors} beside the best" if self.neighbors else ""
        searched = f", {', '.join(self.searched)} with two more values each" if self.searched else ""
        return f"{rungs}{beside}; on the best, widths and λ{searched}: at most {self.edits} edits"


def make_plan(edits: int, ends: int, requests: int, searched: tuple[str, ...], *, fixed: bool = False) -> Plan:
    """The most thorough plan within a budget.

    Args:
        edits: the budget.
        ends: end layers that there are to try.
        requests: facts that there are, at least `FEWEST`.
        searched: settings of the search for z, the most important first.
        fixed: whether all end layers must be tried, because windows were chosen, and none beside them.

    Raises:
        InputError: the budget is too small for any plan.
    """
    shapes = [
        (count, names, _most_facts(edits, count, names, requests, fixed))
        for count, names in _shapes(ends, searched, fixed)
    ]
    for least in FACTS:
        for count, names, facts in shapes:
            enough_ends = count >= min(FEW_ENDS, ends) or least == FEWEST
            if enough_ends and facts >= min(least, requests):
                return _plan(facts, count, names, fixed)
    smallest = smallest_plan(ends, searched, fixed=fixed)
    raise InputError(
        f"the budget is {edits} edits, expected at least {smallest.edits} ({smallest.in_words()}); raise it"
    )


def smallest_plan(ends: int, searched: tuple[str, ...], *, fixed: bool = False) -> Plan:
    """The plan with fewest edits."""
    plans = [_plan(FEWEST, count, names, fixed) for count, names in _shapes(ends, searched, fixed)]
    return min(plans, key=lambda plan: plan.edits)


def plan_for_seconds(
    seconds: float | int,
    speed: Speed,
    ends: int,
    requests: int,
    searched: tuple[str, ...],
    *,
    fixed: bool = False,
) -> Plan:
    """The most thorough plan that takes no more than so many seconds at a speed.

    Raises:
        InputError: even the smallest plan takes longer.
    """
    low = smallest_plan(ends, searched, fixed=fixed).edits
    arguments = (ends, requests, searched)

    def takes(edits: int) -> float | int:
        return make_plan(edits, *arguments, fixed=fixed).seconds(speed)

    if takes(low) > seconds:
        raise InputError(
            f"the budget is {seconds / 60:.2g} minutes, expected at least {takes(low) / 60:.2g} at {speed.edit:.2g} "
            f"to {speed.low_edit:.2g} seconds per edit ({make_plan(low, *arguments, fixed=fixed).in_words()}); raise it"
        )
    high = max(low + 1, int(min(seconds / speed.edit, MOST_EDITS)) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if takes(middle) <= seconds else (low, middle)
    return make_plan(low, *arguments, fixed=fixed)


def _shapes(ends: int, searched: tuple[str, ...], fixed: bool) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Numbers of end layers with settings to try, the most thorough first: settings go before ends do."""
    counts = [ends] if fixed or ends < ENDS[-1] else sorted({min(count, ends) for count in ENDS}, reverse=True)
    for index, count in enumerate(counts):
        last = index == len(counts) - 1
        for n_searched in range(len(searched), -1 if last else max(0, len(searched) - 2 - index), -1):
            yield count, searched[:n_searched]


def _most_facts(edits: int, ends: int, searched: tuple[str, ...], requests: int, fixed: bool) -> int:
    """Most facts with which a plan of this shape stays within the budget; 0 where none does."""
    counts = range(FEWEST, requests + 1)
    fitting = bisect_right(counts, edits, key=lambda facts: _plan(facts, ends, searched, fixed).edits)
    return counts[fitting - 1] if fitting else 0


def _plan(facts: int, ends: int, searched: tuple[str, ...], fixed: bool) -> Plan:
    counts = [ends]
    while counts[-1] > 3 and len(counts) < RUNGS:
        counts.append(-(-counts[-1] // 2))
    rungs = tuple(
        Rung(ends=count, facts=max(2, facts >> (len(counts) - 1 - index))) for index, count in enumerate(counts)
    )
    return Plan(rungs=rungs, neighbors=0 if fixed or ends < ENDS[-1] else 2, searched=searched)
