"""`ModelLock`: who may use a model now, so that no thread sees or undoes half of what another does to its weights.

Whoever uses a model opens a region: for the time of a trace, a search, an evaluation; for an edit from its application
to its end; for a single run, if nothing more is open. Regions of one thread may lie in each other. Another thread waits
until the outermost region has ended; then results are those of one thread after another.

Two that would wait for each other for ever are refused instead: tasks of one event loop, since the loop stands still
while one of them waits; and a thread that waits for one that holds the model and itself only waits, as that may be for
the first. A thread that a region hands its context to (`contextvars.copy_context().run`, `asyncio.to_thread`) belongs
to the region and need not wait; so do the threads of `mechedit.workers`, which run the model all at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Final, ParamSpec, TypeVar

from mechedit.arguments import fitted
from mechedit.errors import InputError
from mechedit.models.plain_state import plain_state

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

PATIENCE: Final = 5.0
"""Seconds for which a thread waits for one that holds the model and itself only waits."""
_GLANCE: Final = 0.1
"""Seconds between two looks at what the thread that holds the model does."""
_WAITING: Final = ("threading.py", "selectors.py", "queue.py")
"""Files of the standard library in which a thread that only waits is."""


class Region:
    """A use of a model from its beginning to its end; the weights may be others within it."""

    def __init__(self, lock: ModelLock) -> None:
        self.lock = lock
        self.thread, self.task = threading.current_thread(), _current_task()
        self.open = False
        self.runs: dict[int, int] = {}
        """Runs of the model within this region, and in no region inside it, per thread."""
        self.n_runs = 0
        """Runs so far, by which those who wait see that something is going on."""
        self.broken = False
        """Whether a region around it has ended before it."""
        self.snapshot: Any = None
        """What the region puts back when it ends, for who keeps it."""

    @property
    def runs_elsewhere(self) -> bool:
        """Whether other threads than this one run the model just now."""
        return any(count for thread, count in self.runs.items() if thread != threading.get_ident())

    @property
    def inner(self) -> list[Region]:
        """Regions that were opened in this one and have not ended, outermost first."""
        regions = self.lock.regions
        return regions[regions.index(self) + 1 :] if self in regions else []

    def settle(self) -> None:
        """Wait, before the region ends, for threads that belong to it and still use the model; not for ever."""
        self.lock.settle(self)

    @property
    def threads_inside(self) -> list[threading.Thread]:
        """Other threads that have opened a region in this one."""
        return [inner.thread for inner in self.inner if inner.thread is not threading.current_thread()]


_REGIONS: ContextVar[tuple[Region, ...]] = ContextVar("mechedit_regions", default=())
"""Open regions that a context belongs to, of all models, innermost last."""


class ModelLock:
    """The regions that are open on a model's weights; one for all models around the same weights."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.regions: list[Region] = []
        """Open regions, outermost first."""

    def __deepcopy__(self, memo: object) -> ModelLock:
        # A copy's weights are its own.
        return ModelLock()

    def __reduce__(self) -> tuple[type[ModelLock], tuple[()]]:
        return ModelLock, ()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[Region]:
        """Open a region: nobody outside it uses the model until it ends.

        Raises:
            InputError: another task of this thread holds the model, or a thread that itself waits; on leaving, a region
                inside it has not ended, or one around it has.
        """
        region = Region(self)
        try:
            self._open(region)
            yield region
        finally:
            self._close(region)

    @contextlib.contextmanager
    def running(self, at_once: Callable[[], bool]) -> Iterator[None]:
        """Let the model run: in the innermost region, or in one of its own where there is none.

        Args:
            at_once: whether several threads of a region may run the model at the same time.

        Raises:
            InputError: as `exclusive`.
        """
        region = self._joined(at_once)
        if region is None:
            with self.exclusive():
                yield
            return
        try:
            yield
        finally:
            with self._changed:
                region.runs[threading.get_ident()] -= 1
                self._changed.notify_all()

    def _joined(self, at_once: Callable[[], bool]) -> Region | None:
        """The innermost region, with this run counted in it; None if no region is open that this thread belongs to."""
        thread = threading.get_ident()
        with self._changed:
            while self.regions and self._belongs_to(region := self.regions[-1]):
                if not region.runs_elsewhere or at_once():
                    region.runs[thread] = region.runs.get(thread, 0) + 1
                    region.n_runs += 1
                    return region
                self._changed.wait(_GLANCE)
        return None

    def _open(self, region: Region) -> None:
        with self._changed:
            self._wait_until_free()
            region.open = True
            self.regions.append(region)
        _REGIONS.set((*(outer for outer in _REGIONS.get() if outer.open), region))

    def settle(self, region: Region) -> None:
        """Wait, before a region ends, for threads that belong to it and still use the model; not for ever."""
        since = time.monotonic()
        with self._changed:
            while threads := region.threads_inside:
                if not all(_only_waits(thread) for thread in threads):
                    since = time.monotonic()
                elif time.monotonic() - since > PATIENCE:
                    return
                self._changed.wait(_GLANCE)

    def _close(self, region: Region) -> None:
        if not region.open:
            return
        inner: list[Region] = []
        try:
            self.settle(region)  # which Ctrl-C may end
        finally:
            with self._changed:
                inner = region.inner
                for later in inner:
                    later.broken = True
                if region in self.regions:
                    self.regions.remove(region)
                region.open = False
                self._changed.notify_all()
            _REGIONS.set(tuple(outer for outer in _REGIONS.get() if outer.open))
        if inner or region.broken:
            raise InputError(
                "two uses of one model overlap (generators or coroutines, say): the one that began first ended first, "
                "so that each saw the other's edit; expected the one that began last to end first. The weights are "
                "what they were once both have ended; discard the results of both, and let one end first"
            )

    def _wait_until_free(self) -> None:
        """Wait until this thread's region is the innermost, or none is open.

        Raises:
            InputError: that may never be.
        """
        since, seen = time.monotonic(), None
        while self.regions:
            holder = self.regions[-1]
            if self._belongs_to(holder):
                if not holder.runs_elsewhere:
                    return
            elif holder.thread is threading.current_thread():
                raise InputError(
                    f"another task of the thread {holder.thread.name!r} uses the model, expected one at a time: a "
                    f"thread cannot wait for itself. Take turns with an asyncio.Lock, or let the other task end first"
                )
            else:
                sign = (holder, holder.n_runs)
                if sign != seen or holder.runs_elsewhere or not _only_waits(holder.thread):
                    since, seen = time.monotonic(), sign
                elif time.monotonic() - since > PATIENCE:
                    raise InputError(
                        f"the thread {holder.thread.name!r} holds the model (within `edited` or a session, say), and "
                        f"has only waited for {PATIENCE:g} seconds, perhaps for this thread; expected a model that "
                        f"becomes free: end its block before starting threads, or run them in its context "
                        f"(contextvars.copy_context().run)"
                    )
            self._changed.wait(_GLANCE)

    def _belongs_to(self, region: Region) -> bool:
        """Whether this thread, and the task in it, is within a region."""
        if region in _REGIONS.get():
            return True
        same_thread = region.thread is threading.current_thread()
        return same_thread and (region.task is None or region.task.done() or region.task is _current_task())


def exclusive(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a function hold the model that it is given as `model` while it runs (`ModelLock.exclusive`).

    Arguments of other types than its own are refused first.
    """

    @functools.wraps(function)
    def holding(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        positional, keywords = fitted(function, args, kwargs)
        model: Any = keywords.get("model", positional[position] if position < len(positional) else None)
        if model is None:  # the call is refused
            return function(*args, **kwargs)
        with model.exclusive(), plain_state(model):
            return function(*positional, **keywords)

    position = list(inspect.signature(function).parameters).index("model")
    return holding


def exclusive_method(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a method of a model hold it while it runs (`ModelLock.exclusive`)."""

    @functools.wraps(method)
    def holding(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        model: Any = args[0]
        with model.exclusive(), plain_state(model):
            return method(*args, **kwargs)

    return holding


def _current_task() -> asyncio.Task[Any] | None:
    """The task of an event loop that this thread is in."""
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs
        return None


def _only_waits(thread: threading.Thread) -> bool:
    """Whether a thread waits for another one, or for events, or has ended."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is None or frame.f_code.co_filename.endswith(_WAITING)
