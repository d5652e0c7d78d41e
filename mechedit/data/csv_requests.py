"""Facts to insert from a CSV file, a fact a line (MEMIT Appendix E inserts facts newer than the model)."""

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
OPTIONAL = ("id", "target_true", "relation")
PARAPHRASE = re.compile(r"paraphrase(_\d+)?")

# A cell is quoted as a whole, with inner quotes doubled, or holds no quote (RFC 4180).
_CELL = r'(?:[^",]*| *"(?:[^"]|"")*")'
_LINE = re.compile(rf"{_CELL}(?:,{_CELL})*")

Row = tuple[str, dict[str, str]]
"""The place of a line in the file, and its cells by column."""


def read_csv(path: Path) -> list[EditRequest]:
    r"""Read requests from a CSV file with the columns `subject`, `prompt` (with one `{}`) and `target_new`.

    Further columns may be `id` (else the line's number), `target_true`, `relation`, and `paraphrase`,
    `paraphrase_1`, `paraphrase_2` …; their cells may be empty. Space around a cell is dropped, and so is a
    byte-order mark at the start of the file. Cells are separated by commas, and each lies in one line.

    Raises:
        InputError: no such file, or not UTF-8; a column missing, unknown or there twice; and, with the line: a
            stray quote, too many or too few cells, an empty cell where text is needed, a bad prompt.
    """
    return [_request(cells, where) for where, cells in _rows(path)]


def _request(cells: dict[str, str], where: str) -> EditRequest:
    for name in REQUIRED:
        if not cells[name]:
            raise InputError(f"{where}: the cell {name!r} is empty, expected text; fill it in or drop the line")
    try:
        return EditRequest(
            id=cells.get("id") or where.rpartition(" ")[2],
            subject=cells["subject"],
            prompt=cells["prompt"],
            target_new=cells["target_new"],
            target_true=cells.get("target_true") or None,
            relation=cells.get("relation") or None,
            paraphrases=tuple(text for name, text in cells.items() if PARAPHRASE.fullmatch(name) and text),
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _rows(path: Path) -> Iterator[Row]:
    """The lines after the header, empty ones left out."""
    lines = _lines(path)
    where, header = next(lines, (f"{str(path)!r}", []))
    _check_header(header, where)
    for where, cells in lines:
        if len(cells) != len(header):
            raise InputError(
                f"{where} has {len(cells)} cells, expected {len(header)} ({', '.join(header)}); "
                f"put a cell that holds a comma in double quotes"
            )
        yield where, dict(zip(header, cells, strict=True))


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        text, where = line.removesuffix("\r"), f"{str(path)!r}, line {number}"
        if not text.strip():
            continue
        if not _LINE.fullmatch(text):
            raise InputError(
                f"{where} has a stray quote: {text!r}; expected cells without quotes, or in a pair of double quotes "
                f'with each inner one doubled, such as "the ""big"" one": mend that line'
            )
        (cells,) = csv.reader([text], strict=True, skipinitialspace=True)
        yield where, [cell.strip() for cell in cells]


def _check_header(header: list[str], where: str) -> None:
    found = f"found: {', '.join(header) or 'nothing'}"
    if missing := [name for name in REQUIRED if name not in header]:
        raise InputError(
            f"{where} has no column {missing[0]!r} ({found}), expected a header with {', '.join(REQUIRED)}, "
            f"separated by commas: add it"
        )
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise InputError(f"{where} has the column {twice[0]!r} twice ({found}), expected each once: rename one")
    known = (*REQUIRED, *OPTIONAL)
    if unknown := [name for name in header if name not in known and not PARAPHRASE.fullmatch(name)]:
        raise InputError(
            f"{where} has a column {unknown[0]!r} ({found}), expected {', '.join(known)}, paraphrase or "
            f"paraphrase_1, …: rename or drop it"
        )
