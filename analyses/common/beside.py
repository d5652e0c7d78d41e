"""The papers' numbers beside this model's, in the same tables and figures.

They come from `mechedit.published` alone. A row of a paper is called by its method and the paper's model, such as
`memit, paper (GPT-J)`, so that figures give it the method's color.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analyses.common.frames import groups_of
from analyses.common.printing import format_scores
from mechedit.errors import InputError
from mechedit.published import published_scores, published_table


def paper_name(method: str, model: str) -> str:
    """What a row of a paper is called."""
    return f"{method}, paper ({model})"


def check_protocol(table: str, protocol: str) -> None:
    """Refuse numbers of another protocol than the table they are to stand in.

    Args:
        table: name of a published table.
        protocol: `batch`, all records at once, or `single`, each record alone.

    Raises:
        InputError: the published table is of the other one.
    """
    published = "single" if set(published_table(table)["edits"]) == {1} else "batch"
    if published != protocol:
        raise InputError(
            f"{table} is of the protocol {published!r}, expected one of {protocol!r}: two protocols have no table in "
            f"common"
        )


def paper_scores(table: str, models: Sequence[str], protocol: str = "batch") -> pd.DataFrame:
    """The scores of a published table, tidy: `method, measure, mean, low, high`.

    Raises:
        InputError: they are of another protocol.
    """
    check_protocol(table, protocol)
    frames = [published_scores(table, model).assign(model=model) for model in models]
    scores = pd.concat(frames, ignore_index=True)
    names = [paper_name(method, model) for method, model in zip(scores["method"], scores["model"], strict=True)]
    return scores.assign(method=names).drop(columns="model")


def printed_scores(table: str, models: Sequence[str], measures: Sequence[str], protocol: str = "batch") -> pd.DataFrame:
    """The same as the papers print them: one row per method, each measure with half its interval in brackets."""
    rows = [
        {"method": method, **format_scores(scores, measures)}
        for (method,), scores in groups_of(paper_scores(table, models, protocol), ["method"])
    ]
    return pd.DataFrame(rows)


def with_paper(printed: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """This model's rows, and then the paper's, with empty cells where the paper has nothing."""
    columns = [column for column in printed if column in set(paper)]
    rows = pd.concat([printed.astype(object), paper.loc[:, columns].astype(object)], ignore_index=True)
    return rows.where(rows.notna(), "")
