"""Tables taken apart by rows, with types that can be checked: pandas' own are too wide for that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import pandas as pd


def groups_of(table: pd.DataFrame, columns: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """The rows of each combination of values in `columns`, in the order in which the combinations first occur."""
    for values, rows in table.groupby(list(columns), sort=False):
        yield cast("tuple[Any, ...]", values), rows


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Each row as a dictionary by column."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def columns_of(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Some columns of a table, in this order."""
    return table.loc[:, list(names)]


def means_by(table: pd.DataFrame, column: str, value: str) -> pd.Series:
    """The mean of `value` for each value of `column`, ascending."""
    return pd.Series(table.groupby(column)[value].mean())


def total_effect(effects: pd.DataFrame) -> float:
    """The total effect of the corruption, clean minus corrupted score, averaged over the facts of a trace."""
    first = effects.drop_duplicates("fact")
    means = first.loc[:, ["clean", "corrupted"]].to_numpy(dtype=float).mean(0)
    return float(means[0] - means[1])
