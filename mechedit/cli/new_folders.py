"""Folders that a command makes for its results: a command that is refused before it wrote anything leaves none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mechedit.errors import InputError
from mechedit.ranks import RankFailed
from mechedit.run_folder import RunFolder

_new: list[Path] = []
"""Folders that the command has made, the deepest first."""


@contextlib.contextmanager
def no_empty_folders() -> Iterator[None]:
    """Remove the folders that the block made with `new_run_folder` and left empty, where it is refused."""
    _new.clear()
    try:
        yield
    except (InputError, RankFailed):
        for folder in _new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def new_run_folder(path: Path, *, overwrite: bool) -> RunFolder:
    """As `RunFolder.at`; the folder and its parents are remembered where they were not there."""
    absent = [folder for folder in (path, *path.parents) if not folder.exists()]
    folder = RunFolder.at(path, overwrite=overwrite)
    _new.extend(absent)
    return folder
