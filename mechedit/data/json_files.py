"""`read_records`: the records of a JSON file, however it holds them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mechedit.errors import InputError, brief
from mechedit.files import parse_json, read_text

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
    try:
        pairs = _read_list(text, path) if text.lstrip().startswith("[") else list(_read_objects(text, path))
    except InputError:
        raise
    except (RecursionError, ValueError):
        pairs = [(parse_json(text, repr(str(path)), "fix the file"), repr(str(path)))]
    if len(pairs) == 1 and isinstance(pairs[0][0], dict):
        pairs = _unwrapped(pairs[0][0], pairs[0][1], path)
    escapes = "\\ud" in text.lower()  # only escapes can name half a character
    for record, location in pairs:
        if not isinstance(record, dict):
            raise InputError(f"{location} is a {type(record).__name__}, expected a JSON object; fix that record")
        if escapes:
            _check_characters(record, location)
    return pairs


def _check_characters(record: dict[str, Any], location: str) -> None:
    """Refuse a record with half of a surrogate pair, which no file and no tokenizer takes.

    Raises:
        InputError: names the record.
    """
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{location} holds {brief(error.object[error.start : error.end])}, half of a surrogate pair; expected "
            f"whole "
            f"characters: fix its encoding"
        ) from error


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
    start, number = 0, 1
    while start < len(text):
        end = _line_end(text, start)
        if line := text[start:end].strip():
            location = f"{str(path)!r}, line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                value, end = _read_over_lines(text, start, number, path)
                end = _line_end(text, end)
            yield value, location
        number += text.count("\n", start, end) + 1
        start = end + 1


def _read_over_lines(text: str, start: int, number: int, path: Path) -> tuple[Any, int]:
    """The value that begins in a line and goes on in the next ones, and its end.

    Args:
        text: of the file.
        start: where the line begins.
        number: of the line, from 1.
        path: of the file.

    Raises:
        InputError: names the line at which the value breaks off: the first, if that is not the start of any value.
    """
    end = _line_end(text, start)
    line, following = text[start:end], text[end : end + 1000].lstrip()
    try:
        value, value_end = _DECODER.raw_decode(text, start + len(line) - len(line.lstrip()))
        if not text[value_end : _line_end(text, value_end)].strip():
            return value, value_end
        broken = None
    except json.JSONDecodeError as error:
        broken = error
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        goes_on = error.pos >= len(line.rstrip()) or line.strip() in ("{", "[")
        # Where the next line starts a record, it is this line that was cut short.
        if broken is not None and goes_on and following and not following.startswith("{"):
            raise InputError(
                f"{str(path)!r}, line {broken.lineno} is not JSON: column {broken.colno}: {broken.msg}; fix the object "
                f"that starts in line {number}"
            ) from broken
        raise InputError(
            f"{str(path)!r}, line {number} is not JSON: column {error.colno}: {error.msg}; expected one JSON object "
            f"per line: fix that line"
        ) from error
    raise AssertionError("a line that is JSON is read as a line")


def _line_end(text: str, start: int) -> int:
    """The index of the line feed that ends the line of `start`, or of the text's end."""
    end = text.find("\n", start)
    return len(text) if end < 0 else end


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
        (
            record if "id" in record or "case_id" in record else {**record, "id": name},
            f"{str(path)!r}, record {brief(name)}",
        )
        for name, record in content.items()
    ]


def _holds_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
