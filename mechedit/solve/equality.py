"""The updates of ROME and EMMET: the outputs of new keys change exactly, those of old keys as little as that allows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import check_at_least, check_finite
from mechedit.solve.checks import key_columns
from mechedit.solve.factor import TINY, Factor, factorize
from mechedit.solve.products import combination, norm
from mechedit.solve.row_blocks import plus_gram
from mechedit.solve.saddle_point import PrimalDualPair, SaddlePointSystem, SketchedResidual, saddle_point_system
from mechedit.solve.update import Update, rounded_update


def equality_update(
    keys: Float[Tensor, "d_mlp fact"],
    residuals: Float[Tensor, "d_model fact"],
    moment: Float[Tensor, "d_mlp d_mlp"] | Factor,
    *,
    relaxation: float | int = 0.0,
    previous: Float[Tensor, "d_mlp earlier"] | None = None,
) -> Update:
    """Minimize E‖ΔW k‖² over old keys subject to ΔW K = R: ΔW = R (Kᵀ N⁻¹ K + αI)⁻¹ Kᵀ N⁻¹, N = M + K_p K_pᵀ.

    One fact is ROME's Eq. 2 and many are EMMET's closed form (Gupta et al. 2024). α > 0 relaxes
    the constraint: the update is then the ridge's, R Kᵀ (αN + K Kᵀ)⁻¹.

    Args:
        keys: K, one column per fact, linearly independent unless α > 0.
        residuals: R, the change of the output at each key.
        moment: M = E[k kᵀ], symmetric and positive definite, or its factor.
        relaxation: α ≥ 0.
        previous: K_p, keys of earlier edits, each counted as one more old key.

    Returns:
        Factors whose rank is the number of facts. `error` is the larger of ‖N X − K Y‖ / ‖K Y‖ and
        ‖Kᵀ X + αY − I‖ / ‖I‖, where X = N⁻¹ K Y is the left factor and Y = (Kᵀ N⁻¹ K + αI)⁻¹ (each estimated by a
        sketch of 16 rows, where there are more); `condition` is that of Kᵀ N⁻¹ K + αI, ‖A‖₁ exact and ‖A⁻¹‖₁ by
        Hager's estimate. That of M is `Factor.condition`.

    Raises:
        InputError: an input is not finite or of the wrong size; M is not positive definite; the keys are linearly
            dependent (the message names the columns).
    """
    check_at_least("the relaxation of the equality constraint", relaxation, 0)
    check_finite("the relaxation of the equality constraint", relaxation)
    factor = moment if isinstance(moment, Factor) else factorize(moment.to(keys.device))
    columns = key_columns(keys, residuals, previous, factor.matrix)
    facts = keys.shape[1]
    earlier = columns.shape[1] - facts
    if earlier >= len(columns):
        old = columns[:, :earlier]
        factor = factorize(plus_gram(factor.matrix, old), precision=factor.precision)
        columns, earlier = columns[:, earlier:], 0
    ones = torch.ones(columns.shape[1], dtype=columns.dtype, device=columns.device)
    diagonal = torch.cat([ones[:earlier], relaxation * ones[earlier:]])
    system = saddle_point_system(columns, diagonal, factor)
    solution, residual = system.solve(facts)
    error, condition = _error(system, solution, residual, facts), _condition(system, facts)
    return rounded_update(solution.primal, error, condition, keys, residuals)


def _error(system: SaddlePointSystem, solution: PrimalDualPair, residual: SketchedResidual, facts: int) -> float:
    """The larger relative residual of the two equations."""
    right_side = norm(combination(system.columns, solution.dual)).clamp_min(TINY)
    return max(float(residual.primal.norm() / right_side), float(residual.dual.norm()) / facts**0.5)


def _condition(system: SaddlePointSystem, facts: int) -> float:
    """Condition number of the Schur complement on the new keys, whose Cholesky factor is the last block of `schur`."""
    lower = system.schur.lower[-facts:, -facts:]
    return Factor(matrix=lower @ lower.T, lower=lower).condition
