"""Paths that come from outside, checked: that a file system could hold them, that reading ends, that writing begins."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from mechedit.errors import InputError, brief


def checked_path(path: str | Path) -> Path:
    """The path, unless no file system could hold it.

    Raises:
        InputError: it is too long, has a null character in it, or is no UTF-8, which not every library writes to.
    """
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
                f"{brief(str(path))} is a pipe, a socket or a device, expected a file, which can be read twice; "
                f"write its content to a file first"
            )
    return path


def writable_folder(folder: str | Path) -> Path:
    """Make `folder` when absent and return it.

    Raises:
        InputError: it is a file, or cannot be made or written to.
    """
    folder = checked_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InputError(
            f"cannot write to the folder {str(folder)!r} ({error.strerror}); expected a folder that can be "
            f"written to: choose another with --out"
        ) from error
