"""The system behind every update, solved in the small space of the facts, and its residual.

    M X = C Y,    Cᵀ X + D Y = E

Eliminating X leaves (Cᵀ M⁻¹ C + D) Y = E, one row a column of C: with D = λ that is the Woodbury form of
X = (λM + C Cᵀ)⁻¹ C E, and with D = 0 the constraint Cᵀ X = E. Refinement works on the pair, in which nothing cancels.
What an answer misses is watched through a few random combinations of the equations (`combinations`): with Ω M kept
beside the factor, that takes no pass over M.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import InputError
from mechedit.solve.factor import EPS, TINY, Factor, cholesky, combinations

CORRECTIONS = 5
DEPENDENT = 1e-12
"""Keys are dependent where the squared sine of the angle to those before is below this, in the metric of M⁻¹."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """X and Y, or what they miss of their two equations."""

    first: Float[Tensor, "d m"]
    """X, or C Y − M X."""
    second: Float[Tensor, "column m"]
    """Y, or E − Cᵀ X − D Y."""

    def __add__(self, other: Pair) -> Pair:
        return Pair(first=self.first + other.first, second=self.second + other.second)


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """What a few combinations Ω of the equations (`combinations`) tell of an answer (X, Y).

    The norms of `first` and `second` estimate those of what it misses.
    """

    old: Float[Tensor, "probe m"]
    """Ω M X."""
    new: Float[Tensor, "probe m"]
    """Ω C Cᵀ X."""
    first: Float[Tensor, "probe m"]
    """Ω (C Y − M X)."""
    second: Float[Tensor, "inner m"]
    """Ω (E − Cᵀ X − D Y), Ω here combining its rows."""
    size: float
    """The larger of the two, relative to the rounding of the terms."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dual:
    """All of the system but E; made by `dual`."""

    columns: Float[Tensor, "d column"]
    """C."""
    slack: Float[Tensor, " column"]
    """The diagonal of D."""
    factor: Factor | None
    """M; None stands for the identity."""
    solved: Float[Tensor, "d column"]
    """M⁻¹ C."""
    small: Factor
    """Cᵀ M⁻¹ C + D."""

    def solve(self, facts: int) -> tuple[Pair, Seen]:
        """The answer for E that picks the last `facts` columns, refined to rounding, and what is `seen` of it.

        Only where that is above rounding is the full residual computed, which costs as much as the solve, and the
        answer corrected by it.
        """
        wanted = torch.eye(len(self.slack), dtype=self.columns.dtype, device=self.columns.device)[:, -facts:]
        second = self.small.solve(wanted)
        answer = Pair(first=self.solved @ second, second=second)
        seen = self.seen(answer, wanted)
        for _ in range(CORRECTIONS):
            if seen.size <= len(self.columns) ** 0.5 * EPS:
                break
            better = answer + self._correction(self._residual(answer, wanted))
            smaller = self.seen(better, wanted)
            if not smaller.size < seen.size:
                break
            answer, seen = better, smaller
        return answer, seen

    def seen(self, answer: Pair, wanted: Float[Tensor, "column m"]) -> Seen:
        """What the combinations tell of (X, Y)."""
        x, y = answer.first, answer.second
        small = combinations(len(self.slack), self.columns)
        old, (new, kept) = self._sketch @ x, (self._watched @ x).tensor_split([len(self._sketch)])
        allowed, asked = (small * self.slack) @ y, small @ wanted
        first, second = self._over @ y - old, asked - kept - allowed
        scale = 1.0 if self.factor is None else self.factor.norm
        upper, lower, left, right, columns, *terms = norms(first, second, x, y, self._lengths, kept, allowed, asked)
        # C Y may be far smaller than its terms, where facts repeat each other.
        size = max(upper / max(scale * left + columns * right, TINY), lower / max(sum(terms), TINY))
        return Seen(old=old, new=new, first=first, second=second, size=size)

    def ridge_error(self, seen: Seen, weight: float | int) -> float:
        """‖(λM + C Cᵀ) X − K‖ / ‖K‖ where K holds the last columns of C, estimated by ‖Ω((λM + C Cᵀ) X − K)‖."""
        facts = seen.old.shape[1]
        missed, size = norms(weight * seen.old + seen.new - self._over[:, -facts:], self._lengths[-facts:])
        return missed / max(size, TINY)

    def ridge_condition(self, weight: float | int) -> float:
        """(λ‖M‖₁ + ‖C Cᵀ‖₁)·‖M⁻¹‖₁/λ, an estimate of κ₁ of λM + C Cᵀ from norms that are cheap once M is factored.

        With 2-norms it would be a bound, as C Cᵀ lowers no eigenvalue; 1-norms are within √d of those. It is close, as
        k columns lift the smallest eigenvalue of λM at most to its (k+1)-th smallest, and too high by no more.
        """
        norm, inverse = (1.0, 1.0) if self.factor is None else (self.factor.norm, self.factor.inverse_norm)
        return (weight * norm + self._outer_norm) * inverse / weight

    @property
    def _outer_norm(self) -> float:
        """‖C Cᵀ‖₁ from below: the 1-norm of that column whose 2-norm Ω C Cᵀ puts first, within √d of the largest."""
        longest = self._watched[: len(self._sketch)].square().sum(0).argmax()
        return float((self.columns @ self.columns[longest]).abs().sum())

    @cached_property
    def _lengths(self) -> Float[Tensor, " column"]:
        """The norm of each column."""
        return self.columns.norm(dim=0)

    @property
    def _sketch(self) -> Float[Tensor, "probe d"]:
        """Ω M."""
        return combinations(len(self.columns), self.columns) if self.factor is None else self.factor.sketch

    @cached_property
    def _over(self) -> Float[Tensor, "probe column"]:
        """Ω C."""
        return combinations(len(self.columns), self.columns) @ self.columns

    @cached_property
    def _watched(self) -> Float[Tensor, "probe d"]:
        """Ω C Cᵀ, and below it Ω Cᵀ: one product with X for both."""
        return torch.cat([self._over, combinations(len(self.slack), self.columns)]) @ self.columns.T

    def _residual(self, answer: Pair, wanted: Float[Tensor, "column m"]) -> Pair:
        """What (X, Y) misses of the equations."""
        x, y = answer.first, answer.second
        forces = x if self.factor is None else self.factor.matrix @ x
        return Pair(
            first=self.columns @ y - forces,
            second=wanted - self.columns.T @ x - self.slack[:, None] * y,
        )

    def _correction(self, missed: Pair) -> Pair:
        """(X, Y) of M X − C Y = first and Cᵀ X + D Y = second."""
        particular = missed.first if self.factor is None else self.factor.solve(missed.first)
        y = self.small.solve(missed.second - self.columns.T @ particular)
        return Pair(first=particular + self.solved @ y, second=y)


def dual(columns: Float[Tensor, "d column"], slack: Float[Tensor, " column"], factor: Factor | None) -> Dual:
    """Solve M with the columns and factor the small system.

    Raises:
        InputError: the columns are dependent to within rounding, and the slack is too small to tell them apart.
    """
    solved = columns if factor is None else factor.solve(columns)
    # Symmetric to within rounding, and only its lower triangle is read.
    small = columns.T @ solved
    small.diagonal().add_(slack)
    lower, reached = cholesky(small, len(small) * EPS if bool((slack > 0).all()) else DEPENDENT)
    if reached < len(small):
        raise InputError(_dependence(small, reached))
    return Dual(columns=columns, slack=slack, factor=factor, solved=solved, small=Factor(matrix=small, lower=lower))


def norms(*tensors: Tensor) -> list[float]:
    """Their Frobenius norms, fetched at once."""
    return torch.stack([tensor.norm() for tensor in tensors]).tolist()


def _dependence(small: Float[Tensor, "column column"], reached: int) -> str:
    """Which columns make up the first that is dependent."""
    before = torch.linalg.lstsq(small[:reached, :reached], small[:reached, reached : reached + 1]).solution[:, 0]
    others = (before.abs() > 1e-3 * before.abs().max()).nonzero()[:, 0].tolist() if reached else []
    cause = f"a combination of columns {others}" if others else "zero"
    return (
        f"the keys are linearly dependent: of {len(small)} columns, from 0, earlier edits first, column {reached} "
        f"is {cause} to within rounding, and no slack tells them apart. Usually two facts share one subject and so one "
        f"key: merge or leave out one of them, or allow a slack (or a weight) above zero"
    )
