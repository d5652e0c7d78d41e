"""PMET (Li et al., 2024, "Precise Model Editing in a Transformer"): as MEMIT, but z is what the MLP itself adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mechedit.edit import Edit
from mechedit.errors import check_positive
from mechedit.methods.method import EditTask, edit_method, spread_over_layers, targets_for
from mechedit.methods.rules import Ridge
from mechedit.methods.settings import SpreadMethodConfig, Strategy


@dataclass(frozen=True, kw_only=True)
class PmetConfig(SpreadMethodConfig):
    """Settings of PMET; the defaults are those of the published code for GPT-J."""

    steps: int = 30
    """Most steps of the search for z."""
    lr: float | int = 0.2
    """Learning rate of Adam, in units of the MLP's output."""
    kl_weight: float | int = 1.0
    """Weight of the KL term, which keeps the subject's other meaning."""
    covariance_weight: float | int = 6_000.0
    """λ: how much the old keys count, in units of one new fact."""
    strategy: Strategy = "sqrt"
    """How the residual is spread over the layers (`uniform`, `sqrt`, `forward-replay` or `last`); PMET gives layer l
    1/√(L − l + 1) of it."""

    search: ClassVar[dict[str, Any]] = {"part": "mlp_out", "attention": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("covariance_weight", self.covariance_weight)


@edit_method(PmetConfig)
def pmet(task: EditTask[PmetConfig]) -> Edit:
    """Write into the MLP only what the MLP itself should add (PMET; Li et al., 2024).

    As `memit`, but z is the MLP's output and not the residual stream, so that ΔW need not also do what attention did
    to reach it: the search moves attention's output as well, and discards that part. Layer l is given 1/√(L − l + 1)
    of the residual.
    """
    targets = targets_for(task)
    rule = Ridge(moments=task.moments, weight=task.config.covariance_weight, previous=task.previous)
    return spread_over_layers(task, targets, rule)
