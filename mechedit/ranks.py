"""The processes that run one command: which of them this is, who does what, and how results come together.

`torchrun` and `accelerate launch` start N processes of one command, which differ in their rank alone. `joined` brings
them together, through torch.distributed; `current()` is their group wherever work can be dealt out. Without them it is
a group of one, in which every method is the identity.

All processes run the same steps in the same order. Where they meet, each says at which step it is, and looks whether
the others still live: a process that fails leaves its message for the others, and one that has died leaves no sign of
life for `timeout` seconds. Nobody waits for ever.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from mechedit.errors import InputError, brief

Value = TypeVar("Value")

TIMEOUT = 60.0
"""Seconds without a sign of life after which a process counts as dead."""
TIMEOUT_VARIABLE = "MECHEDIT_RANK_TIMEOUT"
"""Environment variable with other seconds, also for how long the processes wait for each other at the start."""
_JOIN_TIMEOUT = 600.0
"""Seconds for which the processes wait for each other at the start, where the variable is not set."""
_BEAT = 0.5
"""Seconds between two signs of life."""
_FAREWELL = 5.0
"""Seconds for which the first process waits at the end for the others."""
_GLANCE = 0.01
"""Seconds between two looks for the others."""
_TRANSFER = 1800.0
"""Seconds that one transfer between processes may take, all of which are there by then."""


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
        return tqdm(total=total, **options)

    def leave(self, code: int, line: str | None = None) -> int:
        """End the command: the exit code, after all have ended or one has failed.

        Args:
            code: of this process.
            line: what it says on the standard error; the first process that fails says it for all.
        """
        if line is not None:
            print(line, file=sys.stderr)
        return code


SINGLE = Group()
"""A process on its own."""
_CURRENT: ContextVar[Group] = ContextVar("mechedit_ranks", default=SINGLE)


def current() -> Group:
    """The processes that run this command."""
    return _CURRENT.get()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let this process do by itself what is done until the block ends."""
    token = _CURRENT.set(SINGLE)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """Bring together the processes that `torchrun` or `accelerate launch` started, until the block ends.

    Other processes than the first print nothing; on a machine with accelerators each process has its own.

    Raises:
        InputError: the environment does not say how the processes find each other, or not all came in time.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size == "1" or current() is not SINGLE:
        yield current()
        return
    group = _join(_whole("WORLD_SIZE"), _whole("RANK"))
    token = _CURRENT.set(group)
    try:
        with contextlib.ExitStack() as stack:
            if not group.is_first:
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
                stack.enter_context(contextlib.redirect_stderr(silence))
            yield group
    finally:
        _CURRENT.reset(token)
        group.close()


def _whole(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal() or "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise InputError(
            f"WORLD_SIZE is {brief(os.environ.get('WORLD_SIZE'))} in the environment, {name} is {brief(text)}, and "
            f"MASTER_ADDR and MASTER_PORT are {'there' if 'MASTER_ADDR' in os.environ else 'absent'}; start several "
            f"processes by torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    return int(text)


def _seconds(default: float) -> float:
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise InputError(f"{TIMEOUT_VARIABLE} is {brief(text)}, expected seconds, such as 60; choose another")
    return seconds


def _join(world_size: int, rank: int) -> _Processes:
    """Find the other processes.

    Raises:
        InputError: they did not come in time.
    """
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.rendezvous import rendezvous

    if not rank < world_size:
        raise InputError(f"RANK is {rank}, expected one of 0 … {world_size - 1}; start the processes by torchrun")
    patience = _seconds(_JOIN_TIMEOUT)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=datetime.timedelta(seconds=patience)))
        store = PrefixStore("mechedit", store)
        group = _Processes(rank, world_size, store, _seconds(TIMEOUT))
        group.meet("the start", patience)
        dist.init_process_group(
            "gloo",
            store=PrefixStore("gloo", store),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=_TRANSFER),
        )
    except (RuntimeError, OSError) as error:  # torch's errors of the network are RuntimeErrors
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the {world_size} processes did not find each other at {address} within {patience:g} s "
            f"({' '.join(str(error).split())[:200]}); check that all were started, and that they can reach it"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    return group


class _Processes(Group):
    """Several processes that meet through a store of torch.distributed, and send values by gloo."""

    def __init__(self, rank: int, world_size: int, store: Any, timeout: float) -> None:
        self.rank, self.world_size = rank, world_size
        self._store, self._timeout = store, timeout
        self._turn, self._bars = 0, 0
        self._bar: _SharedBar | None = None
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._closing = threading.Event()
        self._left, self._leaving = False, threading.Lock()
        self._beats = threading.Thread(target=self._beat, name="mechedit-ranks", daemon=True)
        self._beats.start()

    def gather(self, value: Value, step: str) -> list[Value]:
        values: list[Any] = [None] * self.world_size
        self._transfer(step, lambda dist: dist.all_gather_object(values, value))
        return values

    def from_first(self, make: Callable[[], Value], step: str) -> Value:
        values: list[Any] = [None]
        if self.is_first:
            with alone():
                values = [make()]
        self._transfer(step, lambda dist: dist.broadcast_object_list(values, src=0))
        return values[0]

    def barrier(self, step: str) -> None:
        self.meet(step)

    def agree(self, what: str, record: Mapping[str, Any]) -> None:
        first, *records = self.gather(dict(record), f"agreement on {what}")
        for rank, fields in enumerate(records, 1):
            for name in [*first, *(name for name in fields if name not in first)]:
                if first.get(name) != fields.get(name):
                    raise InputError(
                        f"{what}: {name} is {brief(fields.get(name))} in the process of rank {rank}, and "
                        f"{brief(first.get(name))} in that of rank 0, expected the same in all; start all processes by "
                        f"one command, with the same files and versions"
                    )

    def bar(self, total: int, **options: Any) -> Any:
        self._bars += 1
        self._bar = _SharedBar(self._store, f"bar/{self._bars}", total, self.is_first, options)
        return self._bar

    def leave(self, code: int, line: str | None = None) -> int:
        if line is None and code != 130:
            try:
                self.meet("the end")
            except RankFailed as failed:
                code = failed.code
            except InputError as error:
                return self.leave(2, f"mechedit: {error}")
            self._depart()
            return code
        posted = json.dumps({"rank": self.rank, "code": code})
        with contextlib.suppress(Exception):  # without the store, whoever waits for this process notices its silence
            winner = self._store.compare_set("error", "", posted).decode()
            if winner != posted:
                self._depart()
                return json.loads(winner)["code"]
        if line is not None:
            print(line, file=sys.__stderr__, flush=True)
        self._depart()
        return code

    def close(self) -> None:
        """End the thread that says that this process lives."""
        import torch.distributed as dist

        with contextlib.suppress(Exception):
            # The first process may be the one that holds the store: it stays until the others have read from it.
            gone, until = self._store.add("gone", 1), time.monotonic() + _FAREWELL
            while self.is_first and gone < self.world_size and time.monotonic() < until:
                time.sleep(_GLANCE)
                gone = self._store.add("gone", 0)
        self._closing.set()
        self._beats.join(timeout=5)
        with contextlib.suppress(Exception):
            if dist.is_initialized():
                dist.destroy_process_group()

    def meet(self, step: str, patience: float | None = None) -> None:
        """Wait until all processes are at this step.

        Args:
            step: names it.
            patience: seconds to wait for processes that have not been seen yet; by default `timeout`.

        Raises:
            RankFailed: another process has failed.
            InputError: a process has died, or is at another step.
        """
        self._turn += 1
        arrivals = f"turn/{self._turn}"
        try:
            self._store.set(f"{arrivals}/{self.rank}", step)
            count = self._store.add(arrivals, 1)
            while count < self.world_size:
                self._look(step, patience or self._timeout)
                if self._bar is not None:
                    self._bar.refresh()
                time.sleep(_GLANCE)
                count = self._store.add(arrivals, 0)
            if self._bar is not None:  # the others may have counted since the last look
                self._bar.refresh()
            steps = [self._store.get(f"{arrivals}/{rank}").decode() for rank in range(self.world_size)]
        except RuntimeError as error:
            raise self._lost(error) from error
        if self._bar is not None and self._bar.closed:
            self._bar = None
        if len(set(steps)) > 1:
            rank = next(rank for rank, name in enumerate(steps) if name != steps[0])
            raise InputError(
                f"the process of rank {rank} is at {steps[rank]!r}, and that of rank 0 at {steps[0]!r}, expected all "
                f"at one step; start all processes by one command, with the same files and versions"
            )

    def _transfer(self, step: str, send: Callable[[Any], object]) -> None:
        """Send values, once all processes are there."""
        import torch.distributed as dist

        self.meet(step)
        try:
            send(dist)
        except RuntimeError as error:
            if isinstance(error, InputError):
                raise
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> Exception:
        """What an error of the network means: that another process has failed, or has died."""
        with contextlib.suppress(Exception):
            for _ in range(int(1 / _GLANCE)):
                self._raise_failure()
                time.sleep(_GLANCE)
        with contextlib.suppress(RankFailed):
            return InputError(
                f"another of the {self.world_size} processes has died ({' '.join(str(error).split())[:200]}); look for "
                f"its last words above, and run the same command again, which goes on from what is finished"
            )
        return error

    def _look(self, step: str, patience: float) -> None:
        """See that no other process has failed or died.

        Raises:
            RankFailed: one has failed.
            InputError: one has given no sign of life for `patience` seconds.
        """
        self._raise_failure()
        now = time.monotonic()
        for rank in range(self.world_size):
            key = f"beat/{rank}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            before, since = self._seen.get(rank, (None, now))
            self._seen[rank] = (beat, now if beat != before else since)
            if now - self._seen[rank][1] > patience:
                raise InputError(
                    f"the process of rank {rank} of {self.world_size} has given no sign of life for {patience:g} s "
                    f"while the others wait for it ({step}): it has died, or was never started; run the same command "
                    f"again, which goes on from what is finished ({TIMEOUT_VARIABLE} sets the seconds)"
                )

    def _raise_failure(self) -> None:
        if self._store.check(["error"]):
            self._depart()
            raise RankFailed(json.loads(self._store.get("error"))["code"])

    def _beat(self) -> None:
        """Say that this process lives, and interrupt it where another one has failed."""
        count = 0
        with contextlib.suppress(Exception):  # without the store there is nobody to tell
            while not self._closing.wait(_BEAT if count else 0):
                count += 1
                self._store.set(f"beat/{self.rank}", str(count))
                if self._store.check(["error"]):
                    if json.loads(self._store.get("error"))["rank"] != self.rank:
                        self._interrupt()
                    return

    def _interrupt(self) -> None:
        """Interrupt what the process does, unless it is about to end."""
        with self._leaving:
            if not self._left:
                signal.raise_signal(signal.SIGINT)

    def _depart(self) -> None:
        """From here on the process is not interrupted: it knows how it ends."""
        with self._leaving:  # an interrupt that is on its way arrives here
            self._left = True


class _SharedBar:
    """A progress bar that counts what all processes do."""

    def __init__(self, store: Any, key: str, total: int, shown: bool, options: Mapping[str, Any]) -> None:
        self._store, self._key = store, key
        self._tqdm = tqdm(total=total, disable=not shown, **options)
        self.closed = False

    def update(self, n: int = 1) -> None:
        """Count what this process has done."""
        count = self._store.add(self._key, n)
        self._show(count)

    def refresh(self) -> None:
        """Show what others have done meanwhile."""
        if not self._tqdm.disable and not self.closed:
            self._show(self._store.add(self._key, 0))

    def _show(self, count: int) -> None:
        if count != self._tqdm.n:
            self._tqdm.n = count
            self._tqdm.refresh()

    def __enter__(self) -> _SharedBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True
        self._tqdm.close()
