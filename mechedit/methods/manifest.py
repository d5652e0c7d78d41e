"""The manifest of an edit: the model and facts it was made for, and how much of each residual was written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mechedit.data import EditRequest
from mechedit.provenance import VERSION
from mechedit.solve import Update
from mechedit.targets import Targets


def edit_manifest(
    provenance: Mapping[str, Any],
    layers: Sequence[int],
    requests: Sequence[EditRequest],
    targets: Targets | None,
    prefixes: Sequence[str],
) -> dict[str, Any]:
    """The fields that every method writes: version, layers, unedited model, requests, prefixes and target search.

    Args:
        provenance: of the unedited model.
        layers: those that are written to.
        requests: their ids and their facts in words are recorded.
        targets: whose provenance is recorded; None when the method searches for no z.
        prefixes: over which keys are averaged, or with which prompts are trained.
    """
    search = {} if targets is None else {"targets": dict(targets.provenance)}
    return {
        "mechedit": VERSION,
        "layers": list(layers),
        "model": dict(provenance),
        "requests": [request.id for request in requests],
        "facts": [f"{request.text} → {request.target_new}" for request in requests],
        "prefixes": list(prefixes),
        **search,
    }


def search_record(*targets: Targets) -> dict[str, list[Any]]:
    """The fields on how the search ended.

    `unconverged` holds the ids of requests whose object is not the likeliest answer with z written; `probability`
    P(object) there for each request, the mean over prefixes, and None where that is not finite.

    Args:
        targets: of all requests, in order.
    """
    probability = [value for part in targets for value in part.summary["probability"].tolist()]
    return {
        "unconverged": [name for part in targets for name in part.unconverged],
        "probability": [value if math.isfinite(value) else None for value in probability],
    }


def layer_record(layer: int, updates: Sequence[Update], **residuals: float) -> dict[str, Any]:
    """One layer's entry under `residuals`: relative residuals, and the worst error and condition of its systems."""
    worst = {name: max(getattr(update, name) for update in updates) for name in ("error", "condition")}
    return {"layer": layer, **residuals, **worst}


def relative_residuals(residual: Float[Tensor, "fact d_model"], start: Float[Tensor, "fact d_model"]) -> list[float]:
    """‖residual‖ of each request relative to its start."""
    return [relative_norm(now, before) for now, before in zip(residual, start, strict=True)]


def relative_norm(residual: Tensor, start: Tensor) -> float:
    """‖residual‖ / ‖start‖; 0 when the start is zero."""
    size = float(start.norm())
    return float(residual.norm()) / size if size else 0.0
