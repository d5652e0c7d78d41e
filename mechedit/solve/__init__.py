"""The linear systems of editing: tensors in, tensors out, float64 inside, no model.

An MLP's second matrix W maps keys k to values. An edit adds to it a ΔW that changes the outputs of the new keys K by R
and leaves the outputs of old keys alone. With M = E[k kᵀ] for the old keys, every method here is one saddle-point
system for X and Y,

    M X = C Y,    Cᵀ X + D Y = E,    ΔW = R Xᵀ,

where C holds the columns of K (after those of earlier edits), E selects the new ones, and the diagonal D ≥ 0 relaxes
the constraint on each column:

- `ridge_update` (MEMIT Eq. 14): D = λ, which makes X = (λM + C Cᵀ)⁻¹ K;
- `equality_update` (ROME Eq. 2, EMMET): D = α for new keys, 0 by default, and 1 for earlier ones;
- `null_space_update` (AlphaEdit): the projection onto the directions that old keys hardly use in place of M⁻¹, and
  the ridge as D.

`damped` adds a multiple of the identity to an M that is singular.
`factorize` does the cubic work once per M; each solution after it costs O(d_mlp² · facts).

Example:
    >>> keys, residuals, old_keys = torch.randn(96, 4), torch.randn(32, 4), torch.randn(96, 1000)
    >>> factor = factorize(old_keys @ old_keys.T / 1000)  # once per layer
    >>> update = ridge_update(keys, residuals, factor, weight=10)
    >>> update.delta.shape  # ΔWᵀ; update.error and update.condition say how well it was solved
    torch.Size([96, 32])
"""

from mechedit.solve.damping import damped
from mechedit.solve.equality import equality_update
from mechedit.solve.factor import Factor, Precision, factorize
from mechedit.solve.null_space import NullSpace, null_space, null_space_update
from mechedit.solve.ridge import ridge_update
from mechedit.solve.update import Update

__all__ = [
    "Factor",
    "NullSpace",
    "Precision",
    "Update",
    "damped",
    "equality_update",
    "factorize",
    "null_space",
    "null_space_update",
    "ridge_update",
]
