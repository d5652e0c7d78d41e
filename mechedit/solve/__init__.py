"""The linear systems of editing: tensors in, tensors out, float64 inside, no model.

An MLP's second matrix W maps keys k to values. Editing adds to it a ΔW that sends the new keys K to the changes R and
leaves the old keys alone. With M = E[k kᵀ] for the old keys, every method here is one pair of equations for X and Y,

    M X = C Y,    Cᵀ X + D Y = E,    ΔW = R Xᵀ,

where C holds the columns of K (behind those of earlier edits), E picks the new ones, and the diagonal D ≥ 0 says how
much each column may be missed:

- `ridge_update` (MEMIT Eq. 14): D = λ, which makes X = (λM + C Cᵀ)⁻¹ K;
- `equality_update` (ROME Eq. 2, EMMET): D = α for new keys, 0 by default, and 1 for earlier ones;
- `null_space_update` (AlphaEdit): M⁻¹ becomes the projection onto what old keys hardly use, D the ridge.

`factorize` does the cubic work once per M; each answer after it costs O(d_mlp² · facts).
"""

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
    "equality_update",
    "factorize",
    "null_space",
    "null_space_update",
    "ridge_update",
]
