"""Locks: one process at a time makes one thing in a folder.

A lock is the operating system's, on a hidden file beside what is made: it ends with its process, however that ends. The
file says whose it is, and is removed with the lock.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from mechedit.disk_errors import writing
from mechedit.errors import InputError
from mechedit.interrupts import insist
from mechedit.notices import warn
from mechedit.paths import writable_folder
from mechedit.processes import ProcessIdentity
from mechedit.temporary_names import sweep_once

_POLL = 0.1
"""Seconds between two looks at a lock."""
_STARTING = 1.0
"""Seconds that a process may take to say whose the lock is."""
_LONGEST = 200
"""Characters of a command that a message shows."""


@contextlib.contextmanager
def locked(path: str | Path, what: str, *, made_with: str | None = None, wait: bool = False) -> Iterator[None]:
    """Be the only process that makes `path` until the block ends.

    Args:
        path: of what is made; the lock's file is beside it.
        what: names it in messages.
        made_with: hash of all that determines it. A process with the same hash waits for the first, whose result it can
            read then.
        wait: wait for any process, because it takes no time.

    Raises:
        InputError: another process is making it, from other input; says which process, on which host, by which command
            and since when. Or the folder cannot be written to.
    """
    path = Path(path)
    sweep_once(path.parent)
    file = writable_folder(path.parent) / f".{path.name}.lock"
    with writing(path):
        lock = _acquire(file, what, made_with, wait)
    try:
        if not isinstance(lock, SoftFileLock):  # which writes into its file itself
            with contextlib.suppress(OSError):
                file.write_text(json.dumps(_record(made_with)))
        yield
    finally:
        insist(lambda: _release(lock, file))


def remove_free_locks(folder: str | Path, names: str) -> None:
    """Remove the files of locks that nobody holds, which killed processes left.

    Args:
        folder: in which they lie.
        names: of what was being made, with * for any text.
    """
    for file in Path(folder).glob(f".{names}.lock"):
        lock: Any = FileLock(file, timeout=0)
        if isinstance(lock, SoftFileLock):
            return  # a file that is there is a lock that is held
        with contextlib.suppress(Timeout, OSError), lock:
            file.unlink(missing_ok=True)


def _release(lock: Any, file: Path) -> None:
    # Removed while it is held: who waits for this file finds that it has no name any more, and makes another one. Once
    # it is released, a file of this name is another process's.
    if lock.is_locked:
        file.unlink(missing_ok=True)
        lock.release()


def _acquire(file: Path, what: str, made_with: str | None, wait: bool) -> Any:
    lock = FileLock(file, timeout=0)
    first, told = time.monotonic(), False
    while True:
        with contextlib.suppress(Timeout):
            lock.acquire()
            return lock
        owner = _owner(file)
        is_same = owner is not None and made_with is not None and owner.get("made_with") == made_with
        if not (wait or is_same) and (owner is not None or time.monotonic() - first > _STARTING):
            raise InputError(
                f"{what} is being made by {_in_words(owner)}, expected one process at a time; wait until it has ended, "
                f"or choose another --out"
            )
        if is_same and not told:
            warn(f"{what} is being made by {_in_words(owner)}; waiting for it")
            told = True
        time.sleep(_POLL)


def _record(made_with: str | None) -> dict[str, Any]:
    arguments = [Path(sys.argv[0]).name.replace("__main__.py", "mechedit"), *sys.argv[1:]]
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {
        **asdict(ProcessIdentity.current()),
        "command": shlex.join(arguments)[:_LONGEST],
        "since": since,
        "made_with": made_with,
    }


def _owner(file: Path) -> dict[str, Any] | None:
    """What a lock's file says of its process; None where that has not been written yet."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict):
        return None
    # The record of a killed process stays until the next one writes its own.
    host, pid, start = record.get("host"), record.get("pid"), record.get("start")
    if not (isinstance(host, str) and isinstance(pid, int) and isinstance(start, int)):
        return None
    return None if ProcessIdentity(host, pid, start).is_dead else record


def _in_words(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner['pid']} on {owner['host']} since {owner.get('since')} ({owner.get('command')!r:.200})"
