"""Windows of layers to edit, and held-out requests to edit them with."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, NamedTuple, get_args

from mechedit.arguments import checked
from mechedit.bounds import check_numbers, check_sequences
from mechedit.data import EditRequest
from mechedit.errors import InputError, brief, check_at_least, check_choice
from mechedit.models import MOST_LAYERS

By = Literal["trace", "sweep", "both"]
"""How the layers are chosen: by the trace, by the sweep, or by both."""


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
        """Number of its layers."""
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"layers {self.first}–{self.last}" if self.width > 1 else f"layer {self.first}"


@checked
def windows_of(n_layers: int, *widths: int) -> list[Window]:
    """Every window of the given widths in a model of `n_layers`, narrow ones first, each once.

    Raises:
        InputError: a width below 1 or above the number of layers; more layers than any model has.
    """
    if not 0 <= n_layers <= MOST_LAYERS:
        raise InputError(f"n_layers is {brief(n_layers)}, expected at most {MOST_LAYERS:,}; give a model's number")
    for width in widths:
        if not 1 <= width <= n_layers:
            raise InputError(f"the width is {width}, expected 1 to {n_layers}, the model's layers; choose another")
    return [Window(start, start + width - 1) for width in sorted(set(widths)) for start in range(n_layers - width + 1)]


def short_sweep(ranges: Iterable[Sequence[int]], n_layers: int, width: int) -> list[Window]:
    """The windows that decide between ranges which tracing could not: the ranges, and the depth in steps of `width`.

    Args:
        ranges: consecutive layers, ascending; those of more than twice the `width` and empty ones are left out.
        n_layers: the model's depth.
        width: of the windows that cover the depth, side by side from layer 0.
    """
    candidates = [Window(layers[0], layers[-1]) for layers in ranges if 0 < len(layers) <= 2 * width]
    steps = [Window(start, start + width - 1) for start in range(0, n_layers - width + 1, width)]
    return check_windows([*candidates, *steps], n_layers)


def check_windows(windows: Iterable[tuple[int, int]], n_layers: int) -> list[Window]:
    """The windows, each once, ordered by last layer, so that those with the same last layer share the search for z.

    Raises:
        InputError: none, one that runs backwards, or one that leaves the model.
    """
    windows = list(windows)
    for ends in windows:
        if not isinstance(ends, tuple | list) or [isinstance(end, Integral) for end in ends] != [True, True]:
            raise InputError(
                f"one of the windows is {brief(ends)}, expected its first and its last layer, such as (1, 4); fix it"
            )
    ordered = sorted({Window(*ends) for ends in windows}, key=lambda window: (window.last, window.first))
    if not ordered:
        raise InputError("there are no windows to sweep, expected at least one; name some, such as 1-4,2-5")
    for window in ordered:
        if not 0 <= window.first <= window.last < n_layers:
            raise InputError(
                f"the window {window.first}-{window.last} does not lie in the model, expected first and last of "
                f"0 … {n_layers - 1}, the lower one first; choose another"
            )
    return ordered


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Settings of a sweep, and how the layers are chosen."""

    by: str = "trace"
    """How to choose the layers: `trace`, the rule's range; `sweep`, the best-scoring window; `both`, of the windows
    that score as well as the best, the one with the largest contribution per layer."""
    windows: tuple[Window, ...] | None = None
    """Windows to edit; None means every single layer, and every window of `width`. The selected range is always
    added."""
    width: int | None = None
    """Width of the windows in layers; None means that of the selected range."""
    requests: int = 20
    """Number of held-out requests to edit with."""
    seed: int = 0
    """Seed of the sample of requests and of the bootstrap."""

    def __post_init__(self) -> None:
        check_sequences(self)
        check_numbers(self, width=10_000)
        check_at_least("width", self.width, 1, optional=True)
        check_choice("by", self.by, get_args(By))
        check_at_least("requests", self.requests, 2, "choose more, as fewer give no interval")

    def swept(self, selected: Sequence[int], n_layers: int) -> list[Window]:
        """The windows to sweep, given the layers that the trace selects (none, when it finds no early site).

        Raises:
            InputError: nothing says how wide they should be, or one leaves the model.
        """
        selected_window = [Window(selected[0], selected[-1])] if len(selected) else []
        if self.windows is not None:
            return check_windows([*self.windows, *selected_window], n_layers)
        width = self.width or len(selected)
        if not width:
            raise InputError(
                "the trace selects no layers, so nothing says how wide the windows to sweep should be; give a "
                "width (--width) or windows (--windows)"
            )
        return check_windows([*windows_of(n_layers, 1, width), *selected_window], n_layers)


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A sample of requests to sweep with."""

    requests: tuple[EditRequest, ...]
    """The sample, in the order of all requests."""
    traced: int
    """Number of them whose subjects were traced."""

    @property
    def warning(self) -> str | None:
        """A sentence on requests that are not held out; None when all are."""
        if not self.traced:
            return None
        return (
            f"{self.traced} of the {len(self.requests)} requests are about subjects that were traced, because too few "
            f"others were given: the edits are not independent of the trace"
        )


def held_out(requests: Sequence[EditRequest], traced: Collection[str], count: int = 20, seed: int = 0) -> HeldOut:
    """A seeded sample of `count` requests about subjects that were not traced, or about others where too few are.

    Args:
        requests: requests to sample from.
        traced: subjects of the traced facts.
        count: size of the sample; all requests, when there are fewer.
        seed: seed of the sample.

    Raises:
        InputError: no requests.
    """
    if not requests:
        raise InputError("there are no requests to edit, expected at least one; check the requests file")
    order = list(range(len(requests)))
    random.Random(seed).shuffle(order)
    subjects = set(traced)
    order.sort(key=lambda i: requests[i].subject in subjects)  # stable: untraced first, else as shuffled
    sample = [requests[i] for i in sorted(order[:count])]
    return HeldOut(requests=tuple(sample), traced=sum(request.subject in subjects for request in sample))
