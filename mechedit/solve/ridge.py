"""MEMIT's update: a least-squares compromise between new and old keys, by a weight."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import check_at_least, check_finite
from mechedit.solve.checks import key_columns, symmetrized
from mechedit.solve.factor import TINY, Factor, Precision, factorize_symmetric
from mechedit.solve.products import norm, product
from mechedit.solve.row_blocks import plus_gram
from mechedit.solve.saddle_point import saddle_point_system
from mechedit.solve.update import Update, rounded_update


def ridge_update(
    keys: Float[Tensor, "d_mlp fact"],
    residuals: Float[Tensor, "d_model fact"],
    moment: Float[Tensor, "d_mlp d_mlp"] | Factor,
    weight: float | int = 1.0,
    *,
    previous: Float[Tensor, "d_mlp earlier"] | None = None,
) -> Update:
    """Solve MEMIT's Eq. 14, ΔW = R Kᵀ (λM + K_p K_pᵀ + K Kᵀ)⁻¹.

    It minimizes λ·E‖ΔW k‖² over old keys + ‖ΔW K_p‖² + ‖ΔW K − R‖² (MEMIT Eq. 9). Given a `Factor` and fewer columns
    in K_p and K than d_mlp, it is solved in their space (Woodbury, refined to rounding); else by Cholesky of the sum.

    Args:
        keys: K, one column per fact.
        residuals: R, the requested change of the output at each key.
        moment: M = E[k kᵀ], symmetric and positive semi-definite, or its factor. Where it is split in rows over
            processes, so is all of the system with d_mlp rows; K and K_p may be split or whole.
        weight: λ ≥ 0, the weight of the old keys in units of one new fact.
        previous: K_p, keys of earlier edits, whose outputs are to stay.

    Returns:
        Factors of rank at most the number of facts; the left one is split as K is. `error` is
        ‖(λM + K_p K_pᵀ + K Kᵀ) X − K‖ / ‖K‖ (from a `Factor`: estimated by a sketch of 16 rows, where there are more);
        `condition` is that of the sum, ‖A‖₁‖A⁻¹‖₁ with Hager's estimate of the latter (from a `Factor`:
        (λ‖M‖₁ + ‖C Cᵀ‖₁)‖M⁻¹‖₁/λ with C = [K_p, K], which ignores that new keys lift the smallest eigenvalues of λM
        and is then too high).

    Raises:
        InputError: an input is not finite or of the wrong size; M is not symmetric; the sum is too singular.
    """
    check_at_least("the weight of the second moment", weight, 0)
    check_finite("the weight of the second moment", weight)
    if not isinstance(moment, Factor):
        moment = symmetrized(moment.to(keys.device), "the second moment")
    matrix = moment.matrix if isinstance(moment, Factor) else moment
    columns = key_columns(keys, residuals, previous, matrix)
    facts = keys.shape[1]
    if isinstance(moment, Factor) and weight > 0 and columns.shape[1] < len(columns):
        relaxation = torch.full((columns.shape[1],), weight, dtype=columns.dtype, device=columns.device)
        system = saddle_point_system(columns, relaxation, moment)
        solution, residual = system.solve(facts)
        error, condition = system.ridge_error(residual, weight), system.ridge_condition(weight)
        return rounded_update(solution.primal, error, condition, keys, residuals)
    precision = moment.precision if isinstance(moment, Factor) else "float64"
    return rounded_update(*solve_sum(weight * matrix, columns, facts, precision), keys, residuals)


def solve_sum(
    matrix: Float[Tensor, "d d"], columns: Float[Tensor, "d column"], facts: int, precision: Precision = "float64"
) -> tuple[Float[Tensor, "d fact"], float, float]:
    """X = (A + C Cᵀ)⁻¹ K by Cholesky of the sum, K the last `facts` columns of C.

    Returns:
        X, its relative residual ‖(A + C Cᵀ) X − K‖ / ‖K‖, and the condition number of the sum.

    Raises:
        InputError: the sum is not positive definite.
    """
    name = "the system λ·E[k kᵀ] + K Kᵀ"
    system = factorize_symmetric(plus_gram(matrix, columns), precision, name)
    keys = columns[:, -facts:]
    solution = system.solve(keys)
    error = float(norm(product(system.matrix, solution) - keys) / norm(keys).clamp_min(TINY))
    return solution, error, system.condition
