"""The updates of ROME and EMMET: new keys are changed exactly, old keys as little as that allows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import check_at_least, check_finite
from mechedit.solve.checks import columns_of
from mechedit.solve.factor import TINY, Factor, factorize
from mechedit.solve.saddle_point import Dual, Pair, Seen, dual
from mechedit.solve.update import Update, finish


def equality_update(
    keys: Float[Tensor, "d_mlp fact"],
    residuals: Float[Tensor, "d_model fact"],
    moment: Float[Tensor, "d_mlp d_mlp"] | Factor,
    *,
    slack: float | int = 0.0,
    previous: Float[Tensor, "d_mlp earlier"] | None = None,
) -> Update:
    """Minimize E‖ΔW k‖² over old keys subject to ΔW K = R: ΔW = R (Kᵀ N⁻¹ K + αI)⁻¹ Kᵀ N⁻¹, N = M + K_p K_pᵀ.

    One fact is ROME's Eq. 2 and many are EMMET's closed form (Gupta et al. 2024). α > 0 relaxes
    the constraint: the update is then the ridge's, R Kᵀ (αN + K Kᵀ)⁻¹.

    Args:
        keys: K, one column a fact, linearly independent unless α > 0.
        residuals: R, the change of the output at each key.
        moment: M = E[k kᵀ], symmetric and positive definite, or its factor.
        slack: α ≥ 0.
        previous: K_p, keys of earlier edits, each counted as one more old key.

    Returns:
        Factors of rank the number of facts. `error` is the larger of ‖N X − K Y‖ / ‖K Y‖ and ‖Kᵀ X + αY − I‖ / ‖I‖,
        where X = N⁻¹ K Y is the left factor and Y = (Kᵀ N⁻¹ K + αI)⁻¹ (each estimated from 16 random combinations of
        its rows, where there are more); `condition` is that of Kᵀ N⁻¹ K + αI, ‖A‖₁ exact and ‖A⁻¹‖₁ by Hager's
        estimate. That of M is `Factor.condition`.

    Raises:
        InputError: an input is not finite or of the wrong size; M is not positive definite; the keys are linearly
            dependent, with the columns at fault.
    """
    check_at_least("the slack of the equality constraint", slack, 0)
    check_finite("the slack of the equality constraint", slack)
    factor = moment if isinstance(moment, Factor) else factorize(moment.to(keys.device))
    columns = columns_of(keys, residuals, previous, factor.matrix)
    facts = keys.shape[1]
    earlier = columns.shape[1] - facts
    if earlier >= len(columns):
        old = columns[:, :earlier]
        factor = factorize(torch.addmm(factor.matrix, old, old.T), precision=factor.precision)
        columns, earlier = columns[:, earlier:], 0
    weights = torch.cat([columns.new_ones(earlier), columns.new_full((facts,), slack)])
    system = dual(columns, weights, factor)
    answer, seen = system.solve(facts)
    return finish(answer.first, _error(system, answer, seen, facts), _condition(system, facts), keys, residuals)


def _error(system: Dual, answer: Pair, seen: Seen, facts: int) -> float:
    """The larger relative residual of the two equations."""
    forces = (system.columns @ answer.second).norm().clamp_min(TINY)
    return max(float(seen.first.norm() / forces), float(seen.second.norm()) / facts**0.5)


def _condition(system: Dual, facts: int) -> float:
    """That of the Schur complement on the new keys, whose Cholesky factor is the last block of the small one."""
    lower = system.small.lower[-facts:, -facts:]
    return Factor(matrix=lower @ lower.T, lower=lower).condition
