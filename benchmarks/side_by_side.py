"""Ours between two parts of the published schedule's work, so that whatever else the machine does slows both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from benchmarks.machine import Peak, Result, timed

Other = TypeVar("Other")


@dataclass(frozen=True)
class SideBySide(Generic[Result, Other]):
    """Results, seconds and memory of both."""

    ours: Result
    published: list[Other]
    """One result a part."""
    seconds: float
    """Of ours."""
    published_seconds: float
    """Of all parts, scaled to the work of which they are a drawn part."""
    memory: tuple[float, float]
    """GiB that the published schedule and ours took beyond what was there."""


def side_by_side(
    ours: Callable[[], Result], parts: Sequence[Callable[[], Other]], device: str, *, drawn_part: float = 1.0
) -> SideBySide[Result, Other]:
    """Run the first half of the published parts, ours, and the other half.

    Args:
        ours: all of the work.
        parts: the published schedule on the same work or a part of it, at least one.
        device: where both run.
        drawn_part: the part of the work that the published schedule runs.
    """
    middle = (len(parts) + 1) // 2
    published: list[Other] = []
    seconds, memory = 0.0, 0.0
    own_result, own_seconds, own_memory = None, 0.0, 0.0
    for half in (parts[:middle], None, parts[middle:]):
        peak = Peak(device)
        if half is None:
            own_result, own_seconds = timed(ours, device)
            own_memory = peak.taken()
        else:
            results, took = timed(lambda half=half: [part() for part in half], device)
            published, seconds, memory = published + results, seconds + took, max(memory, peak.taken())
    return SideBySide(own_result, published, own_seconds, seconds / drawn_part, (memory, own_memory))  # type: ignore[arg-type]
