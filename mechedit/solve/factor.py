"""Cholesky factorization of a symmetric positive definite matrix, done once and solved with many times.

`precision="mixed"` factors in float32 and recovers float64 accuracy by iterative refinement (Wilkinson; Higham,
Accuracy and Stability of Numerical Algorithms, §12), for devices on which float64 is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import InputError, check_choice
from mechedit.solve.checks import symmetrized
from mechedit.solve.products import column_norms, product
from mechedit.solve.row_blocks import cholesky_rows, diagonal, one_norm
from mechedit.solve.substitution import cholesky_solution
from mechedit.split_tensors import row_wise

Precision = Literal["float64", "mixed"]
EPS = torch.finfo(torch.float64).eps
TINY = torch.finfo(torch.float64).tiny
FLOAT32_PIVOT = 1e-6
"""Smallest pivot, as a fraction of its diagonal entry, that float32 resolves; below it float64 is used."""
SKETCH_ROWS = 16
"""Rows of the Gaussian sketch by which a residual is estimated: its norm is seldom off by more than half."""
REFINEMENTS = 30
"""Most refinement steps per solution; refinement ends when a step does not halve the error."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Factor:
    """A Cholesky factorization M = L Lᵀ, made by `factorize`."""

    matrix: Float[Tensor, "n n"]
    """M in float64."""
    lower: Float[Tensor, "n n"]
    """L in float64, or in float32 when solutions are refined."""

    def solve(self, right_side: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """M⁻¹ B in float64, for the right-hand side B: with a float64 factor, `scipy.linalg.cho_solve`.

        Where M is split in rows, B may be so or be whole, and the solution is like it.

        A float32 factor is refined until ‖M x − b‖ ≤ √n·ε·(‖M‖₁‖x‖ + ‖b‖) for every column. Where that does not
        converge (a condition number above about 1e7) a float64 factor is made, cached, and used instead.

        Raises:
            InputError: refinement failed and the matrix is not positive definite in float64 either.
        """
        if self.lower.dtype == torch.float64:
            return _cholesky_solve(self.lower, right_side)
        refined = self._refined(right_side)
        return self._float64_factor.solve(right_side) if refined is None else refined

    @cached_property
    def condition(self) -> float:
        """κ₁ = ‖M‖₁‖M⁻¹‖₁, the latter by Hager's ascent (a lower bound, seldom off by more than 3)."""
        return self.norm * self.inverse_norm

    @cached_property
    def norm(self) -> float:
        """‖M‖₁."""
        return one_norm(self.matrix)

    @cached_property
    def inverse_norm(self) -> float:
        """‖M⁻¹‖₁, estimated as `condition` says."""
        return estimate_one_norm(self.solve, self.matrix)

    @cached_property
    def sketch(self) -> Float[Tensor, "probe n"]:
        """Ω M, where Ω is the `gaussian_sketch` of its rows: with it, Ω(B − M X) takes no pass over M."""
        # M is its own transpose.
        return product(self.matrix, gaussian_sketch(len(self.matrix), self.matrix).T).T

    @property
    def precision(self) -> Precision:
        """Precision of the factor: "float64" also where "mixed" was requested and float32 broke down."""
        return "float64" if self.lower.dtype == torch.float64 else "mixed"

    @cached_property
    def _float64_factor(self) -> Factor:
        return factorize_symmetric(self.matrix, "float64", "the matrix to be solved with")

    def _refined(self, right_side: Float[Tensor, "n m"]) -> Float[Tensor, "n m"] | None:
        """Refine X += (L Lᵀ)⁻¹(B − M X) until the residual is at rounding; None if it stops shrinking."""
        rounding, right_norm = len(right_side) ** 0.5 * EPS, column_norms(right_side)
        solution, residual, previous_error = torch.zeros_like(right_side), right_side, float("inf")
        for _ in range(REFINEMENTS):
            solution = solution + _cholesky_solve(self.lower, residual)
            residual = right_side - product(self.matrix, solution)
            size = (self.norm * column_norms(solution) + right_norm).clamp_min(TINY)
            error = column_norms(residual) / size
            if bool((error <= rounding).all()):
                return solution
            if not float(error.max()) < previous_error / 2:
                return None
            previous_error = float(error.max())
        return None


def factorize(
    matrix: Float[Tensor, "n n"], *, precision: Precision = "float64", name: str = "the second moment"
) -> Factor:
    """Factor a symmetric positive definite matrix, M = L Lᵀ: `scipy.linalg.cho_factor`, on the matrix's own device.

    Args:
        matrix: M. A skew part within 1e-4 of its largest entry counts as rounding and is averaged out.
        precision: "mixed" factors in float32 and refines each solution; where float32 breaks down it is float64.
        name: how errors name the matrix.

    Raises:
        InputError: not finite, not symmetric, or not positive definite to within rounding.
    """
    check_choice("precision", precision, get_args(Precision))
    return factorize_symmetric(symmetrized(matrix, name), precision, name)


def factorize_symmetric(matrix: Float[Tensor, "n n"], precision: Precision, name: str) -> Factor:
    """`factorize` for a float64 matrix that is exactly symmetric."""
    if precision == "mixed":
        lower, sound_rows = cholesky(matrix.float(), FLOAT32_PIVOT)
        if sound_rows == len(matrix):
            return Factor(matrix=matrix, lower=lower)
    lower, sound_rows = cholesky(matrix, len(matrix) * EPS)
    if sound_rows < len(matrix):
        raise InputError(_breakdown(matrix, sound_rows, name))
    return Factor(matrix=matrix, lower=lower)


def cholesky(matrix: Float[Tensor, "n n"], tolerance: float) -> tuple[Float[Tensor, "n n"], int]:
    """L, and the number of its rows before the first pivot at or below `tolerance` times its diagonal entry."""
    lower, computed = cholesky_rows(matrix)
    sound = computed & (diagonal(lower).square() > tolerance * diagonal(matrix))
    return lower, int(sound.int().cumprod(0).sum())


def gaussian_sketch(rows: int, like: Tensor) -> Float[Tensor, "probe rows"]:
    """A random Ω, the same at every call, with E‖Ω A‖² = ‖A‖²: no error in any row or column of A escapes it.

    The identity where there are no more rows than `SKETCH_ROWS`; else Gaussian, with which ‖Ω A‖² is off by a standard
    deviation of √(2/`SKETCH_ROWS`) where A has rank one and by less where it has more. Drawn once and shared.
    """
    return _sketch_matrix(rows, like.device)


@lru_cache(maxsize=32)
def _sketch_matrix(rows: int, device: torch.device) -> Float[Tensor, "probe rows"]:
    if rows <= SKETCH_ROWS:
        return torch.eye(rows, dtype=torch.float64, device=device)
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(SKETCH_ROWS, rows, dtype=torch.float64, generator=generator, device="cpu") / SKETCH_ROWS**0.5
    ).to(device)


def estimate_one_norm(product: Callable[[Tensor], Tensor], like: Float[Tensor, "n m"]) -> float:
    """‖A‖₁ of a symmetric A that is known by its products only (Hager 1984): a lower bound, seldom off by over 3.

    Args:
        product: maps X, [n, 1], to A X.
        like: gives the size n, the dtype and the device.
    """
    vector = torch.full((len(like), 1), 1 / len(like), dtype=like.dtype, device=like.device)
    norm = 0.0
    for _ in range(5):
        image = product(vector)
        norm = max(norm, float(image.abs().sum()))
        gradient = product(torch.where(image < 0, -1.0, 1.0).to(image))
        steepest = int(gradient.abs().argmax())
        if float(gradient[steepest].abs()) <= float((gradient * vector).sum()):
            break
        vector = torch.zeros_like(vector)
        vector[steepest] = 1
    return norm


def _cholesky_solve(lower: Float[Tensor, "n n"], right_side: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """(L Lᵀ)⁻¹ B, in the dtype of B and the precision of L."""
    if lower.dtype != right_side.dtype:
        scale = column_norms(right_side).clamp_min(TINY)
        scaled = row_wise(lambda rows: (rows / scale).to(lower.dtype), right_side)
        return row_wise(lambda rows: rows.double() * scale, _cholesky_solve(lower, scaled))
    return cholesky_solution(lower, right_side)


def _breakdown(matrix: Float[Tensor, "n n"], sound_rows: int, name: str) -> str:
    """Where the factorization broke down, why, and what to do."""
    dead = int((diagonal(matrix) <= 0).sum())
    dead_units = f"{dead} diagonal entries are not positive (units that never fire); " if dead else ""
    return (
        f"{name} is not positive definite (its Cholesky factor breaks down at {sound_rows + 1} of {len(matrix)}); "
        f"{dead_units}either the moments come from too few tokens, or units are dead, or the weight is zero, or the "
        f"matrix is not a second moment. Collect moments over more and more varied text, or edit other layers; a "
        f"larger weight does not help, unless it is zero. Damping (such as damping=1e-4) makes any second moment "
        f"positive definite; AlphaEdit, which keeps to the null space of the moments, needs no such factor"
    )
