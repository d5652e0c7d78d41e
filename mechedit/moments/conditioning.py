"""How far a second moment is from singular: how many directions of the keys the text has shown, and what that needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import InputError, brief_list
from mechedit.notices import warn
from mechedit.solve.checks import symmetrized, to_float64
from mechedit.solve.factor import factorize_symmetric
from mechedit.split_tensors import whole

MOST_CONDITION = 1e9
"""Condition number (in the 1-norm) above which a moment counts as nearly singular. Over 38,000 tokens it is between 9e3
and 7e7 for the layers of SmolLM2-135M and Gemma 3 270M, and for those of the tiny model whose MLPs do anything."""
SEEN = torch.finfo(torch.float32).eps
"""Eigenvalue of a nearly singular moment, as a fraction of the largest, below which a direction counts as never seen:
k kᵀ is computed in float32, and smaller eigenvalues are its rounding."""
TOKENS_PER_DIMENSION = 100
"""Tokens per dimension of the keys that a moment should be collected over."""
POWER_STEPS, POWER_TOLERANCE = 200, 1e-4
"""Most steps of the power iteration for the largest eigenvalue, and the relative gain of a step that ends it: what is
seen differs from rounding by more."""
TINY = torch.finfo(torch.float64).tiny

_REMEDY = (
    "Updates fail or are far too large whatever the weight: collect over more varied text, edit other layers, set "
    "damping (such as 1e-4), or use alphaedit"
)


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What can be said of a second moment before anything is solved with it."""

    layer: int
    """Index of the layer, 0-based."""
    width: int
    """Directions of the keys, d_mlp."""
    rank: int
    """Directions that the text has shown: all of them up to a condition of `MOST_CONDITION`, else the eigenvalues above
    `SEEN` of the largest."""
    tokens: int
    """Tokens in the mean."""
    condition: float
    """κ₁ of the matrix; infinite where it is singular to within rounding."""

    @property
    def tokens_needed(self) -> int:
        """Tokens that the moment should be collected over: `TOKENS_PER_DIMENSION` for each dimension."""
        return TOKENS_PER_DIMENSION * self.width

    @property
    def warning(self) -> str | None:
        """What is wrong with the moment, and what to do; None where it is fine."""
        if self.condition <= MOST_CONDITION:
            return None
        degree = (
            f"nearly singular (condition about {self.condition:.1e})" if math.isfinite(self.condition) else "singular"
        )
        return f"the second moment of layer {self.layer} is {degree}: {self.unseen_in_words}. {_REMEDY}"

    @property
    def unseen_in_words(self) -> str:
        """How many dimensions the text has not shown."""
        unseen = f"{self.width - self.rank} of its keys' {self.width} dimensions were never seen"
        return f"{unseen} in {self.tokens:,} tokens ({self._need})"

    def in_words(self) -> str:
        """The rank and the number of tokens on one line."""
        degree = f"condition about {self.condition:.1e}" if math.isfinite(self.condition) else "singular"
        line = (
            f"layer {self.layer}: {self.rank} of {self.width} directions of the keys seen in {self.tokens:,} tokens, "
            f"{degree}"
        )
        unseen = self.width - self.rank
        return f"{line}; {unseen} never seen ({self._need})" if unseen else f"{line} ({self._need})"

    @property
    def _need(self) -> str:
        """How many tokens it takes, held against those there are."""
        needed, enough = f"100 · d_mlp = {self.tokens_needed:,}", self.tokens >= self.tokens_needed
        if self.rank == self.width:
            return f"{needed} suffice" if enough else f"better {needed}"
        if enough:
            return f"above {needed}: such text shows no others"
        return f"{needed} tokens are needed"


def measure_conditioning(
    matrix: Float[Tensor, "d_mlp d_mlp"], layer: int, tokens: int, condition: float | None = None
) -> Conditioning:
    """Condition and rank of a second moment; its factor is not kept, which would take as much memory again.

    One triangle is read: that a matrix is symmetric is checked before anything is solved with it.

    Args:
        matrix: E[k kᵀ].
        layer: whose it is.
        tokens: over which it is the mean.
        condition: κ₁, where it is known.
    """
    if condition is None:
        try:
            condition = factorize_symmetric(to_float64(matrix), "float64", "the second moment").condition
        except InputError:
            condition = math.inf
    width = len(matrix)
    rank = width if condition <= MOST_CONDITION else _rank(matrix)
    return Conditioning(layer=layer, width=width, rank=rank, tokens=tokens, condition=condition)


def warn_if_singular(*measured: Conditioning) -> None:
    """Warn, in one line for all, of moments that are singular or nearly so."""
    singular = [conditioning for conditioning in measured if conditioning.warning]
    if len(singular) > 1:
        worst = min(singular, key=lambda conditioning: conditioning.rank)
        layers = brief_list((conditioning.layer for conditioning in singular), 20)
        warn(
            f"the second moments of layers {layers} are singular or nearly so: of {worst.layer}, "
            f"{worst.unseen_in_words}. {_REMEDY}"
        )
    elif singular:
        warn(str(singular[0].warning))


def _rank(matrix: Float[Tensor, "d_mlp d_mlp"]) -> int:
    """Eigenvalues above `SEEN` of the largest, counted without being computed.

    By Sylvester's law of inertia they are the positive ones of D in M − s·I = L D Lᵀ (Bunch and Kaufman 1977), whose
    blocks of two rows have one eigenvalue of each sign.
    """
    matrix = symmetrized(whole(matrix), "the second moment")
    shift = SEEN * _largest_eigenvalue(matrix)
    factor, pivots, _ = torch.linalg.ldl_factor_ex(matrix.clone().diagonal_scatter(matrix.diagonal() - shift))
    in_pairs = pivots < 0
    return int((factor.diagonal()[~in_pairs] > 0).sum() + in_pairs.sum() // 2)


def _largest_eigenvalue(matrix: Float[Tensor, "n n"]) -> float:
    """Of a positive semidefinite matrix, by power iteration from its largest column on."""
    vector, value = matrix[:, matrix.diagonal().argmax()], 0.0
    for _ in range(POWER_STEPS):
        vector = vector / vector.norm().clamp_min(TINY)
        image = matrix @ vector
        before, value = value, float(vector @ image)
        if value - before <= POWER_TOLERANCE * value:
            break
        vector = image
    return value
