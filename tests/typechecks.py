"""Types and shapes are checked while tests run: by beartype, at the first calls of each function in each test.

jaxtyping hands over a function with an empty body, that has a signature to check and nothing else. For a function
inside another, this happens at every call of that one, and to write the check takes longer than most such functions: it
is written once. Checks of every call would take more time than the tests themselves; later calls of a function in a
test are checked now and then. A function without arrays needs no shapes, and beartype alone checks it, which takes a
fraction of jaxtyping's time. Checks are written when a function is called first.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import beartype

FIRST = 3
"""Calls of a function that are checked in each test."""
EVERY = 200
"""Of the calls after these, one in so many is."""
_CHECKS: dict[tuple[str, str, str], Any] = {}


def checked(function: Any) -> Any:
    """As `beartype`."""
    if "<locals>" not in function.__qualname__:
        return beartype(function)
    key = (function.__module__, function.__qualname__, str(inspect.signature(function)))
    if key not in _CHECKS:
        _CHECKS[key] = beartype(function)
    return _CHECKS[key]


def is_sampled(call: int) -> bool:
    """Whether a test's call of a function, counted from 1, is checked."""
    return call <= FIRST or call % EVERY == 0


def takes_arrays(function: Any) -> bool:
    """Whether a shape is annotated, by a type of jaxtyping or by a name that stands for one."""
    return any(_holds_array(hint, function.__globals__) for hint in function.__annotations__.values())


def _holds_array(hint: Any, names: dict[str, Any]) -> bool:
    if isinstance(hint, str):
        return any(_holds_array(names[word], names) for word in re.findall(r"\w+", hint) if word in names)
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractDtype | jaxtyping.AbstractArray):
        return True
    return any(_holds_array(part, names) for part in get_args(hint) if not isinstance(part, str))


class Sampling:
    """`jaxtyping.jaxtyped` for functions whose calls are checked in part."""

    def __init__(self, jaxtyped: Callable[..., Any]) -> None:
        self.jaxtyped = jaxtyped
        self.test = 0
        self.made: Counter[tuple[str, str]] = Counter()

    def begin(self) -> None:
        """Begin a test: the first calls of each function are checked again."""
        self.test += 1
        self.made.clear()

    def __call__(self, *arguments: Any, typechecker: Any) -> Any:
        """As `jaxtyping.jaxtyped`."""
        decorate = self.jaxtyped(*arguments, typechecker=typechecker)

        def decorated(function: Any) -> Any:
            if not inspect.isfunction(function):
                return decorate(function)
            if "<locals>" in function.__qualname__:
                # Made anew at every call of the one around it: there each counts as a call.
                name = (function.__module__, function.__qualname__)
                self.made[name] += 1
                return decorate(function) if is_sampled(self.made[name]) else function
            checking, calls, test = None, 0, -1

            @functools.wraps(function)
            def sampled(*args: Any, **kwargs: Any) -> Any:
                nonlocal checking, calls, test
                calls, test = (calls + 1 if test == self.test else 1), self.test
                if not is_sampled(calls):
                    return function(*args, **kwargs)
                if checking is None:
                    checking = (decorate if takes_arrays(function) else typechecker)(function)
                return checking(*args, **kwargs)

            return sampled

        return decorated


SAMPLING = Sampling(jaxtyping.jaxtyped)
"""What the import hook's decorators find: this module is imported before the package."""
jaxtyping.jaxtyped = SAMPLING  # type: ignore[assignment]
