"""Interrupts that come while something is put back or cleared away: it is finished first, then they are passed on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


def insist(action: Callable[[], object]) -> None:
    """Do what puts a model back or clears a folder, again where Ctrl-C comes in between, which is passed on afterwards.

    What has been done is left out the second time, or interrupts that come with each of its steps would never end.
    """
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            action()
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the block has ended (only the main thread receives signals)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)
        if received:
            signal.raise_signal(signal.SIGINT)
