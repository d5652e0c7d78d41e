"""Tables in Markdown, and scores as the papers print them: a mean with half its interval in brackets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from mechedit.evaluation import Summary, measure_named

SCORE_COLUMNS = ("measure", "mean", "low", "high", "n")


def score_frame(summary: Summary) -> pd.DataFrame:
    """A summary as rows `SCORE_COLUMNS`, in the papers' units."""
    return pd.DataFrame([{"measure": name, **entry} for name, entry in summary.items()], columns=list(SCORE_COLUMNS))


def format_interval(mean: float, low: float, high: float, *, digits: int = 1) -> str:
    """A mean with its interval, as the papers print it: 97.8 (1.2), the number in brackets being half of it.

    Without an interval (NaN), the mean alone.
    """
    if pd.isna(low) or pd.isna(high):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({(high - low) / 2:.{digits}f})"


def format_scores(rows: pd.DataFrame, measures: Sequence[str]) -> dict[str, str]:
    """The measures of one edit that its rows contain, each written by `format_interval`."""
    rows_by_measure = rows.set_index("measure")
    return {
        name: format_interval(*rows_by_measure.loc[name, ["mean", "low", "high"]], digits=measure_named(name).digits)
        for name in measures
        if name in rows_by_measure.index
    }


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; bars in cells are escaped, and a cell is one line."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
