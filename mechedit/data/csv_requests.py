"""Requests from a CSV file, one per line, such as facts newer than the model (MEMIT Appendix E inserts such)."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mechedit.data.facts import EditRequest
from mechedit.errors import InputError
from mechedit.files import read_text

REQUIRED = ("subject", "prompt", "target_new")
OPTIONAL = ("id", "target_true", "relation", "joint")
PARAPHRASE = re.compile(r"paraphrase(_\d+)?")

# A cell is quoted as a whole, with inner quotes doubled, or holds no quote (RFC 4180).
_CELL = r'(?:[^",]*| *"(?:[^"]|"")*")'
_LINE = re.compile(rf"{_CELL}(?:,{_CELL})*")

CsvRow = tuple[str, dict[str, str]]
"""The location of a line, for messages, and its cells by column."""


def read_csv(path: Path) -> list[EditRequest]:
    r"""Read requests from a CSV file with the columns `subject`, `prompt` (with one `{}`) and `target_new`.

    Further columns may be `id` (else the line's number), `target_true`, `relation`, `joint`, and `paraphrase`,
    `paraphrase_1`, `paraphrase_2` …; their cells may be empty. Space around a cell is dropped, except between the
    quotes of a joint, and so is a byte-order mark at the start of the file. Cells are separated by commas, and each
    lies in one line.

    Raises:
        InputError: no such file, or not UTF-8; a column that is missing, unknown or given twice; and, with the line: a
            stray quote, too many or too few cells, an empty cell where text is needed, a bad prompt.
    """
    return [_read_request(cells, location) for location, cells in _read_rows(path)]


def _read_request(cells: dict[str, str], location: str) -> EditRequest:
    for name in REQUIRED:
        if not cells[name]:
            raise InputError(f"{location}: the cell {name!r} is empty, expected text; fill it in or drop the line")
    try:
        return EditRequest(
            id=cells.get("id") or location.rpartition(" ")[2],
            subject=cells["subject"],
            prompt=cells["prompt"],
            target_new=cells["target_new"],
            target_true=cells.get("target_true") or None,
            relation=cells.get("relation") or None,
            joint=cells.get("joint") or None,
            paraphrases=tuple(text for name, text in cells.items() if PARAPHRASE.fullmatch(name) and text),
        )
    except InputError as error:
        raise InputError(f"{location}: {error}") from error


def _read_rows(path: Path) -> Iterator[CsvRow]:
    """Yield the lines after the header, without empty ones."""
    lines = _read_lines(path)
    location, header = next(lines, (f"{str(path)!r}", []))
    header = [name.strip() for name in header]
    _check_header(header, location)
    for location, cells in lines:
        if len(cells) != len(header):
            raise InputError(
                f"{location} has {len(cells)} cells, expected {len(header)} ({', '.join(header)}); "
                f"put a cell that holds a comma in double quotes"
            )
        rows = zip(header, cells, strict=True)
        yield location, {name: cell if name == "joint" else cell.strip() for name, cell in rows}


def _read_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the location of each line that is not empty, and its cells."""
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        text, location = line.removesuffix("\r"), f"{str(path)!r}, line {number}"
        if not text.strip():
            continue
        if not _LINE.fullmatch(text):
            raise InputError(
                f"{location} has a stray quote: {text!r}; expected cells without quotes, or in a pair of double quotes "
                f'with each inner one doubled, such as "the ""big"" one": fix that line'
            )
        (cells,) = csv.reader([text], strict=True, skipinitialspace=True)
        yield location, cells


def _check_header(header: list[str], location: str) -> None:
    columns = f"found: {', '.join(header) or 'nothing'}"
    if missing := [name for name in REQUIRED if name not in header]:
        raise InputError(
            f"{location} has no column {missing[0]!r} ({columns}), expected a header with {', '.join(REQUIRED)}, "
            f"separated by commas: add it"
        )
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise InputError(
            f"{location} has the column {repeated[0]!r} twice ({columns}), expected every column once: rename one"
        )
    known = (*REQUIRED, *OPTIONAL)
    if unknown := [name for name in header if name not in known and not PARAPHRASE.fullmatch(name)]:
        raise InputError(
            f"{location} has a column {unknown[0]!r} ({columns}), expected {', '.join(known)}, paraphrase or "
            f"paraphrase_1, …: rename or drop it"
        )
