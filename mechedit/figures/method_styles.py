"""Color, stroke and marker of each editing method, the same in all figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mechedit.figures.style import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    SPARE,
    STROKES,
    VERMILION,
    Stroke,
)

METHOD_COLORS = {
    "memit": BLUE,
    "rome": VERMILION,
    "alphaedit": GREEN,
    "pmet": PURPLE,
    "emmet": SKY,
    "ft": ORANGE,
    "ft_l": ORANGE,
    "ft_w": INK,
    "kn": SKY,
    "mend": PURPLE,
    "unedited": GRAY,
}
"""Variants of a method share its color and differ by their stroke."""
MARKERS = {
    "memit": "o",
    "rome": "s",
    "alphaedit": "^",
    "pmet": "D",
    "emmet": "v",
    "ft": "P",
    "ft_l": "X",
    "ft_w": "*",
    "kn": "p",
    "mend": "h",
}
STROKE_OF = {
    "ft_l": STROKES[1],
    "ft_w": STROKES[2],
    "kn": STROKES[3],
    "mend": STROKES[3],
    "unedited": STROKES[1],
}


def line_styles(names: Sequence[str], colors: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Color, stroke and marker of each line, as arguments of matplotlib.

    A known method has its own everywhere, a variant of it (`memit, strategy sqrt`) the next stroke; names of no known
    method take the next color.

    Args:
        names: of the lines, in order.
        colors: for names of no known method, in order; by default those that no known method here uses.
    """
    methods = [name.partition(",")[0].partition("@")[0].strip() for name in names]
    used = {METHOD_COLORS[method] for method in methods if method in METHOD_COLORS}
    free = colors or [color for color in (BLUE, ORANGE, GREEN, *SPARE) if color not in used] or [INK]
    repeats: dict[str, int] = {}
    styles: dict[str, dict[str, Any]] = {}
    for name, method in zip(names, methods, strict=True):
        known = method in METHOD_COLORS
        key = method if known else ""
        count = repeats[key] = repeats.get(key, -1) + 1
        color = METHOD_COLORS[method] if known else free[count % len(free)]
        variant = count if known else count // len(free)
        stroke: Stroke = STROKES[variant % len(STROKES)] if variant else STROKE_OF.get(method, "-")
        styles[name] = {"color": color, "linestyle": stroke, "marker": MARKERS.get(method, "o")}
    return styles
