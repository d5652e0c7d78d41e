"""What a user hung onto a model's modules: forward hooks and replaced forwards, each with where it was written.

Copies of the model carry them along. A hook that only looks is harmless; one that changes what a module returns is not
part of any checkpoint, and usually a leftover of an earlier experiment.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

_LIBRARIES = ("torch", "transformers", "accelerate", "peft")
"""Packages whose own hooks belong to the model."""


def user_hooks(hf: Any) -> list[str]:
    """A phrase for each hook and replaced forward that is not of a library: "module 'x' has a forward hook f of …"."""
    return [
        f"module {name!r} has {kind} {_where(function)}" if name else f"the model has {kind} {_where(function)}"
        for name, module in hf.named_modules()
        for kind, function in _functions(module)
        if not _is_of_library(function)
    ]


def _functions(module: Any) -> Iterator[tuple[str, Any]]:
    for hook in module._forward_pre_hooks.values():
        yield "a forward pre-hook", hook
    for hook in module._forward_hooks.values():
        yield "a forward hook", hook
    # accelerate replaces forwards, and says so.
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        yield "a replaced forward", module.__dict__["forward"]


def _is_of_library(function: Any) -> bool:
    package = str(getattr(_innermost(function), "__module__", "")).partition(".")[0]
    return package in _LIBRARIES


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _where(function: Any) -> str:
    """A function's name, file and line; the type where it has none."""
    function = _innermost(function)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        code = function if inspect.isroutine(function) else type(function)
        path, line = inspect.getsourcefile(code), inspect.getsourcelines(code)[1]
    except (OSError, TypeError):
        return name
    return f"{name} (of {path}, line {line})"
