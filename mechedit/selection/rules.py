"""The rules that turn mean curves into a contiguous range of layers, each a small function.

A rule takes the curves averaged over facts (or over a bootstrap resample of them) and the settings, and returns
ascending layers without a gap in between, or none. A range narrower than `min_width` or wider than `max_width` is
grown or shrunk by `within_bounds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from mechedit.errors import InputError
from mechedit.selection.config import SelectConfig
from mechedit.selection.curves import LayerCurve, MeanCurves, contribution

Layers = tuple[int, ...]


def contribution_rule(curves: MeanCurves, config: SelectConfig) -> Layers:
    """The shortest run of layers over which `share` of the gap's largest fall takes place.

    With c(l) = gap(l−1) − gap(l), the gap falls by Σ_{a..b} c(l) = gap(a−1) − gap(b) over a run [a, b]. Of the runs
    with at least share · the largest fall, the rule takes the shortest; of several, the one with the largest fall;
    then the lowest. Layer 0 is in it only where `min_width` requires it, since no state below it was restored. Noise
    enters by the two ends of a run only.
    """
    c = contribution(curves.gap)
    # falls[a, b] = gap(a−1) − gap(b) over the run [a, b]; 0 for runs of layer 0 and for a > b.
    falls = np.triu(np.concatenate([[-np.inf], curves.gap[:-1]])[:, None] - curves.gap)
    falls[0] = 0.0
    if (largest := falls.max()) <= 0:
        return ()
    first, last = np.nonzero(falls >= config.share * largest)
    best = int(np.lexsort((first, -falls[first, last], last - first))[0])
    return within_bounds(_run(int(first[best]), int(last[best])), c, config)


def gap_peak_rule(curves: MeanCurves, config: SelectConfig) -> Layers:
    """The contiguous run around the largest gap in which gap(l) ≥ share · max gap: the papers' wording.

    Where MLPs exist in known layers only, the gap is largest below them, since it counts the MLPs above l.
    """
    return within_bounds(_around_peak(curves.gap, config.share), curves.gap, config)


def mlp_window_rule(curves: MeanCurves, config: SelectConfig) -> Layers:
    """The layers that the window of MLP outputs with the largest AIE restores.

    The window at l restores l − w//2 … l − w//2 + w − 1, cut at the first and last layer. Its width is that of the
    trace, however narrow the site is.

    Raises:
        ValueError: the curves hold no windows.
    """
    if curves.window is None:
        raise ValueError("these curves hold no MLP windows")
    peak = int(curves.window.argmax())
    if curves.window[peak] <= 0:
        return ()
    return within_bounds(tuple(curves.spans[peak]), curves.window, config)


def moving_average_rule(curves: MeanCurves, config: SelectConfig) -> Layers:
    """The run of `width` layers with the highest mean contribution: the steepest fall of the gap.

    The published moving average is over the gap itself, which is largest below the MLPs that cause it; the mean
    of c(l) over [a, b] is (gap(a−1) − gap(b)) / width. Of several such runs, the lowest.
    """
    c = contribution(curves.gap)
    width = moving_width(len(c), config)
    # The contribution of layer 0 was not measured, so runs start at 1 where they can.
    sums = np.convolve(c, np.ones(width), mode="valid")
    start = int(sums[1:].argmax()) + 1 if len(sums) > 1 else 0
    return _run(start, start + width - 1) if sums[start] > 0 else ()


RULES: Mapping[str, Callable[[MeanCurves, SelectConfig], Layers]] = {
    "contribution": contribution_rule,
    "gap-peak": gap_peak_rule,
    "mlp-window": mlp_window_rule,
    "moving-average": moving_average_rule,
}


def traced_rules(curves: MeanCurves) -> list[str]:
    """The rules whose effects were traced."""
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


def within_bounds(layers: Layers, score: LayerCurve, config: SelectConfig) -> Layers:
    """A range with at least `min_width` and at most `max_width` layers; an empty one stays empty.

    A narrower range grows by the neighbor with the higher score, one at a time, and by the lower layer on a tie. A
    wider range shrinks to its run of `max_width` layers with the highest sum of scores, the lowest on a tie.
    """
    if not layers:
        return ()
    first, last = layers[0], layers[-1]
    max_width = config.max_width
    if max_width is not None and last - first + 1 > max_width:
        sums = np.convolve(score[first : last + 1], np.ones(max_width), mode="valid")
        first += int(sums.argmax())
        last = first + max_width - 1
    while last - first + 1 < min(config.min_width or 1, len(score)):
        below = score[first - 1] if first > 0 else -np.inf
        above = score[last + 1] if last + 1 < len(score) else -np.inf
        first, last = (first - 1, last) if below >= above else (first, last + 1)
    return _run(first, last)


def _around_peak(curve: LayerCurve, fraction: float) -> Layers:
    """The contiguous run around the largest value in which values are at least `fraction` of it."""
    peak = int(curve.argmax())
    if curve[peak] <= 0:
        return ()
    low = np.flatnonzero(curve < fraction * curve[peak])
    return _run(int(low[low < peak].max(initial=-1)) + 1, int(low[low > peak].min(initial=len(curve))) - 1)


def _run(first: int, last: int) -> Layers:
    return tuple(range(first, last + 1))
