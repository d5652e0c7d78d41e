"""Paths that come from outside, checked: that a file system could hold them, that reading ends, that writing begins."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from mechedit.errors import DiskError, InputError, brief

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""How an address begins; a drive has one letter."""


def checked_path(path: str | Path) -> Path:
    """The path, unless no file system could hold it.

    Raises:
        InputError: it is too long, has a null character in it, or is no UTF-8, which not every library writes to; or
            it is an address such as s3://bucket/run, which would become a folder here, and which some libraries follow.
    """
    if _URL.match(str(path)):
        raise InputError(
            f"{brief(str(path))} is an address, expected a path on this machine: copy what is there, or give the whole "
            f"path of a folder of this name"
        )
    try:
        str(path).encode()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.stat(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{str(path)!r:.80} cannot be a path ({reason}); expected that of a file or folder: check it"
        ) from error
    return Path(path)


def expanded_path(path: str | Path) -> Path:
    """The path, `~` at its beginning being a user's home.

    Raises:
        InputError: there is no such user, or as `checked_path`.
    """
    try:
        return checked_path(Path(path).expanduser())
    except RuntimeError as error:
        raise InputError(
            f"{brief(str(path))} begins with the home of a user who is not known here, expected a path; write it out"
        ) from error


def readable_path(path: str | Path) -> Path:
    """The path, unless reading from it might never end: what is there is a pipe, a socket or a device.

    Raises:
        InputError: it is one of these, or as `checked_path`.
    """
    path = checked_path(path)
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(
                f"{str(path)!r} is a pipe, a socket or a device, expected a file, which can be read twice; "
                f"write its content to a file first"
            )
    return path


_made: ContextVar[list[Path] | None] = ContextVar("mechedit_made_folders", default=None)
"""Where folders are noted that are made; None where nobody asks for them."""


@contextlib.contextmanager
def made_folders() -> Iterator[list[Path]]:
    """The folders that `writable_folder` makes until the block ends, in the order in which they are asked for."""
    folders: list[Path] = []
    token = _made.set(folders)
    try:
        yield folders
    finally:
        _made.reset(token)


def writable_folder(folder: str | Path) -> Path:
    """Make `folder` when absent and return it.

    Raises:
        InputError: it is a file, or cannot be made or written to.
    """
    folder = checked_path(folder)
    try:
        absent = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        if (folders := _made.get()) is not None:
            folders.extend(absent)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise DiskError(
            f"cannot write to the folder {str(folder)!r} ({error.strerror}); expected a folder that can be "
            f"written to: choose another with --out"
        ) from error


def check_folder(folder: str | Path) -> None:
    """Refuse what is there in the place of a folder that will be needed.

    Raises:
        InputError: a file is there, or as `checked_path`.
    """
    folder = checked_path(folder)
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise InputError(f"{str(folder)!r} is a file, expected a folder or nothing there; move it away")


def writable_file(path: str | Path) -> Path:
    """The path, unless a file that is written there would take the place of what is no file.

    Raises:
        InputError: there is a folder, a pipe, a socket or a device, or as `checked_path`.
    """
    path = checked_path(path)
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(
                f"{str(path)!r} is a folder, a pipe, a socket or a device, expected a file or nothing there; "
                f"choose another path"
            )
    return path
