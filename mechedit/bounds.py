"""The numbers of a settings dataclass, each held against its type and range, and its sequences; its fields say which.

A field annotated `int` takes whole numbers, one with `float` also others; NaN and infinity are no settings, and none is
negative. A class's own checks narrow this where a field has a smaller range.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from mechedit.errors import InputError, brief

LARGEST_WHOLE: Final = 2**63 - 1
"""Largest whole number of any setting, a seed included: tables hold numbers of 64 bits."""
LARGEST: Final = 1e30
"""Largest other number: far above any use, and far below what float32 holds."""


def check_numbers(settings: Any, **largest: int) -> None:
    """Refuse a number of a dataclass that is of another type than its field, not finite, negative or too large.

    Args:
        settings: a value of a dataclass.
        **largest: for fields whose size decides how much memory is taken at once.

    Raises:
        InputError: names the field and its range.
    """
    for name, (integral, optional) in numeric_fields(type(settings)).items():
        value = getattr(settings, name)
        if optional and value is None:
            continue
        most = largest.get(name, LARGEST_WHOLE if integral else LARGEST)
        kind: Any = Integral if integral else Real
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 <= value <= most:
            raise InputError(
                f"{name} is {brief(value)}, expected a {'whole ' if integral else ''}number of at least 0 and at most "
                f"{format(most, ',' if integral else 'g')}; choose another"
            )


def check_sequences(settings: Any) -> None:
    """Make tuples of the fields of a dataclass that hold several values, and refuse what is no list and no tuple.

    A text would pass for its letters, and a generator holds nothing any more once somebody has looked at it.

    Args:
        settings: a value of a dataclass.

    Raises:
        InputError: names the field.
    """
    for name, optional in _sequence_fields(type(settings)).items():
        value = getattr(settings, name)
        if optional and value is None:
            continue
        if not isinstance(value, list | tuple):
            raise InputError(f"{name} is {brief(value)}, expected a list or a tuple: put what it holds between [ and ]")
        object.__setattr__(settings, name, tuple(value))


@functools.cache
def _sequence_fields(kind: type) -> dict[str, bool]:
    """The fields of a dataclass that hold several values: whether each may be None."""
    hints = get_type_hints(kind)
    kinds = {field.name: _alternatives(hints[field.name]) for field in dataclasses.fields(kind)}
    sequences = (tuple, collections.abc.Sequence)
    return {
        name: NoneType in types for name, types in kinds.items() if any(get_origin(hint) in sequences for hint in types)
    }


def _alternatives(hint: Any) -> set[Any]:
    """The types that an annotation allows."""
    return set(get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))


@functools.cache
def numeric_fields(kind: type) -> dict[str, tuple[bool, bool]]:
    """The fields of a dataclass that hold a number: whether it must be whole, and whether it may be None."""
    hints = get_type_hints(kind)
    kinds = {field.name: _alternatives(hints[field.name]) for field in dataclasses.fields(kind)}
    return {
        name: (float not in types, NoneType in types)
        for name, types in kinds.items()
        if types & {int, float} and types <= {int, float, NoneType}
    }
