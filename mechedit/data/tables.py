"""Records from CSV and TSV files, one per line, such as facts newer than the model (MEMIT Appendix E inserts such)."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mechedit.data.json_records import JsonRecord, meant
from mechedit.errors import InputError, brief, brief_list
from mechedit.files import read_text

REQUIRED = ("subject", "prompt", "target_new")
OPTIONAL = ("id", "target_true", "relation", "joint")
PARAPHRASE = re.compile(r"paraphrase(_\d+)?")
SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
"""What separates cells, by the file's suffix."""

TableRow = tuple[str, dict[str, str]]
"""The location of a line, for messages, and its cells by column."""


def is_table(path: Path) -> bool:
    """Whether a file's name says that it is a table."""
    return path.suffix.lower() in SEPARATORS


def read_table(path: Path) -> list[JsonRecord]:
    r"""Read a CSV or TSV file as records of the short form.

    Columns are `subject`, `prompt` (with one `{}`, or with the subject) and `target_new`. Further columns may be `id`
    (else the line's number), `target_true`, `relation`, `joint`, and `paraphrase`, `paraphrase_1`, `paraphrase_2` …;
    their cells may be empty. Space around a cell is dropped, except between the quotes of a joint. Each cell lies in
    one line; they are separated by commas, in a `.tsv` by tabs.

    Raises:
        InputError: no such file, or neither UTF-8 nor UTF-16; a column that is missing, unknown or given twice; and,
            with the line: a stray quote, too many or too few cells.
    """
    return [_record(cells, location) for location, cells in _read_rows(path)]


def _record(cells: dict[str, str], location: str) -> JsonRecord:
    fields: dict[str, Any] = {name: cell for name, cell in cells.items() if not PARAPHRASE.fullmatch(name)}
    fields["paraphrases"] = [cell for name, cell in cells.items() if PARAPHRASE.fullmatch(name)]
    fields["id"] = cells.get("id") or location.rpartition(" ")[2]
    fields["joint"] = cells.get("joint") or None
    return JsonRecord(fields, location)


def _read_rows(path: Path) -> Iterator[TableRow]:
    """Yield the lines after the header, without empty ones."""
    lines = _read_lines(path)
    location, header = next(lines, (f"{str(path)!r}", []))
    header = [name.strip() for name in header]
    _check_header(header, location, _separator_name(path))
    for location, cells in lines:
        if len(cells) != len(header):
            raise InputError(
                f"{location} has {len(cells)} cells, expected {len(header)} ({brief_list(header, 120)}); "
                f"put a cell that holds a {_separator_name(path)} in double quotes"
            )
        rows = zip(header, cells, strict=True)
        yield location, {name: cell if name == "joint" else cell.strip() for name, cell in rows}


def _read_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the location of each line that is not empty, and its cells."""
    separator = SEPARATORS[path.suffix.lower()]
    # A cell is quoted as a whole, with inner quotes doubled, or holds no quote (RFC 4180).
    cell = rf'(?:[^"{separator}]*| *"(?:[^"]|"")*")'
    pattern = re.compile(rf"{cell}(?:{separator}{cell})*")
    for number, line in enumerate(read_text(path).split("\n"), 1):
        text, location = line.removesuffix("\r"), f"{str(path)!r}, line {number}"
        if not text.strip():
            continue
        if not pattern.fullmatch(text):
            raise InputError(
                f"{location} has a stray quote: {brief(text)}; expected cells without quotes, or in a pair of double "
                f"quotes "
                f'with each inner one doubled, such as "the ""big"" one": fix that line'
            )
        yield location, _cells(text, separator)


def _cells(line: str, separator: str) -> list[str]:
    """The cells of a line, however long they are."""
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(line)))
    try:
        (cells,) = csv.reader([line], strict=True, skipinitialspace=True, delimiter=separator)
    finally:
        csv.field_size_limit(limit)
    return cells


def _separator_name(path: Path) -> str:
    return {",": "comma", "\t": "tab"}[SEPARATORS[path.suffix.lower()]]


def _check_header(header: list[str], location: str, separator: str) -> None:
    columns = f"found: {brief_list(header, 120)}"
    known = (*REQUIRED, *OPTIONAL)
    unknown = [name for name in header if name not in known and not PARAPHRASE.fullmatch(name)]
    if missing := [name for name in REQUIRED if name not in header]:
        raise InputError(
            f"{location} has no column {brief(missing[0])} ({columns}), expected a header with {', '.join(REQUIRED)}, "
            f"separated by {separator}s: add it"
        )
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise InputError(
            f"{location} has the column {brief(repeated[0])} twice ({columns}), expected every column once: rename one"
        )
    if unknown:
        raise InputError(
            f"{location} has a column {brief(unknown[0])} ({columns}); "
            f"{meant(unknown[0], (*known, 'paraphrase_1'))}, with "
            f"paraphrase or paraphrase_1, … for paraphrases: rename or drop it"
        )
