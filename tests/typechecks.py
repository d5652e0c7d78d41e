"""The type checker of `--jaxtyping-packages`: beartype, which writes the check of a nested function only once.

jaxtyping hands over a function with an empty body, that has a signature to check and nothing else. For a function
inside another, this happens at every call of that one, and to write the check takes longer than most such functions.
"""

from __future__ import annotations

import inspect
from typing import Any

from beartype import beartype

_CHECKS: dict[tuple[str, str, str], Any] = {}


def checked(function: Any) -> Any:
    """As `beartype`."""
    if "<locals>" not in function.__qualname__:
        return beartype(function)
    key = (function.__module__, function.__qualname__, str(inspect.signature(function)))
    if key not in _CHECKS:
        _CHECKS[key] = beartype(function)
    return _CHECKS[key]
