"""JSON records with their place in the file, so that every complaint names file, record and field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechedit.errors import InputError
from mechedit.files import read_text


@dataclass(frozen=True)
class Record:
    """A JSON object and where it stands."""

    fields: dict[str, Any]
    where: str
    """The file and the record or line in it, for messages."""
    index: int = 0
    """Its place among the file's records, counted from 0."""

    def __contains__(self, name: str) -> bool:
        return self.fields.get(name) is not None

    def need(self, *names: str) -> Any:
        """The first of these fields that is there.

        Raises:
            InputError: none is.
        """
        for name in names:
            if name in self:
                return self.fields[name]
        found = ", ".join(name for name in self.fields if name in self) or "nothing"
        raise InputError(f"{self.where} has no field {names[0]!r} (found: {found}); add it")

    def text(self, *names: str) -> str:
        """The first of these fields that is there, which must be text."""
        return self._checked(self.need(*names), names[0])

    def optional(self, name: str) -> str | None:
        """A text, or None when the field is absent or null."""
        return self.text(name) if name in self else None

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, empty when the field is absent or null."""
        return tuple(self._checked(text, f"{name}[{i}]") for i, text in enumerate(self.items(name)))

    def items(self, name: str) -> list[Any]:
        """A list, empty when the field is absent or null."""
        value = self.fields.get(name) or []
        if not isinstance(value, list):
            # A text would pass for a list of its letters.
            raise InputError(f"{self.where}: {name} is {value!r}, expected a list: put it in [ ]")
        return value

    def part(self, name: str) -> Record:
        """An object within this one."""
        return self._within(self.need(name), name)

    def parts(self, name: str) -> Iterator[Record]:
        """The objects of a list, none when the field is absent."""
        for i, value in enumerate(self.items(name)):
            yield self._within(value, f"{name}[{i}]")

    def id(self, *names: str) -> str:
        """The record's name: a text or a whole number."""
        value = self.need(*names)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise InputError(f"{self.where}: {names[0]} is {value!r}, expected text or a whole number: mend it")
        return str(value)

    def _within(self, value: Any, name: str) -> Record:
        where = f"{self.where}: {name}"
        if not isinstance(value, dict):
            raise InputError(f"{where} is {value!r}, expected a JSON object: mend it")
        return Record(value, where)

    def _checked(self, value: Any, name: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise InputError(
                f"{self.where}: the {name} is {value!r}, expected text that is not empty: fill it in or drop the record"
            )
        return value


def read_records(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Read a JSON list, or one JSON object a line, as (record, place in the file) pairs.

    Raises:
        InputError: no such file; not JSON (the message names the line); a record that is no JSON object.
    """
    text = read_text(path)
    pairs = _of_list(text, path) if text.lstrip().startswith("[") else list(_of_lines(text, path))
    for record, where in pairs:
        if not isinstance(record, dict):
            raise InputError(f"{where} is a {type(record).__name__}, expected a JSON object; mend that record")
    return pairs


def _of_list(text: str, path: Path) -> list[tuple[Any, str]]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{str(path)!r} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}; mend the file"
        ) from error
    return [(record, f"{str(path)!r}, record {i}") for i, record in enumerate(records, 1)]


def _of_lines(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line), f"{str(path)!r}, line {number}"
        except json.JSONDecodeError as error:
            raise InputError(
                f"{str(path)!r}, line {number} is not JSON: column {error.colno}: {error.msg}; "
                f"expected one JSON object a line: mend that line"
            ) from error
