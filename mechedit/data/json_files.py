"""`read_records`: the records of a JSON file, however it holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mechedit.errors import InputError
from mechedit.files import read_text

WRAPPERS = ("data", "records", "requests", "facts", "edits", "examples", "items", "rows", "train", "test", "validation")
"""Fields under which files keep the list of their records."""
SINGLE = ("requested_rewrite", "edit")
"""Fields that hold an object in a record of its own, and so do not name a record."""

Located = tuple[Any, str]
"""A value and its location, for messages."""

_DECODER = json.JSONDecoder()


def read_records(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Read the records of a JSON file as pairs of a record and its location.

    A file holds a list; or objects one after the other, each in a line or over several lines; or one object with the
    list in a field such as `data`; or one object of records by their ids, which become their `id` unless they have one.

    Raises:
        InputError: no such file; not JSON (the message names the line); a record that is not a JSON object; two lists.
    """
    text = read_text(path)
    pairs = _read_list(text, path) if text.lstrip().startswith("[") else list(_read_objects(text, path))
    if len(pairs) == 1 and isinstance(pairs[0][0], dict):
        pairs = _unwrapped(pairs[0][0], pairs[0][1], path)
    for record, location in pairs:
        if not isinstance(record, dict):
            raise InputError(f"{location} is a {type(record).__name__}, expected a JSON object; fix that record")
    return pairs


def _read_list(text: str, path: Path) -> list[Located]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{str(path)!r} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}; fix the file"
        ) from error
    return _numbered(records, path)


def _numbered(records: list[Any], path: Path) -> list[Located]:
    return [(record, f"{str(path)!r}, record {i}") for i, record in enumerate(records, 1)]


def _read_objects(text: str, path: Path) -> Iterator[Located]:
    """Yield one value per line; a value that goes on in the next lines is read to its end."""
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        first, number = number, number + 1
        if not lines[first].strip():
            continue
        location = f"{str(path)!r}, line {first + 1}"
        try:
            yield json.loads(lines[first]), location
        except json.JSONDecodeError as error:
            rest = "\n".join(lines[first:])
            value, end = _read_over_lines(rest, error, first, location)
            number = first + 1 + rest[:end].count("\n")
            yield value, location


def _read_over_lines(text: str, line_error: json.JSONDecodeError, first: int, location: str) -> tuple[Any, int]:
    """The value that starts a text and goes on over several lines, and its end.

    Raises:
        InputError: names the line at which the value breaks off: the first, if that is not the start of any value.
    """
    start = len(text) - len(text.lstrip())
    first_line, _, following = text.partition("\n")
    goes_on = line_error.pos >= len(first_line.rstrip()) or first_line.strip() in ("{", "[")
    problem = line_error
    try:
        value, end = _DECODER.raw_decode(text, start)
        if not text[end:].split("\n", 1)[0].strip():
            return value, end
    except json.JSONDecodeError as error:
        # Where the next line starts a record, it is this line that was cut short.
        if goes_on and following.strip() and not following.lstrip().startswith("{"):
            number = first + error.lineno
            raise InputError(
                f"{location.rpartition(', ')[0]}, line {number} is not JSON: column {error.colno}: {error.msg}; fix "
                f"the object that starts in line {first + 1}"
            ) from error
    raise InputError(
        f"{location} is not JSON: column {problem.colno}: {problem.msg}; expected one JSON object per line: fix that "
        f"line"
    ) from problem


def _unwrapped(content: dict[str, Any], location: str, path: Path) -> list[Located]:
    """The records of a file that is one object: that object, the list in it, or the records by their ids."""
    lists = [name for name in WRAPPERS if _holds_records(content.get(name))]
    if len(lists) > 1:
        raise InputError(
            f"{str(path)!r} holds records in {' and in '.join(lists)}, expected one list of them: make a file of each"
        )
    if lists:
        return _numbered(content[lists[0]], path)
    if not content or any(not isinstance(value, dict) or name in SINGLE for name, value in content.items()):
        return [(content, location)]
    return [
        (record if "id" in record or "case_id" in record else {**record, "id": name}, f"{str(path)!r}, record {name!r}")
        for name, record in content.items()
    ]


def _holds_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
