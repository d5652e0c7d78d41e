"""Sums, differences and low-rank approximations of edits for the same weights, by their factors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.arguments import checked
from mechedit.edit.edit import Edit, Factors
from mechedit.errors import InputError
from mechedit.provenance import VERSION, ModelIdentity


@checked
def merge(edits: Sequence[Edit]) -> Edit:
    """One edit whose ΔW is the sum of those of `edits`: ΔW = [left₁ left₂ …] · [right₁; right₂; …].

    Each edit was made without regard to the other ones, so their facts may disturb each other. The ranks add up (see
    `truncate`).

    Returns:
        The edit; `parts` in its manifest holds the manifests of `edits`.

    Raises:
        InputError: no edits, or edits made for different weights (names the field that differs).
    """
    if not edits:
        raise InputError("there are no edits to merge, expected at least one; pass a list of edits")
    _check_same_base(edits)
    requests_and_facts = {
        name: [item for edit in edits for item in edit.manifest[name]]
        for name in ("requests", "facts")
        if all(name in edit.manifest for edit in edits)
    }
    return _signed_sum(edits, [1] * len(edits), {"method": "merge", **requests_and_facts})


@checked
def subtract(edit: Edit, subtrahend: Edit) -> Edit:
    """One edit whose ΔW is that of `edit` less that of `subtrahend`.

    Returns:
        The edit; `parts` in its manifest holds the manifests of both.

    Raises:
        InputError: they were made for different weights (names the field that differs).
    """
    _check_same_base([edit, subtrahend])
    return _signed_sum([edit, subtrahend], [1, -1], {"method": "subtract"})


@checked
def truncate(edit: Edit, rank: int | None = None, *, error: float | int | None = None) -> Edit:
    """The nearest edit of lower rank: by Eckart, Young and Mirsky the first terms of ΔW's singular value decomposition.

    Only the factors are decomposed: with left = Q R and rightᵀ = P S, the singular values of ΔW are those of R Sᵀ.

    Args:
        edit: of any rank.
        rank: most terms that each layer keeps.
        error: in place of `rank`: keep as few terms as leave ‖ΔW − ΔW'‖ ≤ error · ‖ΔW‖ in each layer (Frobenius
            norm). One term is always kept.

    Returns:
        The edit, in float64. `truncated` in its manifest holds a record for each layer: `layer`, `rank`, `of` (number
        of terms before), `error` (‖ΔW − ΔW'‖ / ‖ΔW‖).

    Raises:
        InputError: both or neither of `rank` and `error`; a rank below 1 or an error outside 0 … 1.
    """
    if (rank is None) == (error is None):
        raise InputError(f"rank is {rank} and error {error}, expected one of them to be given; drop or add one")
    if (rank is not None and rank < 1) or (error is not None and not 0 <= error <= 1):
        raise InputError(f"rank is {rank} and error {error}, expected a rank of at least 1, or an error from 0 to 1")
    factors, records = {}, []
    for layer in edit.layers:
        q_left, core, q_right = orthogonal_factors(edit.factors[layer])
        u, values, vh = torch.linalg.svd(core, full_matrices=False)
        errors = _truncation_errors(values)
        enough = rank if error is None else int((errors > error).sum())
        terms = min(max(1, enough or 0), len(values))
        factors[layer] = Factors(left=q_left @ (u[:, :terms] * values[:terms]), right=vh[:terms] @ q_right.T)
        records.append({"layer": layer, "rank": terms, "of": len(values), "error": float(errors[terms])})
    return Edit(factors=factors, manifest={**edit.manifest, "truncated": records})


def lost_fraction(edit: Edit, written: Edit) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ over all layers (Frobenius norm): what a truncation has lost."""
    squares = [0.0, 0.0]
    for layer in edit.layers:
        delta = edit.delta(layer).cpu()
        squares[0] += float((delta - written.delta(layer).cpu()).square().sum())
        squares[1] += float(delta.square().sum())
    return (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0


def update_norm(factors: Factors) -> float:
    """‖ΔW‖ (Frobenius norm), in float64."""
    if factors.rank < min(factors.left.shape[0], factors.right.shape[1]):
        return float(orthogonal_factors(factors)[1].norm())
    # With as many terms as ΔW is wide the product is smaller than its factors.
    return float((factors.left.double() @ factors.right.double()).norm())


def orthogonal_factors(
    factors: Factors,
) -> tuple[Float[Tensor, "d_mlp m"], Float[Tensor, "m n"], Float[Tensor, "d_model n"]]:
    """Q, C and P with ΔW = Q C Pᵀ and orthonormal columns in Q and P, in float64; C is no larger than the rank."""
    q_left, r_left = torch.linalg.qr(factors.left.double())
    q_right, r_right = torch.linalg.qr(factors.right.double().T)
    return q_left, r_left @ r_right.T, q_right


def _truncation_errors(values: Float[Tensor, " m"]) -> Float[Tensor, " m+1"]:
    """Relative error (Frobenius norm) when the first 0, 1, … m singular values are kept."""
    squares = values.square()
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return (tails / tails[0]).sqrt() if tails[0] > 0 else tails


def _signed_sum(edits: Sequence[Edit], signs: Sequence[int], manifest: Mapping[str, Any]) -> Edit:
    """The edit Σ signᵢ ΔWᵢ, with the manifests of `edits` as parts of its own."""
    factors = {}
    for layer in sorted({layer for edit in edits for layer in edit.layers}):
        signed = [(edit.factors[layer], sign) for edit, sign in zip(edits, signs, strict=True) if layer in edit.factors]
        factors[layer] = Factors(
            left=torch.cat([part.left.cpu().double() for part, _ in signed], dim=1),
            right=torch.cat([sign * part.right.cpu().double() for part, sign in signed]),
        )
    origin = {
        "mechedit": VERSION,
        "layers": list(factors),
        "model": dict(edits[0].manifest["model"]),
        "parts": [dict(edit.manifest) for edit in edits],
    }
    return Edit(factors=factors, manifest={**manifest, **origin})


def _check_same_base(edits: Sequence[Edit]) -> None:
    first, *bases = (ModelIdentity.of(edit.manifest.get("model", {})) for edit in edits)
    if first.weights is None:
        raise InputError(
            "the first edit's manifest does not name its weights, expected model.weights_hash; make it again"
        )
    for number, base in enumerate(bases, 2):
        first.require(base, f"edit {number} of {len(edits)}", "edits add up on the weights they were made for alone")
