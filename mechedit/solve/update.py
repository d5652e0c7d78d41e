"""The result of a solver: a ΔW of low rank, and how well it was solved."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mechedit.errors import InputError, count_not_finite
from mechedit.solve.products import combination
from mechedit.split_tensors import most, part_here, split_like


@dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """ΔWᵀ = left · right, in the orientation [d_mlp, d_model], in the dtype and on the device of the keys.

    Where the keys are split in rows over processes, so are `left` and `delta`.
    """

    left: Float[Tensor, "d_mlp rank"]
    """X, the solution of the method's linear system, one column per fact."""
    right: Float[Tensor, "rank d_model"]
    """Rᵀ, the requested changes of the outputs."""
    error: float
    """Relative residual of the method's linear system, in float64, before rounding to the keys' dtype."""
    condition: float
    """Condition number of that system in the 1-norm; each method says how it is estimated."""

    @property
    def delta(self) -> Float[Tensor, "d_mlp d_model"]:
        """ΔWᵀ as a matrix."""
        return combination(self.left, self.right)


def rounded_update(
    solution: Float[Tensor, "d_mlp fact"],
    error: float,
    condition: float,
    keys: Float[Tensor, "d_mlp fact"],
    residuals: Float[Tensor, "d_model fact"],
) -> Update:
    """The update with factors X and Rᵀ, rounded to the dtype of the keys, and X split as they are.

    Raises:
        InputError: the solution is not finite there.
    """
    rounded = split_like(solution.to(keys.device, keys.dtype), keys)
    bad = count_not_finite(rounded)
    if bad:
        largest = most(float(part_here(solution).abs().max()), solution)
        raise InputError(
            f"the solution holds {bad} values of {rounded.numel()} that are not finite in {keys.dtype} (largest "
            f"{largest:.3g}, condition about {condition:.3g}), expected none: collect moments over "
            f"more text, set damping (such as 1e-4), leave out facts with like keys, or take a wider dtype; a larger "
            f"weight does not help"
        )
    return Update(left=rounded, right=residuals.T.to(keys.device, keys.dtype), error=error, condition=condition)
