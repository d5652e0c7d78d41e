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

import psutil

_PIDS = 2**31
"""Above every process id."""
CLOCK_TOLERANCE = 2
"""Seconds by which the recorded start may differ from the measured one: a clock may be set meanwhile."""


@dataclass(frozen=True)
class ProcessIdentity:
    """One process of one host."""

    host: str
    """Name of the host: letters, digits, - and _."""
    pid: int
    """Process id."""
    start: int
    """When it started, in seconds since 1970."""

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
            process = psutil.Process(self.pid)
            started = process.create_time()
            ended = process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            # Where processes of others are hidden, their ids still answer to signals.
            return not psutil.pid_exists(self.pid)
        except (psutil.Error, OSError):
            return False
        return ended or abs(started - self.start) > CLOCK_TOLERANCE


@functools.cache
def host_name() -> str:
    """Name of this host, as it can stand in a file's name."""
    return re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())[:63] or "host"


@functools.cache
def _identity(pid: int) -> ProcessIdentity:
    return ProcessIdentity(host=host_name(), pid=pid, start=round(psutil.Process(pid).create_time()))
