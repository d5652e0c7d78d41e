"""JSON records with their location in the file, so that error messages name file, record and field."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from mechedit.data.characters import visible
from mechedit.errors import InputError, brief, brief_list

NOTE_MARK = "_"
"""A field whose name starts so is its author's note and is not read."""


class UnclearRecordError(InputError):
    """One record does not say what is needed of it; it can be left out of a file whose other records do."""

    def __init__(self, message: str, reason: str) -> None:
        """Keep the reason in a few words, for the list of records that are left out."""
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class JsonRecord:
    """A JSON object and its location; its methods read fields and check their types.

    An empty field (null, NaN, a blank text, a list or an object of nothing else) is an absent one.
    """

    fields: dict[str, Any]
    location: str
    """The file and the record or line in it, for messages."""
    index: int = 0
    """Index among the file's records, from 0."""

    @property
    def name(self) -> str:
        """The record's id or index, whatever they are, by which a list of records names it."""
        return str(next((self.fields[name] for name in ("id", "case_id", "known_id") if name in self), self.index))

    @cached_property
    def present(self) -> frozenset[str]:
        """Names of the fields that are not empty."""
        return frozenset(name for name, value in self.fields.items() if not is_empty(value))

    def __contains__(self, name: str) -> bool:
        return name in self.present

    def require(self, *names: str) -> Any:
        """The first of these fields that the record has.

        Raises:
            UnclearRecordError: it has none of them.
        """
        for name in names:
            if name in self:
                return self.fields[name]
        reason = f"no {names[0]}"
        if blank := [name for name in names if isinstance(self.fields.get(name), str)]:
            raise self.unclear(
                f"the {blank[0]} is {brief(self.fields[blank[0]])}, expected text that is not empty: fill it in or "
                f"drop the "
                f"record",
                reason,
            )
        present = brief_list(name for name in self.fields if name in self.present)
        raise UnclearRecordError(f"{self.location} has no field {brief(names[0])} (found: {present}); add it", reason)

    def unclear(self, problem: str, reason: str) -> UnclearRecordError:
        """The error that this record is unclear."""
        return UnclearRecordError(f"{self.location}: {problem}", reason)

    def text(self, *names: str) -> str:
        """The first of these fields that the record has, which must be text."""
        value = self.require(*names)
        return self._checked_text(value, next(name for name in names if name in self))

    def optional(self, name: str) -> str | None:
        """A text, or None when the field is absent or empty."""
        return self.text(name) if name in self else None

    def literal(self, name: str) -> str | None:
        """A text that may be blank or empty, or None when the field is absent or null."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{self.location}: the {name} is {brief(value)}, expected text: fix it")
        return value

    def answer(self, name: str) -> str:
        """A text; of a list of answers, or of lists of an answer's names, the first."""
        value = self.require(name)
        while isinstance(value, list):
            value = next(item for item in value if not is_empty(item))
        return self._checked_text(value, name)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts without empty ones; none when the field is absent."""
        return tuple(self._checked_text(text, f"{name}[{i}]") for i, text in self._items(name))

    def text_or_texts(self, name: str) -> tuple[str, ...]:
        """A text or a list of texts, without empty ones; none when the field is absent."""
        return (self.text(name),) if isinstance(self.fields.get(name), str) and name in self else self.texts(name)

    def items(self, name: str) -> list[Any]:
        """A list without empty items; empty when the field is absent."""
        return [item for _, item in self._items(name)]

    def nested(self, name: str) -> JsonRecord:
        """The object in a field."""
        return self._nested_record(self.require(name), name)

    def nested_list(self, name: str) -> Iterator[JsonRecord]:
        """The objects in a list without empty ones; none when the field is absent."""
        for i, value in self._items(name):
            yield self._nested_record(value, f"{name}[{i}]")

    def id(self, *names: str) -> str:
        """The record's id, a text or a whole number; without one its index in the file, from 0."""
        name = next((name for name in names if name in self), None)
        if name is None:
            return str(self.index)
        value = self.fields[name]
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise InputError(f"{self.location}: {name} is {brief(value)}, expected text or a whole number: fix it")
        return str(value)

    def require_known(self, known: Collection[str]) -> None:
        """Refuse a field that nothing reads, unless it is empty or its name starts with `_`.

        Raises:
            InputError: names the field, and the known one that is most like it.
        """
        extra = self.present.difference(known)
        unknown = [name for name in self.fields if name in extra and not name.startswith(NOTE_MARK)]
        if unknown:
            raise InputError(
                f"{self.location} has a field {brief(unknown[0])}, which nothing reads; {meant(unknown[0], known)}: "
                f"rename "
                f"it, drop it, or put {NOTE_MARK} before its name"
            )

    def _items(self, name: str) -> Iterator[tuple[int, Any]]:
        """The items of a list that are not empty, with their indices."""
        if name not in self:
            return
        value = self.fields[name]
        if not isinstance(value, list):
            # A text would pass for a list of its letters.
            raise InputError(f"{self.location}: {name} is {brief(value)}, expected a list: put it in [ ]")
        for i, item in enumerate(value):
            if not is_empty(item):
                yield i, item

    def _nested_record(self, value: Any, name: str) -> JsonRecord:
        location = f"{self.location}: {name}"
        if not isinstance(value, dict):
            raise InputError(f"{location} is {brief(value)}, expected a JSON object: fix it")
        return JsonRecord(value, location)

    def _checked_text(self, value: Any, name: str) -> str:
        if not isinstance(value, str) or is_empty(value):
            raise InputError(
                f"{self.location}: the {name} is {brief(value)}, expected text that is not empty: fill it in or drop "
                f"the "
                f"record"
            )
        return value


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, NaN, a blank text, a list or an object of nothing else."""
    if isinstance(value, str):
        return not (value and (value[0].isalnum() or visible(value)))
    if isinstance(value, list):
        return all(is_empty(item) for item in value)
    if isinstance(value, dict):
        return all(is_empty(item) for item in value.values())
    return value is None or (isinstance(value, float) and math.isnan(value))


def meant(name: str, known: Collection[str]) -> str:
    """Say which known name is most like an unknown one; without any that is, which are known."""
    matches = get_close_matches(name.lower(), known, n=1)
    return f"{brief(matches[0])} may be meant" if matches else f"expected some of {brief_list(known)}"
