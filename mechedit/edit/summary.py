"""A table of what an edit does to each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mechedit.arguments import checked
from mechedit.edit.apply_undo import check_model
from mechedit.edit.combine import update_norm
from mechedit.edit.edit import Edit
from mechedit.models import Model

COLUMNS = ("layer", "rank", "norm", "relative", "left", "error", "condition", "truncation")


@checked
def summarize(edit: Edit, model: Model | None = None) -> pd.DataFrame:
    """One row per layer; unknown values are NaN.

    Columns: `layer`; `rank` (columns of the factors); `norm` = ‖ΔW‖ (Frobenius); `relative` = ‖ΔW‖ / ‖W‖, given the
    model; `left` (‖Z − H‖ after the layer was written, relative to the start); `error` and `condition` of the layer's
    linear system; `truncation` = ‖ΔW − ΔW'‖ / ‖ΔW‖ where the edit was truncated.

    Raises:
        InputError: the edit was made for other weights than the model's.
    """
    if model is not None:
        check_model(model, edit)
    residuals, truncated = (_by_layer(edit.manifest.get(name)) for name in ("residuals", "truncated"))
    rows = []
    for layer in edit.layers:
        norm = update_norm(edit.factors[layer])
        record = residuals.get(layer, {})
        rows.append(
            {
                "layer": layer,
                "rank": edit.factors[layer].rank,
                "norm": norm,
                "relative": None if model is None else norm / float(model.projection(layer).double().norm()),
                "left": record.get("after"),
                "error": record.get("error"),
                "condition": record.get("condition"),
                "truncation": truncated.get(layer, {}).get("error"),
            }
        )
    dtypes = {name: "int64" if name in ("layer", "rank") else "float64" for name in COLUMNS}
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(dtypes)


def _by_layer(records: Any) -> dict[int, Mapping[str, Any]]:
    """The manifest's records by layer."""
    return {record["layer"]: record for record in records or () if "layer" in record}
