"""Update rules of the methods: each turns a layer's keys and the changes wanted at them into ΔW.

What a rule preserves is the second moments E[k kᵀ] of old keys by layer, and the keys of earlier edits
([d_mlp, earlier facts] by layer) if it is given any. Where a model is split over processes, all of these come split in
rows (`mechedit.split_tensors`): `Ridge` leaves them so, and the other two gather the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.moments import SecondMoment
from mechedit.solve import (
    Factor,
    Update,
    damped,
    equality_update,
    factorize,
    null_space,
    null_space_update,
    ridge_update,
)
from mechedit.solve.checks import to_float64
from mechedit.solve.products import column_products
from mechedit.split_tensors import row_wise, split_like, whole

Moments = Mapping[int, SecondMoment | Tensor]
"""E[k kᵀ] by layer, as collected or as a bare matrix [d_mlp, d_mlp]."""
EarlierKeys = Mapping[int, Tensor]
"""Keys of earlier edits by layer, [d_mlp, earlier facts]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ridge:
    """Least squares over old and new keys (MEMIT Eq. 14): ΔW = R Kᵀ (λ E[k kᵀ] + K Kᵀ)⁻¹."""

    moments: Moments
    damping: float | int = 0.0
    """δ: E[k kᵀ] + δ · (tr E[k kᵀ] / d_mlp) · I stands in place of E[k kᵀ]."""
    weight: float | int
    """λ: how much the old keys count, in units of one new fact; or c, in units of `key_strength`."""
    relative: bool = False
    """Whether the weight is c, so that λ = c · `key_strength` of the new keys at each layer."""
    previous: EarlierKeys = field(default_factory=dict)

    def update(self, layer: int, keys: Float[Tensor, "d_mlp fact"], residuals: Float[Tensor, "d_model fact"]) -> Update:
        """See `ridge_update`."""
        moment, earlier = damped_moment(self.moments[layer], self.damping), self.previous.get(layer)
        columns = keys.shape[1] + (0 if earlier is None else earlier.shape[1])
        # A factor that is kept with the moment saves the cubic work; with as many facts as keys are wide it does not.
        use_factor = self.relative or (isinstance(moment, SecondMoment) and columns < len(keys))
        factor_or_matrix = moment_factor(moment, keys.device) if use_factor else moment_matrix(moment)
        weight = self.weight
        if isinstance(factor_or_matrix, Factor) and self.relative:
            weight = weight * key_strength(keys, factor_or_matrix)
        return ridge_update(keys, residuals, factor_or_matrix, weight, previous=earlier)


@dataclass(frozen=True, kw_only=True, eq=False)
class Equality:
    """The least change on old keys that gives new keys their values (ROME Eq. 2, EMMET).

    ΔW = R (Kᵀ M⁻¹ K + α I)⁻¹ Kᵀ M⁻¹ with M = E[k kᵀ].

    Facts with the same key (one subject after one text) cannot have different values: they get the mean.
    """

    moments: Moments
    relaxation: float | int = 0.0
    """α: how far a value may be missed, in units of the old keys' mean; 0 asks for equality."""
    damping: float | int = 0.0
    """δ: M + δ · (tr M / d_mlp) · I stands in place of M."""
    previous: EarlierKeys = field(default_factory=dict)

    def update(self, layer: int, keys: Float[Tensor, "d_mlp fact"], residuals: Float[Tensor, "d_model fact"]) -> Update:
        """See `equality_update`; the rank is at most the number of different keys. Keys that are split are gathered."""
        keys = whole(keys)
        unique, index = torch.unique(keys, dim=1, return_inverse=True)
        counts = torch.bincount(index, minlength=unique.shape[1])
        sums = residuals.new_zeros(len(residuals), unique.shape[1]).index_add_(1, index, residuals)
        moment, earlier = damped_moment(self.moments[layer], self.damping), self.previous.get(layer)
        factor = moment_factor(moment, keys.device)
        return equality_update(unique, sums / counts, factor, relaxation=self.relaxation, previous=earlier)


@dataclass(frozen=True, kw_only=True, eq=False)
class InNullSpace:
    """Least squares over new keys within the null space of old ones (AlphaEdit): ΔW = ΔW P, P projecting onto it."""

    moments: Moments
    threshold: float | int
    """Eigenvalues of E[k kᵀ] up to this fraction of the largest belong to the null space."""
    weight: float | int
    """L2: the weight of ‖ΔW‖²."""
    previous: EarlierKeys = field(default_factory=dict)

    def update(self, layer: int, keys: Float[Tensor, "d_mlp fact"], residuals: Float[Tensor, "d_model fact"]) -> Update:
        """See `null_space_update`; keys that are split are gathered, as eigenvectors are whole."""
        keys = whole(keys)
        moment, earlier = self.moments[layer], self.previous.get(layer)
        if isinstance(moment, SecondMoment):
            space = moment.null_space(self.threshold)
        else:
            space = null_space(moment_matrix(moment).to(keys.device), self.threshold)
        return null_space_update(keys, residuals, space, weight=self.weight, previous=earlier)


def key_strength(keys: Float[Tensor, "d_mlp fact"], factor: Factor) -> float:
    """The median over facts of kᵀM⁻¹k, with M = E[k kᵀ]: the λ at which half of a typical fact would be written.

    Alone, or with keys orthogonal in M⁻¹, a fact is written to kᵀM⁻¹k / (λ + kᵀM⁻¹k) by `Ridge`. The strength has the
    mean d_mlp for keys drawn like the text's, and does not change when all keys are multiplied by a number.
    """
    columns = split_like(row_wise(to_float64, keys).to(factor.matrix.device), factor.matrix)
    return float(column_products(columns, factor.solve(columns)).median())


def damped_moment(moment: SecondMoment | Tensor, damping: float | int) -> SecondMoment | Tensor:
    """E[k kᵀ] + δ · (tr E[k kᵀ] / d_mlp) · I; the moment itself where δ is 0."""
    return moment.damped(damping) if isinstance(moment, SecondMoment) else damped(moment_matrix(moment), damping)


def moment_matrix(moment: SecondMoment | Tensor) -> Float[Tensor, "d_mlp d_mlp"]:
    """E[k kᵀ] as a matrix."""
    matrix = moment.matrix if isinstance(moment, SecondMoment) else moment
    return matrix if isinstance(matrix, Tensor) else torch.as_tensor(matrix, device="cpu")


def moment_factor(moment: SecondMoment | Tensor, device: torch.device) -> Factor:
    """The Cholesky factor of E[k kᵀ]: the one stored with a collected moment, else computed now.

    Raises:
        InputError: the moment is singular.
    """
    return moment.factor if isinstance(moment, SecondMoment) else factorize(moment_matrix(moment).to(device))
