"""Warnings that name the line of the user's own code from which they come."""

from __future__ import annotations

import sys
import warnings

_PASSED_THROUGH = frozenset(("mechedit", "contextlib", "functools", "jaxtyping", "beartype", "torch"))
"""Packages whose lines tell a user nothing: ours, and those of decorators around our functions."""


class ImplausibleEditWarning(UserWarning):
    """An edit is implausible, which a search that tries edits need not say of each."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn with the place of the nearest call from outside of mechedit and of the decorators around its functions."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_THROUGH:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
