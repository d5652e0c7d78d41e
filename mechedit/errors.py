"""The one error that users are meant to read, and the checks of arguments and settings that raise it.

Every check takes the name by which the message calls the value, the value, and what is expected of it; `hint` is the
remedy with which the message ends.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor

from mechedit.split_tensors import whole

_BRIEF = 80
"""Characters of a value that a message shows."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class InputError(ValueError):
    """Bad input: the message says what was found, what was expected and what to do.

    The command line prints it as one line and exits with 2.
    """


class DiskError(InputError):
    """A disk that does not take or give a file, which says nothing of what was to be computed."""


def check_choice(name: str, value: object, choices: Iterable[str], hint: str = "choose one of them") -> None:
    """Raise InputError unless `value` is one of `choices`."""
    legal = list(choices)
    if value not in legal:
        raise InputError(f"{name} is {brief(value)}, expected one of {', '.join(legal)}; {hint}")


def check_positive(name: str, value: object, hint: str = "choose a larger number", *, optional: bool = False) -> None:
    """Raise InputError unless `value` is a number above 0 (infinity is, NaN is not), or None where it is `optional`."""
    if not (optional and value is None) and not (_is_number(value) and value > 0):
        raise InputError(f"{name} is {brief(value)}, expected a number above 0; {hint}")


def check_at_least(
    name: str, value: object, least: float | int, hint: str = "choose a larger number", *, optional: bool = False
) -> None:
    """Raise InputError unless `value` is a number of at least `least`, or None where it is `optional`."""
    if not (optional and value is None) and not (_is_number(value) and value >= least):
        raise InputError(f"{name} is {brief(value)}, expected at least {least:g}; {hint}")


def check_characters(name: str, text: str) -> None:
    """Raise InputError where a text holds half of a surrogate pair, which no file and no tokenizer takes.

    Bytes that are no UTF-8 come so from the command line and the environment.
    """
    if not text.isascii() and _SURROGATE.search(text):
        raise InputError(
            f"{name} is {brief(text)}, which holds half of a surrogate pair; expected whole characters: fix its "
            f"encoding"
        )


def read_whole(name: str, text: str, most: int) -> int:
    """Read a whole number of at most `most` from its decimal digits.

    The digits are counted before they are read: Python refuses numbers of over 4,300 digits.

    Raises:
        InputError: it is larger, or no whole number.
    """
    digits = text.strip().lstrip("0")
    if not text.strip().isdecimal() or len(digits) > len(str(most)) or int(digits or 0) > most:
        raise InputError(f"{name} is {text:.40}, expected a whole number from 0 to {most:,}; choose another")
    return int(digits or 0)


def check_fraction(name: str, value: object, hint: str = "choose a number such as 0.95") -> None:
    """Raise InputError unless `value` is a number between 0 and 1, neither of them included."""
    if not (_is_number(value) and 0 < value < 1):
        raise InputError(f"{name} is {brief(value)}, expected a number between 0 and 1; {hint}")


def check_finite(name: str, value: Tensor | float | int) -> None:
    """Raise InputError when `value` holds NaN or infinity, saying how many.

    Args:
        name: name of the tensor, in the plural ("the keys"), or of the number.
        value: a tensor of any shape, or a number.
    """
    if not isinstance(value, Tensor):
        if not math.isfinite(value):
            raise InputError(f"{name} is {value}, expected a finite number; choose another")
        return
    bad = count_not_finite(value)
    if bad:
        raise InputError(
            f"{name} hold {bad} values of {value.numel()} that are not finite, expected none; look for an "
            f"overflow (half precision?) or damaged weights where they come from"
        )


def count_not_finite(value: Tensor) -> int:
    """Count the entries that are NaN or infinite."""
    # One pass: a sum is not finite where a term is not. Finite terms may add up to infinity, so that is no proof.
    return 0 if math.isfinite(float(whole(value.sum()))) else int(whole((~torch.isfinite(value)).sum()))


def is_interrupt(error: BaseException) -> bool:
    """Whether an interrupt led to an error: code that cleans up after it may fail, and then that error is seen."""
    pending, seen = [error], set[int]()
    while pending:
        error = pending.pop()
        if isinstance(error, KeyboardInterrupt):
            return True
        if id(error) not in seen:
            seen.add(id(error))
            pending += [cause for cause in (error.__cause__, error.__context__) if cause is not None]
    return False


def brief(value: object) -> str:
    """A value for a message, cut short; a number of more than 4,300 digits cannot be written out."""
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > _BRIEF:
            return f"{text[:_BRIEF]} …"
    return text


def _pieces(value: object) -> Iterator[str]:
    """The text of a value piece by piece: lists that hold one list many times may be as long as memory when written."""
    if isinstance(value, list | tuple) and type(value) in (list, tuple):  # others are written otherwise
        yield "[" if isinstance(value, list) else "("
        for index, item in enumerate(value):
            yield ", " if index else ""
            yield from _pieces(item)
        yield "]" if isinstance(value, list) else ",)" if len(value) == 1 else ")"
    elif isinstance(value, dict) and type(value) is dict:
        yield "{"
        for index, (key, item) in enumerate(value.items()):
            yield ", " if index else ""
            yield from _pieces(key)
            yield ": "
            yield from _pieces(item)
        yield "}"
    else:
        try:
            yield repr(value[: 2 * _BRIEF]) if isinstance(value, str) else repr(value).replace("\n", " ")
        except ValueError:
            yield "a number of thousands of digits"


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says, cut short, or its type where it says nothing."""
    return shortened((str(error).strip() or type(error).__name__).splitlines()[0], 2 * _BRIEF)


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters, and a sign where it was cut."""
    return text if len(text) <= most else f"{text[: most - 2].rstrip()} …"


def shortened_inside(text: str, most: int) -> str:
    """A text of at most so many characters, with its beginning and its end, and a sign where it was cut."""
    end = (most - 3) // 2
    return text if len(text) <= most else f"{text[: most - 3 - end].rstrip()} … {text[-end:].lstrip()}"


def brief_list(names: Iterable[object], most: int = 3 * _BRIEF) -> str:
    """Names between commas for a message, cut after so many characters; "nothing" where there are none."""
    text = ", ".join(map(str, names)) or "nothing"
    return text if len(text) <= most else f"{text[:most]} …"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)
