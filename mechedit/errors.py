"""The one error that users are meant to read, and the checks that raise it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class InputError(ValueError):
    """Bad input: the message says what was found, what was expected and what to do.

    The command line prints it as one line and exits with 2.
    """


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise InputError when `value` is none of `choices`."""
    if value not in choices:
        raise InputError(f"{name} is {value!r}, expected one of {', '.join(choices)}; choose one of them")


def check_positive(config: Any, *names: str) -> None:
    """Raise InputError when one of these settings is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise InputError(f"{name} is {getattr(config, name)}, expected more than 0; choose a larger number")


def check_at_least(value: float | int, least: float | int, what: str, *, strictly: bool = False) -> None:
    """Raise InputError unless `value` is a number of at least `least` (or above it)."""
    if not math.isfinite(value) or value < least or (strictly and value == least):
        raise InputError(f"{what} is {value}, expected a number {'above' if strictly else 'of at least'} {least:g}")
