"""Style of all figures: type, sizes, colors that any color vision tells apart, legends, and how to write files."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mechedit.atomic import atomic

COLUMN_WIDTH = 3.25
"""Width in inches of a column of a two-column paper."""
PAGE_WIDTH = 6.75
"""Width in inches of its page."""
SCREEN_DPI = 130
"""Pixels per inch in a notebook: the papers' small type is legible, and a page fits the width."""

# From Okabe and Ito's palette; lightness differs too, for gray prints.
INK, GRAY, BLUE, GREEN, ORANGE = "#222222", "#8C8C8C", "#0072B2", "#009E73", "#E69F00"
SKY, VERMILION, PURPLE = "#56B4E9", "#D55E00", "#CC79A7"
SEVER_COLORS = {"nothing": BLUE, "attn": ORANGE, "mlp": GREEN}
KIND_COLORS = {"state": BLUE, "mlp": GREEN, "attn": VERMILION}
ROLE_COLORS = {
    "before": GRAY,
    "subject_first": SKY,
    "subject_middle": GREEN,
    "subject_last": BLUE,
    "after": ORANGE,
    "further": PURPLE,
    "last": VERMILION,
}
SPARE = (PURPLE, SKY, VERMILION, GRAY, INK)
"""Colors for lines and bars that have none of their own."""
Stroke = str | tuple[float | int, tuple[float | int, ...]]
STROKES: Sequence[Stroke] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))

_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib, and holds most scripts
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "savefig.dpi": 200,
}


@contextlib.contextmanager
def paper_style() -> Iterator[None]:
    """Small type, thin lines and embedded fonts, within the `with` block only."""
    with mpl.rc_context():
        mpl.rcdefaults()  # the caller's own style must not leak into a paper's figures
        mpl.rcParams.update(_STYLE)
        yield


class PaperFigure(Figure):
    """A figure that a notebook shows without pyplot, sharp and at a legible size."""

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, bytes], dict[str, dict[str, int]]]:
        """The picture as PNG, and how large to show it; Jupyter asks for it."""
        picture = io.BytesIO()
        with paper_style():
            self.savefig(picture, format="png")
        width, height = (round(inches * SCREEN_DPI) for inches in self.get_size_inches())
        return {"image/png": picture.getvalue()}, {"image/png": {"width": width, "height": height}}


def draw(plot: Callable[[Axes], Axes], *, width: float = COLUMN_WIDTH, height: float = 2.1) -> Figure:
    """A figure of one panel, inches wide and high; `plot` draws it, in the paper style."""
    with paper_style():
        figure = PaperFigure(figsize=(width, height))
        plot(figure.subplots())
    return figure


def save_figure(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write `name`.pdf (fonts embedded) and `name`.png (200 dpi) to `folder`, each complete or not at all."""
    paths = [Path(folder) / f"{name}.{kind}" for kind in ("pdf", "png")]
    for path in paths:
        # Without a date, the same figure gives the same bytes.
        metadata = {"CreationDate": None} if path.suffix == ".pdf" else {}
        with paper_style(), atomic(path) as temporary:
            figure.savefig(temporary, metadata=metadata)
    return paths


def heat_colors(norm: Normalize, helps: int = 1) -> Colormap:
    """White at zero, blue where restoring helps, red where it harms, equally strong for equal sizes.

    It spans exactly the values of `norm`: a color bar shows no color that cannot occur.

    Args:
        norm: the scale of the effects.
        helps: sign of an effect that helps, 1 or −1.
    """
    low, high = float(norm.vmin or 0.0), float(norm.vmax or 0.0)
    largest = max(abs(low), abs(high))
    ends = (low / largest + 1) / 2, (high / largest + 1) / 2
    colors = mpl.colormaps["RdBu" if helps > 0 else "RdBu_r"]
    return ListedColormap(colors(np.linspace(*ends, 256))).with_extremes(bad="#D9D9D9")


def layer_axis(ax: Axes, layers: Iterable[Any]) -> Axes:
    """Make the horizontal axis one of layers: at most nine whole numbers, and half a layer of room at the ends."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    shown = list(layers)
    ax.set_xlim(min(shown) - 0.6, max(shown) + 0.6)
    return ax


def legend_above(ax: Axes, columns: int, handles: Sequence[Artist] | None = None) -> None:
    """Put the legend above the axes, where it hides nothing; its entries are the artists drawn, or the handles."""
    position = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.02), "handles": handles}
    ax.legend(**position, ncols=columns, columnspacing=1.2, handlelength=1.1 if handles is None else 2.2)


def share_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Put one legend over all panels, and let only the first name the vertical axis."""
    entries: dict[str, Any] = {}
    for legend in filter(None, (ax.get_legend() for ax in axes)):
        names = [text.get_text() for text in legend.get_texts()]
        entries = {**dict(zip(names, legend.legend_handles, strict=True)), **entries}
        legend.remove()
    for ax in axes[1:]:
        ax.set_ylabel("")
    rows = -(-len(entries) // 4)
    columns = -(-len(entries) // rows)
    figure.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=columns)


def wrapped(label: str, inches: float) -> str:
    """A label of a vertical axis, broken into as many lines as its height needs."""
    return textwrap.fill(label, max(16, int(18 * inches)))


def runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive layers."""
    starts = [layer for layer in sorted(layers) if layer - 1 not in layers]
    return list(zip(starts, [layer for layer in sorted(layers) if layer + 1 not in layers], strict=True))
