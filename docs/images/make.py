"""Draw the README's picture from a run folder: `make run`, then `python docs/images/make.py run`."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from mechedit.figures import PaperFigure, paper_style, plot_fact, plot_severed
from mechedit.files import read_json
from mechedit.tables import read_table, where

FACT = "electricidad/tool"


def picture(run: Path) -> Figure:
    """One fact's states as a heatmap, and the average effect at the subject's last token, whole and severed."""
    effects = read_table(run / "effects.parquet")
    layers = read_json(run / "selection.json")["layers"]
    shown = where(effects, kind="state", metric="probability")
    known = set(shown["fact"])
    fact = FACT if FACT in known else sorted(known)[0]
    with paper_style():
        figure = PaperFigure(figsize=(7.2, 2.7), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
        plot_fact(where(shown, fact=fact, sever="nothing"), left)
        plot_severed(shown, right, layers)
    return figure


def main() -> None:
    """Write tiny_trace.png beside this file."""
    figure = picture(Path(sys.argv[1]))
    with paper_style():
        figure.savefig(Path(__file__).parent / "tiny_trace.png", dpi=200)


if __name__ == "__main__":
    main()
