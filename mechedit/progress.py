"""Progress bars that Ctrl-C finds either whole or not begun."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from mechedit.interrupts import uninterrupted


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """A bar of `tqdm`, whose making no interrupt cuts short: half of one writes a traceback as it goes.

    Args:
        iterable: what is counted, or None.
        **options: of `tqdm`.
    """
    with uninterrupted():
        return tqdm(iterable, **options)


def end_bars() -> None:
    """End the lines of progress that an error left open, so that what is said next has a line of its own."""
    for bar in tuple(getattr(tqdm, "_instances", ())):
        bar.close()
