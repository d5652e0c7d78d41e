"""Whether an edit is plausible: updates smaller than their weights, sound systems, and residuals that were reached."""

from __future__ import annotations

import statistics

import torch

from mechedit.edit import Edit
from mechedit.edit.combine import update_norm
from mechedit.methods.settings import DampedConfig, MethodConfig
from mechedit.models import Model
from mechedit.solve.products import norm

MOST_CONDITION = 1e12
"""Condition number of a layer's linear system above which at most four of float64's sixteen digits are left."""
MOST_LEFT = 0.5
"""Part of the residuals, in the median over facts, of which no more may be left unwritten."""
WARNINGS = "warnings"
"""Field of the manifest that holds the warnings, absent where there are none."""


def edit_warnings(edit: Edit, model: Model, config: MethodConfig) -> list[str]:
    """What is implausible about an edit, with numbers, and what to do: a line each for size, condition and reach.

    Args:
        edit: just made; its manifest's `residuals` has the condition number of each layer's system.
        model: as it was before the edit.
        config: settings of the method, which decide what helps.
    """
    remedy = _remedy(config)
    larger, singular = _larger_updates(edit, model), _singular_systems(edit)
    warnings = []
    if larger:
        warnings.append(
            f"the update is larger than the weights it is added to ({'; '.join(larger)}), which changes most of "
            f"what the model says; {remedy}"
        )
    if singular:
        warnings.append(
            f"the linear system is nearly singular ({'; '.join(singular)}; above {MOST_CONDITION:.0e} its solution is "
            f"largely rounding); {remedy}"
        )
    return [*warnings, *_unreached(edit)]


def _larger_updates(edit: Edit, model: Model) -> list[str]:
    """A phrase for each layer with ‖ΔW‖ > ‖W‖ (Frobenius)."""
    phrases = []
    for layer in edit.layers:
        update = _update_norm(edit, layer, model)
        weight = float(torch.linalg.vector_norm(model.projection(layer), dtype=torch.float64))
        if not update <= weight:
            phrases.append(f"layer {layer}: ‖ΔW‖ = {update:.3g}, ‖W‖ = {weight:.3g}")
    return phrases


def _update_norm(edit: Edit, layer: int, model: Model) -> float:
    """‖ΔW‖; where the weights are split over processes, each computes its rows of ΔW and no more."""
    return update_norm(edit.factors[layer]) if model.mesh is None else float(norm(edit.delta(layer, model.mesh)))


def _singular_systems(edit: Edit) -> list[str]:
    """A phrase for each layer whose system has a condition number above `MOST_CONDITION`."""
    records = [record for record in edit.manifest.get("residuals", ()) if "condition" in record]
    return [
        f"layer {record['layer']}: condition about {record['condition']:.1e}"
        for record in records
        if not record["condition"] <= MOST_CONDITION
    ]


def _unreached(edit: Edit) -> list[str]:
    """A line where more than `MOST_LEFT` of the residuals is left, with what is left after each layer."""
    left = statistics.median(edit.manifest.get("left") or [0.0])
    if left <= MOST_LEFT:
        return []
    layers = ", ".join(f"{record['layer']}: {record['after']:.0%}" for record in edit.manifest["residuals"])
    return [
        f"of half of the facts {left:.0%} or more of the residual is not written (left after each layer: {layers}), so "
        f"that the model may not say what was asked for; give old keys less weight, or edit other layers"
    ]


def _remedy(config: MethodConfig) -> str:
    if not config.preserves_keys:
        return config.milder
    damping = (
        ""
        if not isinstance(config, DampedConfig)
        else ("set damping (such as 1e-4), " if not config.damping else f"raise damping (now {config.damping:g}), ")
    )
    return f"collect moments over more and more varied text, {damping}or edit other layers"
