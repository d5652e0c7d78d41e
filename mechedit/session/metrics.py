"""Numbers in the history of a session: scores of its edits, norms of its updates and weights."""

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

ScoredPrompts = Literal["rewrite", "all"]
HISTORY_COLUMNS = ("batch", "requests", "measure", "scope", "layer", "value", "rejected")
SCORE_COLUMNS = ("case", "measure", "value")


class HistoryEntry(NamedTuple):
    """One number in the history: one measure after one batch, or of the unedited model."""

    measure: str
    scope: str
    """`batch`, `earlier` (batches) or `all` (batches so far) for scores and update norms; else `model`."""
    value: float | None
    """None where the model's logits are no longer finite."""
    layer: int | None = None


def score_requests(
    model: Model, requests: Sequence[EditRequest], config: EvaluationConfig, scored_prompts: ScoredPrompts
) -> pd.DataFrame:
    """Evaluate the model as it is now, per request: `SCORE_COLUMNS`, in the papers' units (× 100).

    Args:
        model: model with the edits so far.
        requests: active requests.
        config: how to evaluate.
        scored_prompts: `rewrite` for the prompt of the request alone, `all` for its paraphrases and neighbors too.
    """
    if scored_prompts == "rewrite":
        requests = [replace(request, paraphrases=(), neighbors=(), generations=()) for request in requests]
    table = evaluate(model, requests, config).table
    table = table.assign(value=table["value"] * PERCENT)
    return table.groupby(["case", "measure"], sort=False, as_index=False).agg({"value": "mean"})


def mean_scores(scores: pd.DataFrame, batch: Collection[str]) -> list[HistoryEntry]:
    """Mean of each measure over the requests of this batch, over those of earlier ones, and over all.

    Args:
        scores: what `score_requests` returned.
        batch: ids of the requests of this batch.
    """
    in_batch = scores["case"].isin(list(batch))
    scopes = {"batch": scores[in_batch], "earlier": scores[~in_batch], "all": scores}
    return [
        HistoryEntry(str(measure), scope, float(values.mean()))
        for scope, rows in scopes.items()
        for measure, values in rows.groupby("measure", sort=False)["value"]
    ]


def weight_norms(model: Model, layers: Iterable[int]) -> list[HistoryEntry]:
    """‖W‖ (Frobenius) of each layer's down-projection."""
    norms = {layer: float(model.projection(layer).detach().double().norm()) for layer in layers}
    return [HistoryEntry("weight_norm", "model", norm, layer) for layer, norm in norms.items()]


def update_norms(edit: Edit, scope: str) -> list[HistoryEntry]:
    """‖ΔW‖ (Frobenius) of each layer."""
    summary = summarize(edit)
    return [
        HistoryEntry("update_norm", scope, norm, layer)
        for layer, norm in zip(summary["layer"].tolist(), summary["norm"].tolist(), strict=True)
    ]


def finite_or_none(value: float) -> float | None:
    """The value, or None in place of infinity and NaN."""
    return value if math.isfinite(value) else None


def history_frame(
    number: int, requests: int, entries: Sequence[HistoryEntry], *, rejected: bool = False
) -> pd.DataFrame:
    """The entries of one batch as rows of a session's history.

    Args:
        number: the batch's number; 0 for the unedited model.
        requests: number of active requests.
        entries: numbers measured after the batch.
        rejected: whether the batch was taken back.
    """
    rows = [(number, requests, entry.measure, entry.scope, entry.layer, entry.value, rejected) for entry in entries]
    frame = pd.DataFrame(rows, columns=list(HISTORY_COLUMNS))
    return frame.astype({"layer": "Int64", "value": "float64"})
