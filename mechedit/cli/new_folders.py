"""Folders that a command makes for its results: none of them is left empty, where it is refused or ends otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from mechedit.interrupts import insist
from mechedit.paths import made_folders


@contextlib.contextmanager
def no_empty_folders() -> Iterator[None]:
    """Remove the folders that the block made and left empty."""
    with made_folders() as folders:
        try:
            yield
        finally:
            insist(lambda: _remove_empty(folders))


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in sorted(set(folders), key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
