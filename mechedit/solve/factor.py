"""A symmetric positive definite matrix, factored once by Cholesky and solved with many times.

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
from mechedit.solve.checks import symmetric

Precision = Literal["float64", "mixed"]
EPS = torch.finfo(torch.float64).eps
TINY = torch.finfo(torch.float64).tiny
SINGLE = 1e-6
"""Pivots that fall below this share of their diagonal entry are lost in float32: the factor is made in float64."""
PROBES = 16
"""Combinations of rows by which a residual is estimated: its norm is seldom off by more than half."""
REFINEMENTS = 30
"""Most corrections of one answer; each gains at least a factor of two, or refinement ends."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Factor:
    """M = L Lᵀ, made by `factorize`."""

    matrix: Float[Tensor, "n n"]
    """M in float64."""
    lower: Float[Tensor, "n n"]
    """L in float64, or in float32 when answers are refined."""

    def solve(self, right: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """M⁻¹ right in float64.

        A float32 factor is refined until ‖M x − b‖ ≤ √n·ε·(‖M‖₁‖x‖ + ‖b‖) for every column. Where that does not
        converge (a condition beyond about 1e7) a float64 factor is made, kept, and used instead.

        Raises:
            InputError: refinement failed and the matrix is not positive definite in float64 either.
        """
        if self.lower.dtype == torch.float64:
            return _divide(self.lower, right)
        found = self._refined(right)
        return self._exact.solve(right) if found is None else found

    @cached_property
    def condition(self) -> float:
        """κ₁ = ‖M‖₁‖M⁻¹‖₁, the latter by Hager's ascent (a lower bound, seldom off by more than 3)."""
        return self.norm * self.inverse_norm

    @cached_property
    def norm(self) -> float:
        """‖M‖₁."""
        return float(self.matrix.abs().sum(0).max())

    @cached_property
    def inverse_norm(self) -> float:
        """‖M⁻¹‖₁, estimated as `condition` says."""
        return one_norm(self.solve, self.matrix)

    @cached_property
    def sketch(self) -> Float[Tensor, "probe n"]:
        """Ω M, Ω the `combinations` of its rows: with it, Ω(b − M x) takes no pass over M."""
        return combinations(len(self.matrix), self.matrix) @ self.matrix

    @property
    def precision(self) -> Precision:
        """How it was factored; "float64" also where "mixed" was asked for and float32 did not do."""
        return "float64" if self.lower.dtype == torch.float64 else "mixed"

    @cached_property
    def _exact(self) -> Factor:
        return factorize_symmetric(self.matrix, "float64", "the matrix to be solved with")

    def _refined(self, right: Float[Tensor, "n m"]) -> Float[Tensor, "n m"] | None:
        """Corrections x += (L Lᵀ)⁻¹(b − M x) until the residual is at rounding; None if it stops shrinking."""
        rounding, size = len(right) ** 0.5 * EPS, right.norm(dim=0)
        found, left, before = torch.zeros_like(right), right, float("inf")
        for _ in range(REFINEMENTS):
            found = found + _divide(self.lower, left)
            left = right - self.matrix @ found
            error = left.norm(dim=0) / (self.norm * found.norm(dim=0) + size).clamp_min(TINY)
            if bool((error <= rounding).all()):
                return found
            if not float(error.max()) < before / 2:
                return None
            before = float(error.max())
        return None


def factorize(
    matrix: Float[Tensor, "n n"], *, precision: Precision = "float64", what: str = "the second moment"
) -> Factor:
    """Factor a symmetric positive definite matrix, M = L Lᵀ.

    Args:
        matrix: M. What is skew in it to within 1e-4 of its largest entry counts as rounding and is averaged out.
        precision: "mixed" factors in float32 and refines each answer; where float32 breaks down it is float64.
        what: how errors name the matrix.

    Raises:
        InputError: not finite, not symmetric, or not positive definite to within rounding.
    """
    check_choice("precision", precision, get_args(Precision))
    return factorize_symmetric(symmetric(matrix, what), precision, what)


def factorize_symmetric(matrix: Float[Tensor, "n n"], precision: Precision, what: str) -> Factor:
    """`factorize` of a float64 matrix that is exactly symmetric."""
    if precision == "mixed":
        lower, reached = cholesky(matrix.float(), SINGLE)
        if reached == len(matrix):
            return Factor(matrix=matrix, lower=lower)
    lower, reached = cholesky(matrix, len(matrix) * EPS)
    if reached < len(matrix):
        raise InputError(_breakdown(matrix, reached, what))
    return Factor(matrix=matrix, lower=lower)


def cholesky(matrix: Float[Tensor, "n n"], tolerance: float) -> tuple[Float[Tensor, "n n"], int]:
    """L, and how many of its rows were reached before a pivot fell to `tolerance` of its diagonal entry."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    sound = lower.diagonal().square() > tolerance * matrix.diagonal()
    if int(info):
        sound[int(info) - 1 :] = False
    return lower, int(sound.int().cumprod(0).sum())


def combinations(rows: int, like: Tensor) -> Float[Tensor, "probe rows"]:
    """Ω, the same at every call, with E‖Ω A‖² = ‖A‖²: no error hides from it, in whichever row or column of A it is.

    The identity where there are no more rows than `PROBES`; else normal numbers, with which ‖Ω A‖² is off by a
    standard deviation of √(2/`PROBES`) where A has rank one and by less where it has more. Drawn once and shared.
    """
    return _drawn(rows, like.device)


@lru_cache(maxsize=32)
def _drawn(rows: int, device: torch.device) -> Float[Tensor, "probe rows"]:
    if rows <= PROBES:
        return torch.eye(rows, dtype=torch.float64, device=device)
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(PROBES, rows, dtype=torch.float64, generator=generator) / PROBES**0.5).to(device)


def one_norm(times: Callable[[Tensor], Tensor], like: Float[Tensor, "n m"]) -> float:
    """‖A‖₁ of a symmetric A that is known by its products only (Hager 1984): a lower bound, seldom off by over 3."""
    probe = like.new_full((len(like), 1), 1 / len(like))
    norm = 0.0
    for _ in range(5):
        product = times(probe)
        norm = max(norm, float(product.abs().sum()))
        slope = times(torch.where(product < 0, -1.0, 1.0).to(like))
        steepest = int(slope.abs().argmax())
        if float(slope[steepest].abs()) <= float((slope * probe).sum()):
            break
        probe = torch.zeros_like(probe)
        probe[steepest] = 1
    return norm


def _divide(lower: Float[Tensor, "n n"], right: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """(L Lᵀ)⁻¹ right, in the dtype of `right` and the precision of L."""
    if lower.dtype != right.dtype:
        scale = right.norm(dim=0).clamp_min(TINY)
        return _divide(lower, (right / scale).to(lower)).double() * scale
    # torch.cholesky_solve would copy L each time.
    half = torch.linalg.solve_triangular(lower, right, upper=False)
    # In place, as fresh memory costs more to touch than to fill; autograd has no such way.
    return torch.linalg.solve_triangular(lower.mT, half, upper=True, out=None if half.requires_grad else half)


def _breakdown(matrix: Float[Tensor, "n n"], reached: int, what: str) -> str:
    """Where it broke down, why, and what to do."""
    dead = int((matrix.diagonal() <= 0).sum())
    units = f"{dead} diagonal entries are not positive (units that never fire); " if dead else ""
    return (
        f"{what} is not positive definite (its Cholesky factor breaks down at {reached + 1} of {len(matrix)}); {units}"
        f"either the moments come from too few tokens, or units are dead, or the weight is zero, or the matrix is "
        f"no second moment. Collect moments over more text or raise the weight; to keep the directions that old "
        f"keys never use, use the null space"
    )
