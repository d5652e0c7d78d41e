"""Draw the README's picture of a model from a folder with a trace, and the layers that were selected.

python docs/images/make.py run tiny                     # after `make run`
python docs/images/make.py papers/trace smollm2 9-13    # after analyses.papers.trace_average; traces one more fact
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

import mechedit as me
from analyses.real_models.make import make
from mechedit.cli.parsing import parse_layers
from mechedit.figures import PaperFigure, paper_style, plot_fact, plot_lines, plot_severed
from mechedit.figures.style import GRAY
from mechedit.tables import read_table, where
from mechedit.trace import SEVER_LABELS

FACT = "electricidad/tool"
"""The tiny model's, of those in its run."""
MOST_BARS = 16
"""Layers above which bars of three severings are too thin for half a page."""
EIFFEL = me.Fact(id="eiffel", subject="The Eiffel Tower", prompt="{} is located in the city of", object="Paris")


def picture(fact: pd.DataFrame, shown: pd.DataFrame, layers: tuple[int, ...]) -> Figure:
    """One fact's states as a heatmap, and the average effect at the subject's last token, whole and severed.

    Args:
        fact: effects of the one, with nothing severed.
        shown: effects of all, of states.
        layers: to be marked.
    """
    with paper_style():
        figure = PaperFigure(figsize=(7.2, 2.7), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
        plot_fact(fact, left)
        if shown["layer"].nunique() > MOST_BARS:
            severings = [sever for sever in SEVER_LABELS if sever in set(shown["sever"])]
            plot_lines(shown, right, kinds=["state"], roles=["subject_last"], severings=severings)
            right.axvspan(layers[0] - 0.5, layers[-1] + 0.5, color=GRAY, alpha=0.22, linewidth=0, zorder=0)
        else:
            plot_severed(shown, right, list(layers))
    return figure


def main() -> None:
    """Write NAME_trace.png beside this file."""
    run, name = Path(sys.argv[1]), sys.argv[2]
    shown = where(read_table(run / "effects.parquet"), kind="state", metric="probability")
    layers = parse_layers(sys.argv[3]) if sys.argv[3:] else me.Selection.load(run / "selection.json").layers
    if name == "tiny":
        fact = where(shown, fact=FACT, sever="nothing")
    else:
        traced = me.trace_facts(me.load_model(make(name)), [EIFFEL], me.TraceConfig(kinds=("state",)))
        fact = where(traced, metric="probability")
    figure = picture(fact, shown, tuple(layers))
    with paper_style():
        figure.savefig(Path(__file__).parent / f"{name}_trace.png", dpi=200)


if __name__ == "__main__":
    main()
