"""Columns of effects, and the present spelling of what stands in them."""

from __future__ import annotations

import pandas as pd

from mechedit.trace.metrics import metric_name

COLUMNS = (
    "fact", "kind", "window", "sever", "layer", "position", "token", "role",
    "metric", "score", "corrupted", "clean", "effect", "samples",
)  # fmt: skip
"""Columns of effects: one row per restored cell and metric, `effect = score − corrupted`."""


def with_present_metric_names(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with their metrics in the present spelling; earlier versions wrote `normalised_probability`."""
    present = {name: metric_name(str(name)) for name in frame["metric"].unique()}
    if all(name == spelling for name, spelling in present.items()):
        return frame
    return frame.assign(metric=frame["metric"].replace(present))
