"""MEMIT (Meng et al., 2023): many facts in one batch, written into a range of MLP layers."""

from __future__ import annotations

from dataclasses import dataclass

from mechedit.edit import Edit
from mechedit.methods.method import EditTask, edit_method, spread_over_layers, targets_for
from mechedit.methods.settings import RidgeConfig


@dataclass(frozen=True, kw_only=True)
class MemitConfig(RidgeConfig):
    """Settings of MEMIT; the defaults are the published code's for GPT-J, but for λ and the learning rate."""


@edit_method(MemitConfig)
def memit(task: EditTask[MemitConfig]) -> Edit:
    """Write many facts at once into a range of MLP layers (MEMIT; Meng et al., 2023).

    Three steps:

    1. z: for each fact, the state at the last layer L that makes the model say the new object (Eq. 16).
    2. For each layer l of the range, ascending, on the model as edited so far: keys k at the subject's last token, the
       mean over prefixes (Eq. 19), and the layer's share of the residual, r = (z − h_L) / (L − l + 1) (Eq. 20).
    3. With keys K and shares R of all facts, the update by least squares over old and new keys (Eq. 14),

           ΔW = R Kᵀ (λ E[k kᵀ] + K Kᵀ)⁻¹.

    Example:
        >>> moments = me.collect_moments(model, texts, layers=[3, 4, 5, 6, 7, 8])
        >>> edit = me.memit(model, requests, layers=[3, 4, 5, 6, 7, 8], moments=moments)
        >>> with me.edited(model, edit):
        ...     scores = me.evaluate(model, requests)
    """
    targets = targets_for(task)
    return spread_over_layers(task, targets, task.config.rule(task.moments, task.previous))
