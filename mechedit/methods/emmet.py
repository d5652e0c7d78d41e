"""EMMET (Gupta et al., 2024, "A Unified Framework for Model Editing"): ROME's equality, for many facts at once."""

from __future__ import annotations

from dataclasses import dataclass

from mechedit.edit import Edit
from mechedit.errors import check_at_least
from mechedit.methods.method import EditTask, edit_method, spread_over_layers, targets_for
from mechedit.methods.rules import Equality
from mechedit.methods.settings import DampedConfig, SpreadMethodConfig


@dataclass(frozen=True, kw_only=True)
class EmmetConfig(DampedConfig, SpreadMethodConfig):
    """Settings of EMMET; the defaults are those of the published code for GPT-J, which edits a single layer."""

    slack: float | int = 0.1
    """α, by how much a value may be missed; 0 asks for equality. Facts about one subject have keys so similar that
    equality may need a huge ΔW."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("slack", self.slack, 0, "choose 0 (equality) or more")


@edit_method(EmmetConfig)
def emmet(task: EditTask[EmmetConfig]) -> Edit:
    """Give every new key its value exactly, with the least change on old keys (EMMET; Gupta et al., 2024).

    As `memit`, but the update meets the new facts as a constraint, as ROME's does for one fact, with M = E[k kᵀ]:

        ΔW = R (Kᵀ M⁻¹ K + α I)⁻¹ Kᵀ M⁻¹,

    exactly when the slack α is 0, or as nearly as α > 0 allows.
    """
    targets = targets_for(task)
    rule = Equality(
        moments=task.moments, relaxation=task.config.slack, damping=task.config.damping, previous=task.previous
    )
    return spread_over_layers(task, targets, rule)
