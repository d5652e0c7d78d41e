"""Scores in rows: what is drawn is what the table holds."""

from __future__ import annotations

import pandas as pd
import pytest
from matplotlib.figure import Figure

from mechedit.errors import InputError
from mechedit.figures import plot_score_rows, score_rows_figure

TABLE = pd.DataFrame(
    [("rome", "S", 20.0, 15.0, 22.0), ("memit", "S", 90.0, 80.0, 95.0), ("rome", "GE", 600.0, 590.0, 620.0)],
    columns=["method", "measure", "mean", "low", "high"],
)


def test_rows_are_in_order_of_appearance_with_their_intervals():
    ax = plot_score_rows(TABLE, Figure().subplots(), measure="S")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rome", "memit"]
    drawn = [(c.lines[0].get_xydata().tolist(), c.lines[2][0].get_segments()[0][:, 0].tolist()) for c in ax.containers]
    assert drawn == [([[20, 0]], [15, 22]), ([[90, 1]], [80, 95])]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first row is on top


def test_a_method_without_the_measure_keeps_its_row_empty():
    figure = score_rows_figure(TABLE, ("S", "ES", "GE"))
    assert [ax.get_title().split("\n")[0] for ax in figure.axes] == ["Score", "Fluency"]
    assert len(figure.axes[1].containers) == 1
    assert figure.axes[1].get_xlim()[1] > 600 > figure.axes[0].get_xlim()[1]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="no rows of 'PS'"):
        plot_score_rows(TABLE, Figure().subplots(), measure="PS")
    with pytest.raises(InputError, match="expected some of"):
        score_rows_figure(TABLE, ("PS",))
