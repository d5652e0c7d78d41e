"""The update rules of the methods: each turns a layer's keys and wanted changes into ΔW, with what it preserves.

All of them hold the moments E[k kᵀ] by layer, and may hold the keys of earlier edits ([d_mlp, earlier] by layer), which
are then preserved too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.moments import SecondMoment
from mechedit.solve import Factor, Update, equality_update, factorize, null_space, null_space_update, ridge_update

Moments = Mapping[int, SecondMoment | Tensor]
Previous = Mapping[int, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Ridge:
    """Least squares over old and new keys (MEMIT Eq. 14): ΔW = R Kᵀ (λ E[k kᵀ] + K Kᵀ)⁻¹."""

    moments: Moments
    weight: float | int
    """λ."""
    previous: Previous = field(default_factory=dict)

    def update(self, layer: int, keys: Float[Tensor, "d_mlp fact"], residuals: Float[Tensor, "d_model fact"]) -> Update:
        """See `ridge_update`."""
        moment, earlier = self.moments[layer], self.previous.get(layer)
        columns = keys.shape[1] + (0 if earlier is None else earlier.shape[1])
        # A factor that is kept with the moment saves the cubic work; with as many facts as keys are wide it does not.
        known = isinstance(moment, SecondMoment) and columns < len(keys)
        given = factor_of(moment, keys.device) if known else matrix_of(moment)
        return ridge_update(keys, residuals, given, self.weight, previous=earlier)


@dataclass(frozen=True, kw_only=True, eq=False)
class Equality:
    """The least change on old keys that gives the new ones their values (ROME Eq. 2, EMMET).

    Facts with one and the same key (one subject after one text) cannot have different values: they get the mean.
    """

    moments: Moments
    slack: float | int = 0.0
    """α: how far a value may be missed, in units of the old keys' mean; 0 asks for equality."""
    previous: Previous = field(default_factory=dict)

    def update(self, layer: int, keys: Float[Tensor, "d_mlp fact"], residuals: Float[Tensor, "d_model fact"]) -> Update:
        """See `equality_update`; of rank at most the number of different keys."""
        single, owner = torch.unique(keys, dim=1, return_inverse=True)
        counts = torch.bincount(owner, minlength=single.shape[1])
        summed = residuals.new_zeros(len(residuals), single.shape[1]).index_add_(1, owner, residuals)
        factor, earlier = factor_of(self.moments[layer], keys.device), self.previous.get(layer)
        return equality_update(single, summed / counts, factor, relaxation=self.slack, previous=earlier)


@dataclass(frozen=True, kw_only=True, eq=False)
class InNullSpace:
    """Least squares over the new keys, within what old keys hardly use (AlphaEdit): ΔW = ΔW P."""

    moments: Moments
    threshold: float | int
    """Eigenvalues of E[k kᵀ] up to this share of the largest belong to the null space."""
    weight: float | int
    """Of ‖ΔW‖²."""
    previous: Previous = field(default_factory=dict)

    def update(self, layer: int, keys: Float[Tensor, "d_mlp fact"], residuals: Float[Tensor, "d_model fact"]) -> Update:
        """See `null_space_update`."""
        moment, earlier = self.moments[layer], self.previous.get(layer)
        if isinstance(moment, SecondMoment):
            space = moment.null_space(self.threshold)
        else:
            space = null_space(torch.as_tensor(moment).to(keys.device), self.threshold)
        return null_space_update(keys, residuals, space, weight=self.weight, previous=earlier)


def matrix_of(moment: SecondMoment | Tensor) -> Float[Tensor, "d_mlp d_mlp"]:
    """E[k kᵀ]."""
    return moment.matrix if isinstance(moment, SecondMoment) else torch.as_tensor(moment)


def factor_of(moment: SecondMoment | Tensor, device: torch.device) -> Factor:
    """The Cholesky factor of E[k kᵀ]: the one kept with a collected moment, else made now.

    Raises:
        InputError: the moment is singular.
    """
    return moment.factor if isinstance(moment, SecondMoment) else factorize(torch.as_tensor(moment).to(device))
