"""Which process made a file, and whether it still runs.

A process is known by its host, its id and its start: an id alone is given to another process sooner or later, in
a container that starts anew at once.
"""

from __future__ import annotations

import functools
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

_PIDS = 2**31
"""Above every process id."""
CLOCK_TOLERANCE = 2
"""Seconds by which the recorded start may differ from the measured one where it is by a clock that may be set."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Linux names each start of its kernel here."""


@dataclass(frozen=True)
class ProcessIdentity:
    """One process of one host."""

    host: str
    """Name of the host: letters, digits, - and _."""
    pid: int
    """Process id."""
    start: int
    """When it started, by `start_of`."""

    @staticmethod
    def current() -> ProcessIdentity:
        """This process."""
        return _identity(os.getpid())

    @property
    def is_dead(self) -> bool:
        """Whether it is certain that the process has ended; never of one on another host."""
        if self.host == host_name() and not 0 < self.pid < _PIDS:
            return True  # no process has such an id: the name or file that says so is damaged
        if self.host != host_name() or (self.pid == os.getpid() and self.start == _identity(self.pid).start):
            return False
        try:
            started = start_of(self.pid)
            ended = psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            # Where processes of others are hidden, their ids still answer to signals.
            return not psutil.pid_exists(self.pid)
        except (psutil.Error, OSError):
            return False
        return ended or abs(started - self.start) > (CLOCK_TOLERANCE if _boot() is None else 0)


def start_of(pid: int) -> int:
    """When a process started.

    On Linux in ticks since the kernel's start, behind a number for that: setting the clock, which moves the second at
    which all processes seem to have started, would pass a living one for dead. Elsewhere in seconds since 1970.

    Raises:
        psutil.NoSuchProcess: there is no such process.
        OSError: as it ends meanwhile.
    """
    process, boot = psutil.Process(pid), _boot()
    if boot is None:
        return round(process.create_time())
    ticks = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19]  # behind the name, its 22nd field
    return boot * 10**12 + int(ticks)


@functools.cache
def _boot() -> int | None:
    """A number for the kernel's start; None where it has no name."""
    try:
        return int(_BOOT.read_text()[:8], 16)
    except (OSError, ValueError):
        return None


@functools.cache
def host_name() -> str:
    """Name of this host, as it can stand in a file's name."""
    return re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())[:63] or "host"


@functools.cache
def _identity(pid: int) -> ProcessIdentity:
    return ProcessIdentity(host=host_name(), pid=pid, start=start_of(pid))
