"""JSON records with their location in the file, so that error messages name file, record and field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechedit.errors import InputError
from mechedit.files import read_text


@dataclass(frozen=True)
class JsonRecord:
    """A JSON object and its location; its methods read fields and check their types."""

    fields: dict[str, Any]
    location: str
    """The file and the record or line in it, for messages."""
    index: int = 0
    """Index among the file's records, from 0."""

    def __contains__(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def require(self, *names: str) -> Any:
        """The first of these fields that the record has.

        Raises:
            InputError: it has none of them.
        """
        for name in names:
            if name in self:
                return self.fields[name]
        present = ", ".join(name for name in self.fields if name in self) or "nothing"
        raise InputError(f"{self.location} has no field {names[0]!r} (found: {present}); add it")

    def text(self, *names: str) -> str:
        """The first of these fields that the record has, which must be text."""
        return self._checked_text(self.require(*names), names[0])

    def optional(self, name: str) -> str | None:
        """A text, or None when the field is absent or null."""
        return self.text(name) if name in self else None

    def literal(self, name: str) -> str | None:
        """A text that may be blank or empty, or None when the field is absent or null."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{self.location}: the {name} is {value!r}, expected text: fix it")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, empty when the field is absent or null."""
        return tuple(self._checked_text(text, f"{name}[{i}]") for i, text in enumerate(self.items(name)))

    def items(self, name: str) -> list[Any]:
        """A list, empty when the field is absent or null."""
        value = self.fields.get(name) or []
        if not isinstance(value, list):
            # A text would pass for a list of its letters.
            raise InputError(f"{self.location}: {name} is {value!r}, expected a list: put it in [ ]")
        return value

    def nested(self, name: str) -> JsonRecord:
        """The object in a field."""
        return self._nested_record(self.require(name), name)

    def nested_list(self, name: str) -> Iterator[JsonRecord]:
        """The objects in a list, none when the field is absent."""
        for i, value in enumerate(self.items(name)):
            yield self._nested_record(value, f"{name}[{i}]")

    def id(self, *names: str) -> str:
        """The record's id: a text or a whole number."""
        value = self.require(*names)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise InputError(f"{self.location}: {names[0]} is {value!r}, expected text or a whole number: fix it")
        return str(value)

    def _nested_record(self, value: Any, name: str) -> JsonRecord:
        location = f"{self.location}: {name}"
        if not isinstance(value, dict):
            raise InputError(f"{location} is {value!r}, expected a JSON object: fix it")
        return JsonRecord(value, location)

    def _checked_text(self, value: Any, name: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise InputError(
                f"{self.location}: the {name} is {value!r}, expected text that is not empty: fill it in or drop the "
                f"record"
            )
        return value


def read_records(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Read a JSON list, or one JSON object per line, as pairs of a record and its location.

    Raises:
        InputError: no such file; not JSON (the message names the line); a record that is not a JSON object.
    """
    text = read_text(path)
    pairs = _read_list(text, path) if text.lstrip().startswith("[") else list(_read_lines(text, path))
    for record, location in pairs:
        if not isinstance(record, dict):
            raise InputError(f"{location} is a {type(record).__name__}, expected a JSON object; fix that record")
    return pairs


def _read_list(text: str, path: Path) -> list[tuple[Any, str]]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{str(path)!r} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}; fix the file"
        ) from error
    return [(record, f"{str(path)!r}, record {i}") for i, record in enumerate(records, 1)]


def _read_lines(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line), f"{str(path)!r}, line {number}"
        except json.JSONDecodeError as error:
            raise InputError(
                f"{str(path)!r}, line {number} is not JSON: column {error.colno}: {error.msg}; "
                f"expected one JSON object per line: fix that line"
            ) from error
