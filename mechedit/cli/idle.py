"""Options that nothing reads, because of what others say: refused, since whoever gave one meant something by it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import MISSING, Field, fields
from typing import Any

from mechedit.errors import InputError

_typed: ContextVar[Collection[str]] = ContextVar("typed", default=())


@contextlib.contextmanager
def typed_options(names: Collection[str]) -> Iterator[None]:
    """Let `refuse_idle` know the parameters of the options that the command line names, also with their defaults."""
    token = _typed.set(names)
    try:
        yield
    finally:
        _typed.reset(token)


def refuse_idle(
    *settings: Any, names: Collection[str], reason: str, option_names: Mapping[str, str] | None = None
) -> None:
    """Refuse options whose value is not the default, or that the command line names.

    Args:
        *settings: the dataclasses that the command got.
        names: of their fields that nothing reads.
        reason: what the option is for, and what to do; follows its name in the message.
        option_names: names of options that are not their fields'.

    Raises:
        InputError: names the first of them.
    """
    for chosen in settings:
        for field in fields(chosen):
            option = (option_names or {}).get(field.name, field.name)
            is_set = option in _typed.get() or getattr(chosen, field.name) != _default(field)
            if field.name in names and is_set:
                raise InputError(f"--{option.rstrip('_').replace('_', '-')} {reason}")


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default
