"""Atomic writing: a file or folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mechedit.disk_errors import writing
from mechedit.errors import InputError
from mechedit.paths import checked_path, writable_file, writable_folder
from mechedit.temporary_names import remove, sweep, sweep_once, temporary_name


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; on success fsync what was written there and rename it to `path`, else remove it.

    The temporary path has the name of `path`, in a hidden folder beside it whose name says which process writes there
    (`mechedit.temporary_names`): what writers leave beside their files is removed with it.

    Raises:
        InputError: the folder cannot be made or written to, something else than a file is there, or the disk does not
            take the file.
    """
    path = writable_file(path)
    writable_folder(path.parent)
    sweep_once(path.parent)
    folder = path.parent / temporary_name(path.stem)
    try:
        with writing(path):
            folder.mkdir(mode=0o700)
            temporary = folder / path.name
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            # Some writers make files private; results get the permissions any other new file would have.
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
    finally:
        remove(folder)


@contextlib.contextmanager
def atomic_folder(folder: str | Path, *, replaces: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on success rename it to `folder`, else remove it.

    Args:
        folder: path of the folder that appears on success; where it is a link, the folder that the link leads to.
        replaces: name of a file that marks a folder as replaceable; a folder without it is never replaced.

    Raises:
        InputError: `folder` exists and is not an empty folder, or cannot be made; the disk does not take its files.
    """
    folder = checked_path(folder).resolve()
    replaced = replaces is not None and (folder / replaces).is_file()
    if folder.exists() and not replaced and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{str(folder)!r} exists already, expected a new or an empty folder; choose another or remove it"
        )
    writable_folder(folder.parent)
    sweep([folder.parent])
    temporary = folder.parent / temporary_name(folder.name)
    try:
        with writing(folder):
            temporary.mkdir(mode=0o700)
            yield temporary
            # Some writers make files private, as for a file above.
            for file in temporary.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    file.chmod(0o666 & ~_umask())
            temporary.chmod(0o777 & ~_umask())
            if replaced:
                folder.rename(temporary.with_name(temporary.name + ".old"))
            temporary.replace(folder)
    finally:
        remove(temporary, temporary.with_name(temporary.name + ".old"))


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
