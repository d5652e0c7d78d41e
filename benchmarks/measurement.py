"""One line of a benchmark: both schedules' times of a step on a shape, and whether its goal is reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

RATIO_GOALS = {
    "cpu": {"targets": 8.0, "trace": 6.0, "severed trio": 6.0, "keys": 5.0},
    "cuda": {"targets": 30.0, "trace": 20.0, "severed trio": 20.0, "keys": 5.0},
}
"""How many times faster than the published schedule a step must be."""
RATE_STEPS = ("trace", "severed trio")
RATE_GOAL = 0.8
"""The steps that reach their goal as well by this share of the machine's rate of matrix products."""
MOMENTS_STEPS = ("moments", "late moments")
MOMENTS_GOAL = 0.9
"""Share of the quotient of both schedules' operations that the ratio of these steps must have."""
MOMENTS_RATE = 2 / 3
"""Share of the machine's rate that they must have as well: one and a half times the time of the necessary products."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Both schedules side by side in one process."""

    shape: str
    about: str
    """The model, for people."""
    step: str
    what: str
    """The amounts."""
    unit: str
    """Unit of the times: `s`, or `ms a cell`."""
    published: float
    """Time of the published schedule, extrapolated where it was run on a drawn part."""
    mechedit: float
    difference: float
    """Largest relative difference of the results; from float64, where something was held against that."""
    tolerance: float
    quotient: float | None
    """Operations of the published schedule over the necessary ones; None where they are not counted."""
    rate: float | None
    """Rate of the necessary operations, as a share of the machine's rate of large matrix products."""
    memory: tuple[float, float]
    """GiB that the published schedule and mechedit took beyond what was there."""
    device: str
    dtype: str
    threads: int
    rounding: float = 0.0
    """Largest difference of the published schedule's own results from float64, where they were held against that."""

    @property
    def ratio(self) -> float:
        """How many times faster mechedit is."""
        return self.published / self.mechedit

    @property
    def equal(self) -> bool:
        """Whether both give the same numbers, as far as the published schedule is sure of them.

        A difference that is not a number is none.
        """
        return self.difference <= max(self.tolerance, self.rounding)

    @property
    def goal(self) -> str:
        """The goal in words; empty where there is none."""
        ratio = self._ratio_goal
        if ratio is None:
            return ""
        if self.step in MOMENTS_STEPS:
            return f"{MOMENTS_GOAL} × quotient = {ratio:.2g}x and {MOMENTS_RATE:.0%} of the rate"
        return f"{ratio:.2g}x or {RATE_GOAL:.0%} of the rate" if self.step in RATE_STEPS else f"{ratio:.2g}x"

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached and the numbers are equal; None where there is no goal."""
        ratio = self._ratio_goal
        if ratio is None:
            return None
        rate = 0.0 if self.rate is None else self.rate
        if self.step in MOMENTS_STEPS:
            return self.equal and self.ratio >= ratio and rate >= MOMENTS_RATE
        return self.equal and (self.ratio >= ratio or (self.step in RATE_STEPS and rate >= RATE_GOAL))

    @property
    def rate_for_goal(self) -> float | None:
        """The share of the machine's rate at which the necessary operations would reach the goal.

        Above 1 the goal is out of reach on this machine: the published schedule's own rate leaves no room for it.
        """
        ratio = self._ratio_goal
        if ratio is None or self.rate is None:
            return None
        return max(self.rate * ratio / self.ratio, MOMENTS_RATE if self.step in MOMENTS_STEPS else 0)

    @property
    def _ratio_goal(self) -> float | None:
        if self.step in MOMENTS_STEPS:
            return None if self.quotient is None else MOMENTS_GOAL * self.quotient
        return RATIO_GOALS["cuda" if self.device.startswith("cuda") else "cpu"].get(self.step)

    def plain(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self)

    @staticmethod
    def of(record: dict[str, Any]) -> Measurement:
        """The measurement that `plain` wrote."""
        return Measurement(**{**record, "memory": tuple(record["memory"])})

    def __str__(self) -> str:
        counted = "" if self.quotient is None else f" of {self.quotient:.1f}x fewer operations"
        rate = "" if self.rate is None else f", necessary operations at {self.rate:.0%} of the matrix rate"
        verdict = "" if self.reached is None else f"; goal {self.goal}: {'reached' if self.reached else 'MISSED'}"
        return (
            f"{self.shape}, {self.step} ({self.what}): published {self.published:.4g} {self.unit}, mechedit "
            f"{self.mechedit:.4g}: {self.ratio:.1f}x{counted}{rate}; largest difference {self.difference:.1e}; "
            f"{self.memory[0]:.2f} and {self.memory[1]:.2f} GiB{verdict}"
        )


def summary(measurements: Sequence[Measurement]) -> str:
    """Which goals are reached, a line each, and how many."""
    judged = [measurement for measurement in measurements if measurement.reached is not None]
    lines = [
        f"{'reached' if entry.reached else 'MISSED '}  {entry.shape:8} {entry.step:13} {entry.ratio:5.1f}x (goal "
        f"{entry.goal}{'' if entry.rate is None else f'; {entry.rate:.0%} of the rate'}"
        f"{'' if entry.equal else f'; NOT EQUAL: {entry.difference:.1e}'})"
        for entry in judged
    ]
    reached = sum(bool(entry.reached) for entry in judged)
    return "\n".join([*lines, f"{reached} of {len(judged)} goals reached"])
