"""How fast searches for z and trials are, by which minutes become edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from mechedit.errors import DiskError, InputError
from mechedit.sweep import Window
from mechedit.tuning.alternatives import Changes
from mechedit.tuning.plan import Speed

FACTS = 6
"""Facts by which the speed is measured."""
TimedSweep = Callable[[Sequence[Window], Changes, int, Path], object]
"""Edits windows with some settings and so many facts, with targets in a folder."""


def measure_speed(
    sweep: TimedSweep,
    windows: Sequence[Window],
    settings: Sequence[Changes],
    facts: int,
    blocks_above: Callable[[Window], int],
) -> Speed:
    """Time one fact and a few, with the search for z and again without it, on the middle window that can be edited.

    Nothing that was searched for before helps, and nothing is kept.

    Args:
        sweep: what is timed.
        windows: to choose from.
        settings: tried one after another until a window can be edited with them.
        facts: that there are.
        blocks_above: blocks that a window's search runs.

    Raises:
        InputError: no window can be edited.
    """
    few, many = 1, min(FACTS, facts)
    window, (_, scored_few, searched, scored_many) = _time_sweeps(sweep, windows, settings, (few, many))
    per_fact = max(scored_many - scored_few, 0.0) / (many - few)
    per_edit = max(searched - scored_many, 0.1 * searched) / (many - few)
    above, most_above = blocks_above(window), max(map(blocks_above, windows))
    return Speed(
        edit=per_edit, low_edit=per_edit * most_above / above, trial=max(scored_few - per_fact, 0.0), fact=per_fact
    )


def _time_sweeps(
    sweep: TimedSweep, windows: Sequence[Window], settings: Sequence[Changes], counts: Sequence[int]
) -> tuple[Window, list[float]]:
    """The window, and for each number of facts the seconds with the search and without it."""
    reason = ""
    for window in sorted(windows, key=lambda window: abs(windows.index(window) - len(windows) // 2)):
        for changes in settings:
            try:
                with TemporaryDirectory() as folder:
                    return window, [
                        _seconds(sweep, window, changes, facts, Path(folder)) for facts in counts for _ in range(2)
                    ]
            except DiskError:
                raise
            except InputError as error:  # another window or λ may do
                reason = str(error)
    raise InputError(f"no window can be edited: {reason}")


def _seconds(sweep: TimedSweep, window: Window, changes: Changes, facts: int, folder: Path) -> float:
    begin = monotonic()
    sweep([window], changes, facts, folder)
    return monotonic() - begin
