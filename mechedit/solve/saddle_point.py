"""The saddle-point system behind every update, solved in the small space of the facts, and its residual.

    M X = C Y,    Cᵀ X + D Y = E

Eliminating X leaves the Schur complement system (Cᵀ M⁻¹ C + D) Y = E, with one row per column of C: D = λ gives the
Woodbury form of X = (λM + C Cᵀ)⁻¹ C E, and D = 0 the constraint Cᵀ X = E. Refinement works on the pair (X, Y), in which
nothing cancels. The residual is estimated by a Gaussian sketch of the equations (`gaussian_sketch`): with Ω M cached
beside the factor, that takes no pass over M. Where M is split in rows over processes, so are C and X.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import InputError
from mechedit.solve.factor import EPS, TINY, Factor, cholesky, gaussian_sketch
from mechedit.solve.products import column_norms, combination, contraction, norm, product, row
from mechedit.split_tensors import row_wise, whole

CORRECTIONS = 5
"""Most corrections of one solution."""
DEPENDENT = 1e-12
"""Keys are dependent where the squared sine of the angle to those before is below this, in the metric of M⁻¹."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PrimalDualPair:
    """The two unknowns (X, Y) of the system, or the residuals of its two equations."""

    primal: Float[Tensor, "d m"]
    """X, or the residual C Y − M X."""
    dual: Float[Tensor, "column m"]
    """Y, or the residual E − Cᵀ X − D Y."""

    def __add__(self, other: PrimalDualPair) -> PrimalDualPair:
        return PrimalDualPair(primal=self.primal + other.primal, dual=self.dual + other.dual)


@dataclass(frozen=True, kw_only=True, eq=False)
class SketchedResidual:
    """The residual of a pair (X, Y) under a Gaussian sketch Ω, whose norms estimate those of the residual."""

    moment_term: Float[Tensor, "probe m"]
    """Ω M X."""
    column_term: Float[Tensor, "probe m"]
    """Ω C Cᵀ X."""
    primal: Float[Tensor, "probe m"]
    """Ω (C Y − M X)."""
    dual: Float[Tensor, "inner m"]
    """Ω (E − Cᵀ X − D Y), with an Ω for its rows."""
    relative_size: float
    """The larger of the two norms, each relative to the size of its terms."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SaddlePointSystem:
    """The system without its right-hand side E; made by `saddle_point_system`."""

    columns: Float[Tensor, "d column"]
    """C."""
    relaxation: Float[Tensor, " column"]
    """The diagonal of D."""
    factor: Factor | None
    """M; None stands for the identity."""
    solved_columns: Float[Tensor, "d column"]
    """M⁻¹ C."""
    schur: Factor
    """The Schur complement Cᵀ M⁻¹ C + D."""

    def solve(self, facts: int) -> tuple[PrimalDualPair, SketchedResidual]:
        """The solution for the E that selects the last `facts` columns, refined to rounding, and its residual.

        Only where the sketched residual is above rounding is the full one computed, which costs as much as the solve,
        and the solution corrected by it.
        """
        right_side = torch.eye(len(self.relaxation), dtype=self.columns.dtype, device=self.columns.device)[:, -facts:]
        dual = self.schur.solve(right_side)
        pair = PrimalDualPair(primal=combination(self.solved_columns, dual), dual=dual)
        residual = self.sketched_residual(pair, right_side)
        for _ in range(CORRECTIONS):
            if residual.relative_size <= len(self.columns) ** 0.5 * EPS:
                break
            corrected = pair + self._correction(self._residual(pair, right_side))
            corrected_residual = self.sketched_residual(corrected, right_side)
            if not corrected_residual.relative_size < residual.relative_size:
                break
            pair, residual = corrected, corrected_residual
        return pair, residual

    def sketched_residual(self, pair: PrimalDualPair, right_side: Float[Tensor, "column m"]) -> SketchedResidual:
        """Estimate the residual of (X, Y) by the sketch, in three products with X and Y."""
        x, y = pair.primal, pair.dual
        row_sketch = gaussian_sketch(len(self.relaxation), self.columns)
        moment_term = contraction(self._moment_sketch, x)
        both = contraction(self._column_products, x)
        column_term, constraint = both.tensor_split([len(self._moment_sketch)])
        relaxed, sketched_right = (row_sketch * self.relaxation) @ y, row_sketch @ right_side
        primal, dual = self._column_sketch @ y - moment_term, sketched_right - constraint - relaxed
        scale = 1.0 if self.factor is None else self.factor.norm
        primal_norm, dual_norm, x_norm, y_norm, columns_norm, *dual_terms = norms(
            primal, dual, x, y, self._column_norms, constraint, relaxed, sketched_right
        )
        # C Y may be far smaller than its terms, where facts repeat each other.
        primal_size = primal_norm / max(scale * x_norm + columns_norm * y_norm, TINY)
        size = max(primal_size, dual_norm / max(sum(dual_terms), TINY))
        return SketchedResidual(
            moment_term=moment_term, column_term=column_term, primal=primal, dual=dual, relative_size=size
        )

    def ridge_error(self, residual: SketchedResidual, weight: float | int) -> float:
        """‖(λM + C Cᵀ) X − K‖ / ‖K‖ where K holds the last columns of C, estimated by ‖Ω((λM + C Cᵀ) X − K)‖."""
        facts = residual.moment_term.shape[1]
        ridge_residual = weight * residual.moment_term + residual.column_term - self._column_sketch[:, -facts:]
        residual_norm, keys_norm = norms(ridge_residual, self._column_norms[-facts:])
        return residual_norm / max(keys_norm, TINY)

    def ridge_condition(self, weight: float | int) -> float:
        """(λ‖M‖₁ + ‖C Cᵀ‖₁)·‖M⁻¹‖₁/λ, an estimate of κ₁ of λM + C Cᵀ from norms that are cheap once M is factored.

        With 2-norms it would be a bound, as C Cᵀ lowers no eigenvalue; 1-norms are within √d of those. It is close, as
        k columns lift the smallest eigenvalue of λM at most to its (k+1)-th smallest, and too high by no more.
        """
        norm, inverse = (1.0, 1.0) if self.factor is None else (self.factor.norm, self.factor.inverse_norm)
        return (weight * norm + self._gram_norm) * inverse / weight

    @property
    def _gram_norm(self) -> float:
        """‖C Cᵀ‖₁ from below: the 1-norm of that column whose 2-norm Ω C Cᵀ puts first, within √d of the largest."""
        longest = self._column_products[: len(self._moment_sketch)].square().sum(0).argmax()
        return float(whole(combination(self.columns, row(self.columns, longest))).abs().sum())

    @cached_property
    def _column_norms(self) -> Float[Tensor, " column"]:
        """The 2-norm of each column of C."""
        return column_norms(self.columns)

    @property
    def _moment_sketch(self) -> Float[Tensor, "probe d"]:
        """Ω M."""
        return gaussian_sketch(len(self.columns), self.columns) if self.factor is None else self.factor.sketch

    @cached_property
    def _column_sketch(self) -> Float[Tensor, "probe column"]:
        """Ω C."""
        return contraction(gaussian_sketch(len(self.columns), self.columns), self.columns)

    @cached_property
    def _column_products(self) -> Float[Tensor, "probe d"]:
        """Ω C Cᵀ, and below it Ω Cᵀ: one product with X for both."""
        row_sketch = gaussian_sketch(len(self.relaxation), self.columns)
        sketches = torch.cat([self._column_sketch, row_sketch])
        return whole(row_wise(lambda rows: (sketches @ rows.T).T, self.columns)).T

    def _residual(self, pair: PrimalDualPair, right_side: Float[Tensor, "column m"]) -> PrimalDualPair:
        """The full residuals of (X, Y) in both equations."""
        x, y = pair.primal, pair.dual
        moment_term = x if self.factor is None else product(self.factor.matrix, x)
        return PrimalDualPair(
            primal=combination(self.columns, y) - moment_term,
            dual=right_side - contraction(self.columns.T, x) - self.relaxation[:, None] * y,
        )

    def _correction(self, residual: PrimalDualPair) -> PrimalDualPair:
        """The (X, Y) that M X − C Y and Cᵀ X + D Y send to the two residuals."""
        particular = residual.primal if self.factor is None else self.factor.solve(residual.primal)
        y = self.schur.solve(residual.dual - contraction(self.columns.T, particular))
        return PrimalDualPair(primal=particular + combination(self.solved_columns, y), dual=y)


def saddle_point_system(
    columns: Float[Tensor, "d column"], relaxation: Float[Tensor, " column"], factor: Factor | None
) -> SaddlePointSystem:
    """Solve M with the columns and factor the Schur complement.

    Args:
        columns: C.
        relaxation: the diagonal of D, at least 0.
        factor: M; None stands for the identity.

    Raises:
        InputError: the columns are dependent to within rounding, and the relaxation is too small to tell them apart.
    """
    solved_columns = columns if factor is None else factor.solve(columns)
    # Symmetric to within rounding, and only its lower triangle is read.
    schur = contraction(columns.T, solved_columns)
    schur.diagonal().add_(relaxation)
    lower, independent = cholesky(schur, len(schur) * EPS if bool((relaxation > 0).all()) else DEPENDENT)
    if independent < len(schur):
        raise InputError(_dependence(schur, independent))
    return SaddlePointSystem(
        columns=columns,
        relaxation=relaxation,
        factor=factor,
        solved_columns=solved_columns,
        schur=Factor(matrix=schur, lower=lower),
    )


def norms(*tensors: Tensor) -> list[float]:
    """Frobenius norms of the tensors, fetched from the device at once."""
    return torch.stack([norm(tensor) for tensor in tensors]).tolist()


def _dependence(schur: Float[Tensor, "column column"], independent: int) -> str:
    """The message that names the first dependent column and the columns that it combines."""
    leading, mixed = schur[:independent, :independent], schur[:independent, independent : independent + 1]
    weights = torch.linalg.lstsq(leading, mixed).solution[:, 0]
    combined = (weights.abs() > 1e-3 * weights.abs().max()).nonzero()[:, 0].tolist() if independent else []
    cause = f"a combination of columns {combined}" if combined else "zero"
    return (
        f"the keys are linearly dependent: of {len(schur)} columns, from 0, earlier edits first, column {independent} "
        f"is {cause} to within rounding, and no relaxation tells them apart; expected independent keys. Usually two "
        f"facts share one subject and so one key: merge or leave out one of them, or choose a slack (or a weight) "
        f"above zero"
    )
