"""Several processes of one command: they meet, exchange values, count in one bar, and notice who has failed or died."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import override

from mechedit.errors import InputError, brief
from mechedit.progress import progress_bar
from mechedit.ranks.group import Group, RankFailed, Value, alone

TIMEOUT_VARIABLE = "MECHEDIT_RANK_TIMEOUT"
"""Environment variable with other seconds, also for how long the processes wait for each other at the start."""
_BEAT = 0.5
"""Seconds between two signs of life."""
_FAREWELL = 5.0
"""Seconds for which the first process waits at the end for the others."""
_GLANCE = 0.01
"""Seconds between two looks for the others."""


class Processes(Group):
    """Several processes that meet through a store of torch.distributed, and send values by gloo."""

    def __init__(self, rank: int, world_size: int, store: Any, timeout: float) -> None:
        self.rank, self.world_size = rank, world_size
        self._store, self._timeout = store, timeout
        self._turn, self._bars = 0, 0
        self._bar: _SharedBar | None = None
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._dead: set[int] = set()
        self._closing = threading.Event()
        self._left, self._leaving = False, threading.Lock()
        self._beats = threading.Thread(target=self._beat, name="mechedit-ranks", daemon=True)
        self._beats.start()

    @override
    def gather(self, value: Value, step: str) -> list[Value]:
        values: list[Any] = [None] * self.world_size
        self._transfer(step, lambda dist: dist.all_gather_object(values, value))
        return values

    @override
    def from_first(self, make: Callable[[], Value], step: str) -> Value:
        values: list[Any] = [None]
        if self.is_first:
            with alone():
                values = [make()]
        self._transfer(step, lambda dist: dist.broadcast_object_list(values, src=0))
        return values[0]

    @override
    def barrier(self, step: str) -> None:
        self.meet(step)

    @override
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

    @override
    def bar(self, total: int, **options: Any) -> Any:
        self._bars += 1
        self._bar = _SharedBar(self._store, f"bar/{self._bars}", total, self.is_first, options)
        return self._bar

    @override
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
            print(f"{line}\n", end="", file=sys.__stderr__, flush=True)
        self._depart()
        return code

    def close(self) -> None:
        """End the thread that says that this process lives."""
        import torch.distributed as dist

        with contextlib.suppress(Exception):
            # The first process may be the one that holds the store: it stays until the others have read from it.
            gone, until = self._store.add("gone", 1), time.monotonic() + _FAREWELL
            while self.is_first and gone < self.world_size - len(self._dead) and time.monotonic() < until:
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
                self._dead.add(rank)
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
        self._tqdm = progress_bar(total=total, disable=not shown, **options)
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
