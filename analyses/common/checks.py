"""Numbers of a command line, checked before anything is loaded."""

from __future__ import annotations

import argparse

from mechedit.bounds import LARGEST, LARGEST_WHOLE
from mechedit.errors import InputError, brief, check_at_least

COUNTS = frozenset(
    ("count", "max_facts", "samples", "cases", "per_relation", "draws", "min_records", "training", "words", "documents")
)  # fmt: skip
"""Options that say of how many a result is made, so that 0 leaves nothing to show."""


def check_options(options: argparse.Namespace) -> None:
    """Refuse numbers that no option of the scripts takes.

    Raises:
        InputError: names the option whose number is negative, too large or not finite, or 0 where that leaves nothing.
    """
    for name, value in vars(options).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_number(option_name(name), value)
        if name in COUNTS and value is not None:
            check_at_least(option_name(name), value, 1, "choose more, or leave it out for the default")


def check_number(option: str, value: float | int, least: float = 0.0, most: float | None = None) -> None:
    """Refuse a number outside a range, by default that of all settings.

    Raises:
        InputError: names the option and the range.
    """
    most = (LARGEST_WHOLE if isinstance(value, int) else LARGEST) if most is None else most
    if not least <= value <= most:  # nor is NaN
        raise InputError(f"{option} is {brief(value)}, expected a number from {least:g} to {most:g}; choose another")


def option_name(name: str) -> str:
    """The option whose value argparse calls so."""
    return "--" + name.replace("_", "-")
