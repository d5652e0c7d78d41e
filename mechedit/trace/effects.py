"""Effects: the tidy frame that a trace returns, which a notebook shows as heatmaps."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd

from mechedit.tables import read_table
from mechedit.trace.columns import with_present_metric_names


class Effects(pd.DataFrame):
    """Tidy effects: a frame like any other, which a notebook shows as heatmaps of one fact.

    The fact is the one that the corruption hurts most, or the only one. Rows that do not make complete heatmaps
    (a `head`, a sample, averages) are shown as the table they are.
    """

    def __init__(self, data: Any = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(data, *args, **kwargs)
        if isinstance(data, pd.DataFrame):
            self.attrs = deepcopy(data.attrs)  # pandas keeps attrs only in its own copies

    @property
    def _constructor(self) -> type[Effects]:
        return Effects

    def _repr_html_(self) -> str | None:
        # Imported here: only notebooks need the web page.
        from mechedit.trace.display import effects_html

        table = pd.DataFrame(self)._repr_html_()  # pyright: ignore[reportCallIssue]
        if table is None:  # HTML has been switched off
            return None
        return effects_html(self, table) or table


def read_effects(path: str | Path, **equal: Any) -> Effects:
    """Read effects.parquet, or only its rows whose columns hold the given values.

    Raises:
        InputError: there is no such file, or it is not parquet or was cut short.
    """
    return Effects(with_present_metric_names(read_table(path, **equal)))
