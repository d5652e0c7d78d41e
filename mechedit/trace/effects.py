"""Effects: the tidy frame that a trace returns, which shows itself in a notebook."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pandas as pd

from mechedit.trace.display import effects_html


class Effects(pd.DataFrame):
    """Tidy effects: a frame like any other, which a notebook shows as heatmaps of one fact.

    The fact is the one that the corruption hurts most, or the only one. Rows that do not make whole heatmaps
    (a `head`, a sample, averages) are shown as the table they are.
    """

    def __init__(self, data: Any = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(data, *args, **kwargs)
        if isinstance(data, pd.DataFrame):
            self.attrs = deepcopy(data.attrs)  # which pandas keeps only where it copies by itself

    @property
    def _constructor(self) -> type[Effects]:
        return Effects

    def _repr_html_(self) -> str | None:
        table = pd.DataFrame(self)._repr_html_()  # pyright: ignore[reportCallIssue]
        if table is None:  # HTML has been switched off
            return None
        return effects_html(self, table) or table
