"""Color, stroke and marker of each editing method, the same in all figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.colors import to_hex, to_rgb

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
MOST_STROKES = 3
"""Variants of a method that differ by strokes alone; more of them differ by shades as well."""
LIGHTEST, DARKEST = 0.55, 0.6
"""How much white is in the palest shade, and black in the darkest."""


def line_styles(names: Sequence[str], colors: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Color, stroke and marker of each line, as arguments of matplotlib.

    A known method has its own everywhere, a variant of it (`memit, strategy sqrt`) the next stroke, and where they are
    many a darker shade; names of no known method take the next color.

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
        if known and methods.count(method) > MOST_STROKES:
            color = shade(color, count / (methods.count(method) - 1))
        stroke: Stroke = STROKES[(STROKES.index(STROKE_OF.get(method, "-")) + variant) % len(STROKES)]
        styles[name] = {"color": color, "linestyle": stroke, "marker": MARKERS.get(method, "o")}
    return styles


def shade(color: str, part: float) -> str:
    """The color itself (½), a paler one (to 0) or a darker one (to 1), for lines that are in an order."""
    white, black = LIGHTEST * max(0.0, 1 - 2 * part), DARKEST * max(0.0, 2 * part - 1)
    red, green, blue = ((channel + white * (1 - channel)) * (1 - black) for channel in to_rgb(color))
    return to_hex((red, green, blue))
