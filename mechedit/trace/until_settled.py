"""Trace facts in random order until what they show has settled, or a budget ends.

Rounds grow: after each one a judge looks at all effects so far. Facts of different rounds run in different batches,
with the same noise: its scale is measured on the subjects of all facts, and each fact's draws come from its id.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import pandas as pd
from typing_extensions import TypedDict

from mechedit import ranks
from mechedit.bounds import check_numbers
from mechedit.data import Fact
from mechedit.errors import InputError, check_at_least, check_positive
from mechedit.files import read_checked_object, write_checked_json, write_parquet, write_parquet_parts
from mechedit.models import Model, exclusive
from mechedit.records import Number, check_record
from mechedit.tables import where
from mechedit.trace.config import TraceConfig
from mechedit.trace.corruption import embedding_statistics
from mechedit.trace.folder import TRACE_PARTS, facts_frame, trace_dealt, trace_plans
from mechedit.trace.trace import TracePlan
from mechedit.trace.traced_fact import Dropped, known_facts, require_known

BLOCK = 50
"""Facts of which it is looked up at once whether the model knows them."""
NOT_REACHED = "it was not traced, because the facts before it were enough or took the whole budget"
"""Why a fact that the model may know was left out."""


@dataclass(frozen=True, kw_only=True)
class UntilSettled:
    """How many facts are traced before their effects are first looked at, and when to stop in any case."""

    first_facts: int = 20
    """Known facts traced before the selection is first looked at."""
    growth: float | int = 1.5
    """Factor by which the facts of a round exceed those of the round before."""
    minutes: float | int | None = None
    """Minutes after which no further round begins, in all calls of an interrupted trace; None for no limit."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_at_least("first_facts", self.first_facts, 2)
        check_at_least("growth", self.growth, 1.1, "choose a larger factor")
        check_positive("minutes", self.minutes, optional=True)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judge says of the effects so far."""

    settled: bool
    """Whether no more facts are needed."""
    record: dict[str, Any]
    """What it saw, as the effects' attrs hold it."""


Judge = Callable[[pd.DataFrame], Verdict]
"""Looks at the effects so far at the subject's last token."""
Notify = Callable[[dict[str, Any]], object]


@exclusive
def trace_until_settled(
    model: Model,
    facts: Sequence[Fact],
    config: TraceConfig,
    until: UntilSettled,
    judge: Judge,
    folder: Path,
    *,
    least: int,
    notify: Notify = lambda record: None,
) -> dict[str, Any]:
    """Trace facts in seeded random order until the judge calls them settled, and write effects.parquet, facts.parquet.

    Finished groups lie in trace_parts/ until the step is finished, so that an interrupted trace goes on after them.

    Args:
        model: any `Model`.
        facts: facts to trace at most.
        config: of the trace; its seed also orders the facts.
        until: size of the rounds, and the limit of time.
        judge: looks at the effects after each round.
        folder: for the files.
        least: fewest facts that the model must know.
        notify: told the record of each round.

    Returns:
        As `trace_to_folder`, and with `rounds` (the judge's records with the number of `facts`) and `stopped`:
        `settled`, `facts` (all were traced) or `minutes`.

    Raises:
        InputError: replaced subjects or an approximation, which need all facts at once; fewer known facts than `least`.
    """
    corruption = config.corrupted_by.distribution
    if corruption == "tokens" or config.approximation is not None:
        what = "an approximate trace" if config.approximation else "a corruption by other subjects' tokens"
        raise InputError(
            f"facts are to be traced until the selection settles, and {what} looks at all facts at once; expected "
            f"noise and exact effects: leave one of the two out"
        )
    order, parts = list(facts), folder / TRACE_PARTS
    random.Random(config.seed).shuffle(order)
    group = ranks.current()
    statistics = group.from_first(
        lambda: embedding_statistics(
            model, [fact.subject for fact in order], covariance_root=corruption == "multivariate"
        ),
        "the statistics of embeddings",
    )
    seconds, dropped = _Seconds.at(parts / "seconds.json"), list[Dropped]()
    known, plans = known_in_order(model, order, dropped), list[list[TracePlan]]()
    at_subject: list[pd.DataFrame] = []
    rounds: list[dict[str, Any]] = []
    stopped, size = "facts", max(until.first_facts, least)
    while True:
        new = list(itertools.islice(known, size - n_traced(plans)))
        if new:
            plans.append(trace_plans(model, new, config, parts, statistics=statistics))
        # What is planned is not traced yet: a refusal leaves nothing.
        require_known(n_traced(plans), len(order), [*dropped, *_dropped(plans)], least)
        if not new:
            break
        trace_dealt(plans[-1])

        def judged() -> tuple[Verdict, bool]:
            at_subject.extend(where(frame, role="subject_last") for plan in plans[-1] for frame in plan)
            effects = pd.concat(at_subject, ignore_index=True)
            effects.attrs = {**plans[0][0].attrs, "n_facts": n_traced(plans)}
            verdict = judge(effects)
            seconds.save()
            return verdict, until.minutes is not None and seconds.passed() >= 60 * until.minutes

        verdict, time_is_up = group.from_first(judged, "the look at the effects so far")
        rounds.append({"facts": n_traced(plans), **verdict.record})
        notify(rounds[-1])
        if verdict.settled or time_is_up:
            stopped = "settled" if verdict.settled else "minutes"
            break
        size = max(size + 1, math.ceil(size * until.growth))
    outcome = {"rounds": rounds, "stopped": stopped}
    return group.from_first(lambda: _write(folder, facts, config, plans, dropped, outcome), "the files of the trace")


def known_in_order(model: Model, facts: Sequence[Fact], dropped: list[Dropped]) -> Iterator[Fact]:
    """The facts that the model knows, in order, looked up as far as they are needed.

    Args:
        model: completes them.
        facts: in order.
        dropped: to which the facts that it does not know are added, with the reasons.
    """
    for begin in range(0, len(facts), BLOCK):
        block = facts[begin : begin + BLOCK]
        known, unknown = ranks.current().from_first(
            functools.partial(known_facts, model, block), "the facts that the model knows"
        )
        dropped += unknown
        yield from (traced.fact for traced in known)


def n_traced(plans: Sequence[Sequence[TracePlan]]) -> int:
    """Number of facts in the rounds so far."""
    return sum(len(of_round[0].facts) for of_round in plans)


def _dropped(plans: Sequence[Sequence[TracePlan]]) -> list[Dropped]:
    """The facts that rounds left out, with the reasons."""
    return [pair for of_round in plans for pair in of_round[0].dropped]


def _write(
    folder: Path,
    facts: Sequence[Fact],
    config: TraceConfig,
    plans: Sequence[Sequence[TracePlan]],
    dropped: Sequence[Dropped],
    outcome: dict[str, Any],
) -> dict[str, Any]:
    """Write the files of a finished trace, and return the attrs of its effects."""
    all_dropped = [*dropped, *_dropped(plans)]
    attrs = {
        **plans[0][0].attrs,
        "config": config.plain(),
        "n_facts": n_traced(plans),
        "dropped": [list(pair) for pair in all_dropped],
        **outcome,
    }
    frames = itertools.chain.from_iterable(plan for of_round in plans for plan in of_round)
    write_parquet_parts(folder / "effects.parquet", frames, attrs)
    traced = {entry.fact.id for of_round in plans for entry in of_round[0].facts}
    known_names = {*traced, *(name for name, _ in all_dropped)}
    not_reached = [(fact.id, NOT_REACHED) for fact in facts if fact.id not in known_names]
    write_parquet(
        folder / "facts.parquet", facts_frame(facts, folder / "effects.parquet", [*all_dropped, *not_reached])
    )
    return attrs


class SecondsRecord(TypedDict):
    """The content of seconds.json."""

    seconds: Number


@dataclass
class _Seconds:
    """The time that a trace has taken, in all calls."""

    file: Path
    before: float | int
    """Seconds of earlier calls."""
    begin: float | int
    """When this call began."""

    @staticmethod
    def at(file: Path) -> _Seconds:
        """The time in a file; none without the file."""
        if not file.is_file():
            return _Seconds(file, 0.0, monotonic())
        remedy = "remove it, and the time is counted from now on"
        content = read_checked_object(file, remedy=remedy)
        check_record(content, SecondsRecord, repr(str(file)), remedy)
        check_at_least(f"the seconds in {str(file)!r}", content["seconds"], 0, remedy)
        return _Seconds(file, content["seconds"], monotonic())

    def passed(self) -> float | int:
        """Seconds so far."""
        return self.before + monotonic() - self.begin

    def save(self) -> None:
        """Write the file."""
        write_checked_json(self.file, {"seconds": self.passed()})
