"""Windows that a search tries: end layers spread over the depth at first, then beside the best, then other widths."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from mechedit.sweep import Window


def spread_ends(ends: Sequence[int], count: int, candidates: Sequence[int]) -> list[int]:
    """`count` end layers spread evenly over `ends` (ascending), the candidates in place of the nearest to them."""
    spread = [ends[index] for index in np.unique(np.linspace(0, len(ends) - 1, count).round().astype(int))]
    for end in dict.fromkeys(candidates):
        free = [index for index, layer in enumerate(spread) if layer not in candidates]
        if free and end not in spread:
            spread[min(free, key=lambda index: (abs(spread[index] - end), index))] = end
    return sorted(spread)


def halfway_ends(end: int, ends: Sequence[int], tried: Collection[int], count: int) -> list[int]:
    """End layers about halfway from `end` to the next on both sides that were tried, at most `count` of them.

    Where no window ends there, the nearest layer between the two that one ends at.
    """
    below = max((layer for layer in tried if layer < end), default=ends[0])
    above = min((layer for layer in tried if layer > end), default=ends[-1])
    chosen: list[int] = []
    for bound in (below, above):
        between = [layer for layer in ends if min(bound, end) <= layer <= max(bound, end) and layer not in tried]
        if between:
            chosen.append(min(between, key=lambda layer: (abs(2 * layer - bound - end), abs(layer - bound))))
    return sorted(chosen)[:count]


def widths_of(window: Window, layers: Collection[int]) -> list[Window]:
    """Windows that end like one, within `layers`: one layer, half and twice as wide, up to two layers wider."""
    width = window.width
    widths = sorted({1, max(1, width // 2), width - 1, width + 1, width + 2, 2 * width} - {0, width})
    beside = [Window(window.last - width + 1, window.last) for width in widths if width <= window.last + 1]
    return [narrow for narrow in beside if set(narrow.layers) <= set(layers)]
