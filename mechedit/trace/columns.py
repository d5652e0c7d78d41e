"""Columns of effects, and the present spelling of what stands in them."""

from __future__ import annotations

import pandas as pd

from mechedit.trace.metrics import metric_name

COLUMNS = (
    "fact", "kind", "window", "sever", "layer", "position", "token", "role",
    "metric", "score", "corrupted", "clean", "effect", "samples",
)  # fmt: skip
"""Columns of effects: one row per restored cell and metric, `effect = score − corrupted`."""

APPROXIMATE_COLUMNS = ("estimate", "exact", "drawn", "chance")
"""Columns that effects of an approximate trace have besides:

- `estimate`: the effect as estimated from the gradient;
- `exact`: whether `effect` was traced; else it is the estimate;
- `drawn`: whether the cell is one of those drawn to hold estimates against exact effects;
- `chance`: the probability with which the cell was traced, from which averages are corrected; NaN where they are not.
"""


def with_present_metric_names(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with their metrics in the present spelling; earlier versions wrote `normalised_probability`."""
    present = {name: metric_name(str(name)) for name in frame["metric"].unique()}
    if all(name == spelling for name, spelling in present.items()):
        return frame
    return frame.assign(metric=frame["metric"].replace(present))
