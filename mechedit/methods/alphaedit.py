"""AlphaEdit (Fang et al., 2025): as MEMIT, but within the null space of the old keys."""

from __future__ import annotations

from dataclasses import dataclass

from mechedit.edit import Edit
from mechedit.errors import check_fraction, check_positive
from mechedit.methods.method import EditTask, edit_method, spread_over_layers, targets_for
from mechedit.methods.rules import InNullSpace
from mechedit.methods.settings import SpreadMethodConfig


@dataclass(frozen=True, kw_only=True)
class AlphaEditConfig(SpreadMethodConfig):
    """Settings of AlphaEdit; the defaults are those of the published code for GPT-J, except the threshold."""

    null_threshold: float | int = 0.02
    """Directions belong to the null space up to this fraction of the largest eigenvalue of E[k kᵀ]. (The published
    0.02 is absolute, and so depends on the scale of the keys.)"""
    ridge: float | int = 10.0
    """L2: the weight of ‖ΔW‖², in units of squared keys."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("ridge", self.ridge)
        check_fraction("null_threshold", self.null_threshold, "choose a fraction of the largest eigenvalue")


@edit_method(AlphaEditConfig)
def alphaedit(task: EditTask[AlphaEditConfig]) -> Edit:
    """Write facts without touching the directions that old keys use (AlphaEdit; Fang et al., 2025).

    As `memit`, but with the update

        ΔW = R Kᵀ P (K Kᵀ P + Kₚ Kₚᵀ P + L2·I)⁻¹,

    where P projects onto the directions that old keys hardly use, and Kₚ are the keys of earlier edits. The method is
    meant to be repeated: pass the keys of earlier edits as `previous`.
    """
    targets = targets_for(task)
    rule = InNullSpace(
        moments=task.moments,
        threshold=task.config.null_threshold,
        weight=task.config.ridge,
        previous=task.previous,
    )
    return spread_over_layers(task, targets, rule)
