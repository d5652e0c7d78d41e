"""Names of what is not finished: they say which process writes it, so that what a killed one left can be removed."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from mechedit.interrupts import insist
from mechedit.processes import ProcessIdentity

_NAME = re.compile(r"\..*\.mechedit-(?P<host>[A-Za-z0-9_-]+)-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{8}(\.old)?", re.S)
_swept: set[tuple[int, str]] = set()
"""Folders that each process has swept."""


def temporary_name(name: str) -> str:
    """A new hidden name for what becomes `name`, with host, id and start of this process."""
    owner = ProcessIdentity.current()
    return f".{name[:30]}.mechedit-{owner.host}-{owner.pid}-{owner.start}-{secrets.token_hex(4)}"


def owner_of(name: str) -> ProcessIdentity | None:
    """The process that gave a temporary name; None for any other name."""
    match = _NAME.fullmatch(name)
    return ProcessIdentity(match["host"], int(match["pid"]), int(match["start"])) if match else None


def sweep(folders: Iterable[str | Path]) -> None:
    """Remove from these folders, not from those inside, what processes of this host left that have ended.

    What a living process or another host writes stays.
    """
    for folder in folders:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in list(entries):
                owner = owner_of(entry.name) if entry.name.startswith(".") else None
                if owner is not None and owner.is_dead:
                    remove(Path(entry.path))


def sweep_once(folder: str | Path) -> None:
    """Sweep a folder, unless this process has done so before."""
    key = (os.getpid(), os.path.abspath(folder))
    if key not in _swept:
        _swept.add(key)
        sweep([folder])


def remove_folder(folder: Path) -> None:
    """Remove a folder at once: killed midway, what is left has a temporary name, and the next sweep removes it."""
    hidden = folder.with_name(temporary_name(folder.name))

    def hide() -> None:
        with contextlib.suppress(OSError):
            folder.rename(hidden)
        _remove_now(hidden)

    insist(hide)


def remove(*paths: Path) -> None:
    """Remove files and folders that are there and can be removed; an interrupt waits until they are gone."""

    def remove_all() -> None:
        for path in paths:
            _remove_now(path)

    insist(remove_all)


def _remove_now(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
