"""Damping of a second moment: every direction counts as used a little, so that the moment can be inverted."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from mechedit.errors import check_at_least, check_finite
from mechedit.solve.checks import to_float64
from mechedit.solve.row_blocks import diagonal, plus_identity


def damped(matrix: Float[Tensor, "n n"], damping: float | int) -> Float[Tensor, "n n"]:
    """M + δ · (tr M / n) · I: δ in units of the mean eigenvalue; M itself, untouched, where δ is 0.

    The smallest eigenvalue is then δ tr M / n at least, and the condition number n/δ + 1 at most.

    Raises:
        InputError: δ is negative or not finite.
    """
    check_at_least("the damping", damping, 0)
    check_finite("the damping", damping)
    if not damping:
        return matrix
    matrix = to_float64(matrix)
    return plus_identity(matrix, damping * float(diagonal(matrix).mean()))
