"""Which windows of layers to edit, and which requests to edit them with."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from mechedit.data import EditRequest
from mechedit.errors import InputError, check_at_least, check_choice

By = Literal["trace", "sweep", "both"]
"""What chooses the layers."""


class Window(NamedTuple):
    """Consecutive layers, both ends included, counted from 0."""

    first: int
    last: int

    @property
    def layers(self) -> list[int]:
        """Its layers, ascending."""
        return list(range(self.first, self.last + 1))

    @property
    def width(self) -> int:
        """How many layers it has."""
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"layers {self.first}–{self.last}" if self.width > 1 else f"layer {self.first}"


def windows_of(n_layers: int, *widths: int) -> list[Window]:
    """Every window of the given widths in a model of `n_layers`, narrow ones first, each once.

    Raises:
        InputError: a width below 1 or above the number of layers.
    """
    for width in widths:
        if not 1 <= width <= n_layers:
            raise InputError(f"the width is {width}, expected 1 to {n_layers}, the model's layers; choose another")
    return [Window(start, start + width - 1) for width in sorted(set(widths)) for start in range(n_layers - width + 1)]


def check_windows(windows: Iterable[tuple[int, int]], n_layers: int) -> list[Window]:
    """The windows, each once, ordered by their last layer: those that end alike share the search for z.

    Raises:
        InputError: none, one that runs backwards, or one that leaves the model.
    """
    found = sorted({Window(*ends) for ends in windows}, key=lambda window: (window.last, window.first))
    if not found:
        raise InputError("there are no windows to sweep, expected at least one; name some, such as 1-4,2-5")
    for window in found:
        if not 0 <= window.first <= window.last < n_layers:
            raise InputError(
                f"the window {window.first}-{window.last} does not lie in the model, expected first and last of "
                f"0 … {n_layers - 1}, the lower one first; choose another"
            )
    return found


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What is swept, and what chooses the layers in the end."""

    by: str = "trace"
    """`trace`: the rule's range; `sweep`: the best-scoring window; `both`: of the windows that cannot be told from
    the best, the one with the largest contribution (`choose`)."""
    windows: tuple[Window, ...] | None = None
    """None means every single layer, and every window of `width`. The selected range is always added."""
    width: int | None = None
    """None means the width of the selected range."""
    requests: int = 20
    """Held-out requests to edit with."""
    seed: int = 0
    """Of the sample of requests and of the bootstrap."""

    def __post_init__(self) -> None:
        check_choice("by", self.by, get_args(By))
        check_at_least("requests", self.requests, 2, "choose more, as fewer give no interval")

    def swept(self, selected: Sequence[int], n_layers: int) -> list[Window]:
        """The windows to sweep, given the layers that the trace selects (none, when it finds no early site).

        Raises:
            InputError: nothing says how wide they should be, or one leaves the model.
        """
        own = [Window(selected[0], selected[-1])] if len(selected) else []
        if self.windows is not None:
            return check_windows([*self.windows, *own], n_layers)
        width = self.width or len(selected)
        if not width:
            raise InputError(
                "the trace selects no layers, so nothing says how wide the windows to sweep should be; give a "
                "width (--width) or windows (--windows)"
            )
        return check_windows([*windows_of(n_layers, 1, width), *own], n_layers)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Requests to sweep with."""

    requests: tuple[EditRequest, ...]
    """In the order they were given."""
    traced: int
    """How many of them are about subjects that were traced."""

    @property
    def warning(self) -> str | None:
        """What is wrong with the sample, in a sentence; None when it is wholly held out."""
        if not self.traced:
            return None
        return (
            f"{self.traced} of the {len(self.requests)} requests are about subjects that were traced, because too few "
            f"others were given: the edits are not independent of the trace"
        )


def held_out(requests: Sequence[EditRequest], traced: Collection[str], count: int = 20, seed: int = 0) -> HeldOut:
    """A seeded sample of `count` requests about subjects that were not traced; others only fill up what lacks.

    Args:
        requests: to draw from.
        traced: subjects of the traced facts.
        count: how many are wanted; all, when there are fewer.
        seed: of the draw.

    Raises:
        InputError: no requests.
    """
    if not requests:
        raise InputError("there are no requests to edit, expected at least one; check the requests file")
    order = list(range(len(requests)))
    random.Random(seed).shuffle(order)
    subjects = set(traced)
    order.sort(key=lambda i: requests[i].subject in subjects)  # stable: untraced first, else as shuffled
    taken = [requests[i] for i in sorted(order[:count])]
    return HeldOut(requests=tuple(taken), traced=sum(request.subject in subjects for request in taken))
