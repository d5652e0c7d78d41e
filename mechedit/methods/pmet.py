"""PMET (Li et al., 2024, "Precise Model Editing in a Transformer"): as MEMIT, but z is what the MLP itself adds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mechedit.edit import Edit
from mechedit.methods.method import EditTask, edit_method, spread_over_layers, targets_for
from mechedit.methods.settings import RidgeConfig, Strategy


@dataclass(frozen=True, kw_only=True)
class PmetConfig(RidgeConfig):
    """Settings of PMET; the defaults are the published code's for GPT-J, but for λ and the learning rate."""

    steps: int = 30
    """Most steps of the search for z."""
    relative_lr: float | int = 0.2
    """Adam's learning rate in units of the typical |hᵢ|, where h is the MLP's output; not used where `lr` is set."""
    kl_weight: float | int = 1.0
    """Weight of the KL term, which keeps the subject's other meaning."""
    strategy: Strategy = "sqrt"
    """How the residual is spread over the layers (`uniform`, `sqrt`, `forward-replay`, `last` or `boundary`); PMET
    gives layer l 1/√(L − l + 1) of it."""

    published_lr: ClassVar[float] = 0.2
    published_covariance_weight: ClassVar[float] = 6_000.0
    search: ClassVar[dict[str, Any]] = {"part": "mlp_out", "attention": True}


@edit_method(PmetConfig)
def pmet(task: EditTask[PmetConfig]) -> Edit:
    """Write into the MLP only what the MLP itself should add (PMET; Li et al., 2024).

    As `memit`, but z is the MLP's output and not the residual stream, so that ΔW need not also do what attention did
    to reach it: the search moves attention's output as well, and discards that part. Layer l is given 1/√(L − l + 1)
    of the residual.
    """
    targets = targets_for(task)
    return spread_over_layers(task, targets, task.config.rule(task.moments, task.previous))
