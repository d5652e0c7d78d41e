"""What a file takes in memory once it is read, held against its own size before: a few bytes may stand for billions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipInfo

from mechedit.errors import InputError

_MOST_ROWS, _ROWS_PER_BYTE = 1_000_000, 100
"""Rows of a table at most, and how many more for each byte of its file."""
_UNPACKED, _MOST_PACKED = 2**24, 100
"""Bytes of packed arrays at most, and how many more for each byte in the file."""


def check_rows(path: str | Path, n_rows: int) -> None:
    """Refuse a table that would take memory without bound: a few bytes may stand for billions of equal rows.

    Raises:
        InputError: there are more rows than a table of measurements packs into a file of its size.
    """
    most = _MOST_ROWS + _ROWS_PER_BYTE * Path(path).stat().st_size
    if n_rows > most:
        raise InputError(
            f"{str(path)!r} says that it has {n_rows:,} rows, expected at most {most:,} in a file of its size; remove "
            f"it, and make it again"
        )


def check_packed(members: Sequence[ZipInfo], path: str | Path) -> None:
    """Refuse arrays that would take memory without bound: zeros are packed a thousandfold, numbers hardly at all.

    Raises:
        InputError: they are packed more than numbers can be.
    """
    packed, size = (sum(getattr(member, name) for member in members) for name in ("compress_size", "file_size"))
    if size > _UNPACKED + _MOST_PACKED * packed:
        raise InputError(
            f"{str(path)!r} holds {size:,} bytes of arrays packed into {packed:,}, expected numbers that were "
            f"measured; check where it comes from"
        )
