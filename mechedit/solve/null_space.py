"""AlphaEdit's update: it acts on the directions that old keys hardly use, and leaves all others alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import InputError, check_finite, check_positive
from mechedit.solve.checks import key_columns, symmetrized
from mechedit.solve.ridge import solve_sum
from mechedit.solve.saddle_point import saddle_point_system
from mechedit.solve.update import Update, rounded_update
from mechedit.split_tensors import whole


@dataclass(frozen=True, kw_only=True, eq=False)
class NullSpace:
    """The eigenvectors of M = E[k kᵀ] with the smallest eigenvalues."""

    basis: Float[Tensor, "d_mlp dimension"]
    """Orthonormal columns, by ascending eigenvalue, float64."""
    threshold: float
    """Largest eigenvalue of the space, as a fraction of the largest of M."""
    largest: float
    """The largest eigenvalue of M."""
    leak: float
    """The largest eigenvalue in the space: no unit vector of the space has a mean squared old key above it."""

    @property
    def dimension(self) -> int:
        """Dimension of the space."""
        return self.basis.shape[1]

    @property
    def projection(self) -> Float[Tensor, "d_mlp d_mlp"]:
        """P, the orthogonal projection onto the space."""
        return self.basis @ self.basis.T


def null_space(moment: Float[Tensor, "d_mlp d_mlp"], threshold: float | int) -> NullSpace:
    """The approximate null space of M: eigenvectors whose eigenvalues are at most threshold · the largest.

    AlphaEdit (Fang et al. 2024, §3.2) with a relative threshold, so that the scale of the keys does not matter. An M
    that is split over processes is gathered in each.

    Raises:
        InputError: a threshold outside (0, 1); M is not finite, not symmetric or zero, or has negative eigenvalues;
            no eigenvalue is small enough.
    """
    check_positive("the threshold of the null space", threshold, "choose a fraction of the largest eigenvalue")
    values, vectors = torch.linalg.eigh(symmetrized(whole(moment), "the second moment"))
    largest, smallest = float(values[-1]), float(values[0])
    if largest <= 0 or smallest < -1e-6 * largest:
        raise InputError(
            f"the second moment has eigenvalues from {smallest:.3g} to {largest:.3g}, expected none below zero and "
            f"some above; check what was passed"
        )
    dimension = int((values <= threshold * largest).sum())
    if not 0 < dimension < len(values):
        raise InputError(
            f"the null space has {dimension} of {len(values)} dimensions at a threshold of {threshold:g} (eigenvalues "
            f"are {max(smallest, 0) / largest:.3g} to 1 of the largest), expected some but not all; choose a threshold "
            f"between these, below 1"
        )
    return NullSpace(
        basis=vectors[:, :dimension], threshold=threshold, largest=largest, leak=max(float(values[dimension - 1]), 0)
    )


def null_space_update(
    keys: Float[Tensor, "d_mlp fact"],
    residuals: Float[Tensor, "d_model fact"],
    space: NullSpace,
    *,
    weight: float | int = 1.0,
    previous: Float[Tensor, "d_mlp earlier"] | None = None,
) -> Update:
    """Solve AlphaEdit's Eq. 14, ΔW = R Kᵀ P (K Kᵀ P + K_p K_pᵀ P + wI)⁻¹.

    With P = B Bᵀ and U = Bᵀ K that is ΔW = R Uᵀ (U Uᵀ + U_p U_pᵀ + wI)⁻¹ Bᵀ, a ridge in the coordinates of the space;
    with fewer columns than `space.dimension` it is solved in the space of the columns (Woodbury).

    Args:
        keys: K, one column per fact.
        residuals: R, the requested change of the output at each key.
        space: the directions on which ΔW may act.
        weight: w > 0, the weight of ‖ΔW‖² beside the squared errors at new and earlier keys.
        previous: K_p, keys of earlier edits, whose outputs are to stay.

    Returns:
        Factors of rank at most the number of facts. `error` is ‖(S + wI) X − U‖ / ‖U‖ with S = U Uᵀ + U_p U_pᵀ (by
        Woodbury: estimated by a sketch of 16 rows, where there are more); `condition` is that of
        S + wI, where ‖A⁻¹‖₁ is Hager's estimate (by Woodbury: 1 + ‖S‖₁/w, a bound but for the step from 2-norms to
        1-norms).

    Raises:
        InputError: an input is not finite or of the wrong size; the weight is not above zero.
    """
    check_positive("the weight of the null-space update", weight)
    check_finite("the weight of the null-space update", weight)
    basis, facts = space.basis, keys.shape[1]
    coordinates = (key_columns(keys, residuals, previous, basis).T @ basis).T
    if coordinates.shape[1] < space.dimension:
        system = saddle_point_system(coordinates, coordinates.new_full((coordinates.shape[1],), weight), None)
        pair, residual = system.solve(facts)
        solution = pair.primal
        error, condition = system.ridge_error(residual, weight), system.ridge_condition(weight)
    else:
        ridge = weight * torch.eye(space.dimension, dtype=basis.dtype, device=basis.device)
        solution, error, condition = solve_sum(ridge, coordinates, facts)
    return rounded_update(basis @ solution, error, condition, keys, residuals)
