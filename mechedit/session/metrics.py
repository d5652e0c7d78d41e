"""What is watched while a model is edited batch after batch: its edits, its text, its weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import pandas as pd

from mechedit.data import EditRequest
from mechedit.edit import Edit, summarize
from mechedit.evaluation import PERCENT, EvaluationConfig, evaluate
from mechedit.models import Model

Judged = Literal["rewrite", "all"]
HISTORY_COLUMNS = ("batch", "requests", "measure", "scope", "layer", "value", "refused")
SCORE_COLUMNS = ("case", "measure", "value")


class Measure(NamedTuple):
    """One number of one moment in a session."""

    measure: str
    scope: str
    """`batch`, `earlier` (batches) or `all` of them so far, whose edits are judged or added up; else `model`."""
    value: float | None
    """None where the model's logits are no longer finite."""
    layer: int | None = None


def judge(model: Model, requests: Sequence[EditRequest], config: EvaluationConfig, judged: Judged) -> pd.DataFrame:
    """`evaluate` of the model as it is now, by request: `SCORE_COLUMNS`, in the papers' units (× 100).

    Args:
        model: edited so far.
        requests: those in force.
        config: how to measure.
        judged: by all prompts of a request, or by the rewritten one alone.
    """
    if judged == "rewrite":
        requests = [replace(request, paraphrases=(), neighbors=(), generations=()) for request in requests]
    table = evaluate(model, requests, config).table
    table = table.assign(value=table["value"] * PERCENT)
    return table.groupby(["case", "measure"], sort=False, as_index=False).agg({"value": "mean"})


def means(scores: pd.DataFrame, batch: Collection[str]) -> list[Measure]:
    """Each measure's mean over the requests of this batch, over the earlier ones, and over all."""
    new = scores["case"].isin(list(batch))
    scopes = {"batch": scores[new], "earlier": scores[~new], "all": scores}
    return [
        Measure(str(measure), scope, float(values.mean()))
        for scope, rows in scopes.items()
        for measure, values in rows.groupby("measure", sort=False)["value"]
    ]


def weight_norms(model: Model, layers: Iterable[int]) -> list[Measure]:
    """‖W‖ (Frobenius) of each layer's down-projection."""
    norms = {layer: float(model.projection(layer).detach().double().norm()) for layer in layers}
    return [Measure("weight_norm", "model", norm, layer) for layer, norm in norms.items()]


def update_norms(edit: Edit, scope: str) -> list[Measure]:
    """‖ΔW‖ (Frobenius) of each layer."""
    found = summarize(edit)
    return [
        Measure("update_norm", scope, norm, layer)
        for layer, norm in zip(found["layer"].tolist(), found["norm"].tolist(), strict=True)
    ]


def finite(value: float) -> float | None:
    """The value, or None in place of infinity and NaN."""
    return value if math.isfinite(value) else None


def frame(number: int, requests: int, measures: Sequence[Measure], *, refused: bool = False) -> pd.DataFrame:
    """The measures of one moment as rows of a session's history."""
    rows = [(number, requests, one.measure, one.scope, one.layer, one.value, refused) for one in measures]
    found = pd.DataFrame(rows, columns=list(HISTORY_COLUMNS))
    return found.astype({"layer": "Int64", "value": "float64"})
