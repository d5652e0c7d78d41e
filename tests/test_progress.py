"""Ctrl-C while a progress bar is made: whatever line it comes at, it is passed on, and no traceback is written."""

from __future__ import annotations

import gc
import io
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from tqdm import std, tqdm

from mechedit.progress import end_bars, progress_bar


class Interrupter:
    """Sends SIGINT as one of the lines of tqdm's constructor begins, by its place among those that run."""

    def __init__(self, place: int) -> None:
        self.place, self.count = place, 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code.co_name != "__init__" or code.co_filename != std.__file__ or "iterable" not in code.co_varnames:
            return None
        if event == "line":
            self.count += 1
            if self.count == self.place:
                signal.raise_signal(signal.SIGINT)
        return self


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What could not be raised, and would be written to the standard error."""
    errors: list[Any] = []
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    yield errors
    signal.signal(signal.SIGINT, handler)


def interrupted(make: Callable[..., Any], place: int) -> bool:
    """Make a bar, interrupted at a line; whether the constructor came to that line."""
    interrupter, before, passed_on = Interrupter(place), sys.gettrace(), False
    sys.settrace(interrupter)
    try:
        make(total=3, file=io.StringIO())
    except KeyboardInterrupt:
        passed_on = True
    finally:
        sys.settrace(before)
    sent = interrupter.count >= place
    assert passed_on == sent
    return sent


def test_an_interrupt_as_a_bar_is_made_writes_no_traceback(written: list[Any]) -> None:
    place = 1
    while interrupted(progress_bar, place):
        end_bars()
        gc.collect()
        place += 1
    assert place > 50, "lines of the constructor"
    assert not written
    for late in range(place - 20, place):
        assert interrupted(tqdm, late)
        gc.collect()
    assert written, "a bar of which half is made writes one as it goes"


def test_the_handler_of_interrupts_is_put_back(written: list[Any]) -> None:
    with progress_bar([1, 2], file=io.StringIO()) as bar:
        assert list(bar) == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not written
