"""Choices that lie at the end of what was tried: better ones may lie beyond."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mechedit.tuning.alternatives import WEIGHT, changed, settable, unit_of
from mechedit.tuning.trial import Trial


def end_warnings(
    base: Any, trials: Sequence[Trial], chosen: Trial, ends: Sequence[int], searched: Sequence[str]
) -> list[str]:
    """A sentence for each choice at the end of what was tried, unless nothing can lie beyond.

    Args:
        base: the settings that the search began with.
        trials: all that was tried.
        chosen: the choice.
        ends: end layers that could have been tried, ascending.
        searched: settings of the search for z that were tried.
    """
    names = [name for name in (WEIGHT, *searched) if settable(base, name)]
    warnings = [
        _window_warning(base, trials, chosen, ends),
        _width_warning(base, trials, chosen),
        *(_value_warning(base, trials, chosen, name) for name in names),
    ]
    return [warning for warning in warnings if warning is not None]


def value_of(base: Any, trial: Trial, name: str) -> Any:
    """The value that a trial has of a setting, in the unit that it uses."""
    config = changed(base, trial.changes)
    return getattr(config, unit_of(config, name))


def _end(base: Any, trial: Trial) -> int:
    return base.target_layer(trial.window.layers)


def _window_warning(base: Any, trials: Sequence[Trial], chosen: Trial, ends: Sequence[int]) -> str | None:
    tried, end = sorted({_end(base, trial) for trial in trials}), _end(base, chosen)
    if len(tried) > 1 and ((end == tried[-1] and end < ends[-1]) or (end == tried[0] and end > ends[0])):
        which = "last" if end == tried[-1] else "first"
        return (
            f"{chosen.window} end at layer {end}, the {which} that was tried; better ones may lie beyond: try windows "
            f"there"
        )
    return None


def _width_warning(base: Any, trials: Sequence[Trial], chosen: Trial) -> str | None:
    widths = sorted({trial.window.width for trial in trials if _end(base, trial) == _end(base, chosen)})
    if len(widths) > 1 and chosen.window.width == widths[-1] and chosen.window.first > 0:
        return f"{chosen.window} are the widest that were tried; better ones may lie beyond: try wider windows"
    return None


def _value_warning(base: Any, trials: Sequence[Trial], chosen: Trial, name: str) -> str | None:
    unit, value = unit_of(changed(base, chosen.changes), name), value_of(base, chosen, name)
    in_unit = [trial for trial in trials if unit_of(changed(base, trial.changes), name) == unit]
    values = sorted({value_of(base, trial, name) for trial in in_unit})
    if len(values) > 1 and value in (values[0], values[-1]) and value != 0:
        which = "smallest" if value == values[0] else "largest"
        return f"{unit} is {value:g}, the {which} that was tried; better values may lie beyond"
    return None
