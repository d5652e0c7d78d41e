"""The rules that turn mean curves into a contiguous range of layers, each a small function.

A rule sees the curves averaged over facts (or over a bootstrap resample of them) and the settings, and returns
ascending layers without a hole, or none. Within `min_width` and `max_width` it returns what its definition says;
outside them `within_bounds` grows or shrinks that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from mechedit.errors import InputError
from mechedit.selection.config import SelectConfig
from mechedit.selection.curves import Curve, Curves, contribution

Layers = tuple[int, ...]


def contribution_rule(curves: Curves, config: SelectConfig) -> Layers:
    """The shortest run of layers over which `share` of the gap's largest fall takes place.

    With c(l) = gap(l−1) − gap(l), a run [a, b] makes Σ_{a..b} c(l) = gap(a−1) − gap(b). Of the runs that make
    at least share · max over runs of that, the shortest; of several, the one that makes most; then the lowest.
    Layer 0 is in it only where `min_width` asks for it, since no state below it was restored. Noise enters by the
    two ends of a run only.
    """
    c = contribution(curves.gap)
    # made[a, b] is what the run [a, b] makes; runs of layer 0 or of no layers make nothing.
    made = np.triu(np.concatenate([[-np.inf], curves.gap[:-1]])[:, None] - curves.gap)
    made[0] = 0.0
    if (most := made.max()) <= 0:
        return ()
    first, last = np.nonzero(made >= config.share * most)
    best = int(np.lexsort((first, -made[first, last], last - first))[0])
    return within_bounds(_run(int(first[best]), int(last[best])), c, config)


def gap_peak_rule(curves: Curves, config: SelectConfig) -> Layers:
    """The contiguous run around the largest gap in which gap(l) ≥ share · max gap: the papers' wording.

    Where MLPs exist in known layers only, the gap is largest below them, since it counts the MLPs above l.
    """
    return within_bounds(_around_peak(curves.gap, config.share), curves.gap, config)


def mlp_window_rule(curves: Curves, config: SelectConfig) -> Layers:
    """The layers that the window of MLP outputs with the largest AIE restores.

    The window at l restores l − w//2 … l − w//2 + w − 1, cut at the first and last layer. It is as wide as the
    trace made it, however narrow the site is.

    Raises:
        ValueError: the curves hold no windows.
    """
    if curves.window is None:
        raise ValueError("these curves hold no MLP windows")
    peak = int(curves.window.argmax())
    if curves.window[peak] <= 0:
        return ()
    return within_bounds(tuple(curves.spans[peak]), curves.window, config)


def moving_average_rule(curves: Curves, config: SelectConfig) -> Layers:
    """The run of `width` layers with the highest mean contribution: the steepest fall of the gap.

    The published moving average is over the gap itself, which is largest below the MLPs that make it; the mean
    of c(l) over [a, b] is (gap(a−1) − gap(b)) / width. The lowest of several.
    """
    c = contribution(curves.gap)
    width = moving_width(len(c), config)
    # Layer 0 stands for nothing measured, so that runs start at 1 where they can.
    sums = np.convolve(c, np.ones(width), mode="valid")
    start = int(sums[1:].argmax()) + 1 if len(sums) > 1 else 0
    return _run(start, start + width - 1) if sums[start] > 0 else ()


RULES: Mapping[str, Callable[[Curves, SelectConfig], Layers]] = {
    "contribution": contribution_rule,
    "gap-peak": gap_peak_rule,
    "mlp-window": mlp_window_rule,
    "moving-average": moving_average_rule,
}


def traced_rules(curves: Curves) -> list[str]:
    """The rules whose effects are there."""
    return [name for name in RULES if name != "mlp-window" or curves.window is not None]


def moving_width(n_layers: int, config: SelectConfig) -> int:
    """`config.width`, or 5 layers from 28 up (as most published ranges have), scaled to depth below.

    Raises:
        InputError: the model has fewer layers.
    """
    scaled = min(5, math.ceil(5 * n_layers / 28))
    width = config.width or min(max(scaled, config.min_width or 1), config.max_width or n_layers)
    if max(width, config.min_width or 1) > n_layers:
        raise InputError(f"{max(width, config.min_width or 1)} layers are wanted, expected at most all {n_layers}")
    return width


def within_bounds(layers: Layers, score: Curve, config: SelectConfig) -> Layers:
    """A range with at least `min_width` and at most `max_width` layers; an empty one stays empty.

    A narrower one takes in the neighbor of the higher score, one at a time, the lower layer of two alike. Of a
    wider one the run of `max_width` layers with the highest sum of scores is kept, the lowest of several alike.
    """
    if not layers:
        return ()
    first, last = layers[0], layers[-1]
    wide = config.max_width
    if wide is not None and last - first + 1 > wide:
        sums = np.convolve(score[first : last + 1], np.ones(wide), mode="valid")
        first += int(sums.argmax())
        last = first + wide - 1
    while last - first + 1 < min(config.min_width or 1, len(score)):
        below = score[first - 1] if first > 0 else -np.inf
        above = score[last + 1] if last + 1 < len(score) else -np.inf
        first, last = (first - 1, last) if below >= above else (first, last + 1)
    return _run(first, last)


def _around_peak(curve: Curve, share: float) -> Layers:
    """The contiguous run around the largest value in which values are at least `share` of it."""
    peak = int(curve.argmax())
    if curve[peak] <= 0:
        return ()
    low = np.flatnonzero(curve < share * curve[peak])
    return _run(int(low[low < peak].max(initial=-1)) + 1, int(low[low > peak].min(initial=len(curve))) - 1)


def _run(first: int, last: int) -> Layers:
    return tuple(range(first, last + 1))
