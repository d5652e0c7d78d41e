"""What runs a command: this process alone, or several that share its work."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from mechedit.progress import progress_bar

Value = TypeVar("Value")


class RankFailed(Exception):  # noqa: N818 - it is another process that is in error
    """Another process of the group has failed; its message has been printed, and `code` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"another process failed with exit code {code}")
        self.code = code


class Group:
    """The processes of one command; this class itself is a process on its own."""

    rank = 0
    """Index of this process."""
    world_size = 1
    """Number of processes."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and speaks to the user."""
        return self.rank == 0

    def gather(self, value: Value, step: str) -> list[Value]:
        """The values of all processes, in the order of their ranks, on all of them.

        Args:
            value: of this process.
            step: names what is done, for messages; the same on all processes.
        """
        del step
        return [value]

    def from_first(self, make: Callable[[], Value], step: str) -> Value:
        """What `make` gives on the first process, on all of them; the others only wait.

        Args:
            make: makes the value; within it, the first process is on its own.
            step: names what is done, for messages; the same on all processes.
        """
        del step
        return make()

    def barrier(self, step: str) -> None:
        """Wait until all processes are here."""
        del step

    def agree(self, what: str, record: Mapping[str, Any]) -> None:
        """Refuse to go on where the processes differ.

        Args:
            what: names it in the message.
            record: fields that must be equal.

        Raises:
            InputError: names the first field that differs, and both values.
        """

    def bar(self, total: int, **options: Any) -> Any:
        """A progress bar of what all processes do, which the first one shows; as `tqdm`."""
        return progress_bar(total=total, **options)

    def leave(self, code: int, line: str | None = None) -> int:
        """End the command: the exit code, after all have ended or one has failed.

        Args:
            code: of this process.
            line: what it says on the standard error; the first process that fails says it for all.
        """
        if line is not None:
            print(f"{line}\n", end="", file=sys.stderr)
        return code


SINGLE = Group()
"""A process on its own."""
CURRENT: ContextVar[Group] = ContextVar("mechedit_ranks", default=SINGLE)


def current() -> Group:
    """The processes that run this command."""
    return CURRENT.get()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let this process do by itself what is done until the block ends."""
    token = CURRENT.set(SINGLE)
    try:
        yield
    finally:
        CURRENT.reset(token)
