"""Options that nothing reads, because of what others say: refused, since whoever gave one meant something by it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from mechedit.errors import InputError


def refuse_idle(
    *settings: Any, names: Collection[str], reason: str, option_names: Mapping[str, str] | None = None
) -> None:
    """Refuse options whose value is not the default.

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
            if field.name in names and getattr(chosen, field.name) != _default(field):
                option = (option_names or {}).get(field.name, field.name).rstrip("_").replace("_", "-")
                raise InputError(f"--{option} {reason}")


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default
