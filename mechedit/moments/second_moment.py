"""`SecondMoment`: E[k kᵀ] of one layer, its file, and the checks before it is used."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Required

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mechedit.bounds import LARGEST
from mechedit.errors import InputError
from mechedit.files import read_tensors, write_tensors
from mechedit.models import Model
from mechedit.moments.conditioning import Conditioning, measure_conditioning, warn_if_singular
from mechedit.provenance import ALGORITHMS, MAKE_AGAIN, ModelIdentity, check_provenance
from mechedit.records import ModelRecord, Whole, check_record
from mechedit.solve import Factor, NullSpace, damped, factorize, null_space
from mechedit.split_tensors import gathered_in_first, is_split, wait_for_all

METADATA_KEY = "provenance"
"""Key of the provenance in the file's metadata."""
INPUT_FIELDS = ("algorithm", "texts", "max_length", "tokens", "layer")
"""Fields of the provenance that decide a moment besides the model."""
_ROWS_CHECKED = 256
"""Rows of a matrix that are checked at a time."""
REPLACE = "choose another --out, or pass --overwrite to replace it"
"""What to do about a file of another provenance in the folder for results."""


class MomentRecord(ModelRecord, total=False):
    """The header of a moment's file: where it comes from."""

    layer: Required[Whole]
    count: Required[Whole]
    texts: str
    max_length: Whole
    tokens: Whole | None
    documents: Whole
    seed: Whole
    algorithm: Whole


@dataclass(frozen=True, kw_only=True, eq=False)
class SecondMoment:
    """E[k kᵀ] of one layer's keys: their uncentered covariance over running text, and where it comes from.

    MEMIT's C₀ is λ times this matrix (§4.2).
    """

    layer: int
    """Index of the layer, 0-based."""
    matrix: Float[Tensor, "d_mlp d_mlp"]
    """Mean of k kᵀ over tokens, in float64; split in rows where the model is (`mechedit.split_tensors`)."""
    count: int
    """Tokens in the mean."""
    provenance: Mapping[str, Any]
    """Model, weights, tokenizer, dtype, texts and settings it was made with."""
    curve: pd.DataFrame | None = None
    """How the moment converged while it was collected, if that was measured: see `Convergence`."""

    @functools.cached_property
    def factor(self) -> Factor:
        """Cholesky factor of the matrix, computed once for all methods and settings that solve with this moment.

        Warns when the matrix is nearly singular (`mechedit.moments.conditioning`).

        Raises:
            InputError: it is not positive definite.
        """
        factor = factorize(self.matrix, name=f"the second moment of layer {self.layer}")
        warn_if_singular(measure_conditioning(self.matrix, self.layer, self.count, factor.condition))
        return factor

    @functools.cached_property
    def conditioning(self) -> Conditioning:
        """How many directions of the keys the text has shown, and the condition number; the factor is not kept."""
        return measure_conditioning(self.matrix, self.layer, self.count)

    def damped(self, damping: float | int) -> SecondMoment:
        """The moment with `damping` · (tr M / d_mlp) · I added, made once per damping; itself where that is 0.

        Raises:
            InputError: as `mechedit.solve.damped`.
        """
        if not damping:
            return self
        if damping not in self._damped:
            self._damped[damping] = replace(self, matrix=damped(self.matrix, damping))
        return self._damped[damping]

    @functools.cached_property
    def _damped(self) -> dict[float | int, SecondMoment]:
        return {}

    def null_space(self, threshold: float | int) -> NullSpace:
        """Directions that old keys hardly use (`mechedit.solve.null_space`), computed once per threshold.

        Raises:
            InputError: as `mechedit.solve.null_space`.
        """
        if threshold not in self._null_spaces:
            self._null_spaces[threshold] = null_space(self.matrix, threshold)
        return self._null_spaces[threshold]

    @functools.cached_property
    def _null_spaces(self) -> dict[float | int, NullSpace]:
        return {}

    def save(self, folder: str | Path) -> None:
        """Write `folder`/moments/layer_L.safetensors, atomically.

        Where it is split over processes, all call this, and the first one gathers and writes it.
        """
        matrix = gathered_in_first(self.matrix) if is_split(self.matrix) else self.matrix
        if matrix is not None:
            write_tensors(moment_path(folder, self.layer), {"matrix": matrix}, METADATA_KEY, dict(self.provenance))
        wait_for_all(self.matrix)


def load_moment(folder: str | Path, layer: int, *, mapped: bool = False) -> SecondMoment:
    """Read and check the moment of one layer.

    Args:
        folder: results folder.
        layer: layer to read.
        mapped: whether to leave the matrix in the file until it is used.

    Raises:
        InputError: the file is absent, damaged, or of another layer; its matrix is of too few tokens or not finite.
    """
    path = moment_path(folder, layer)
    if not path.exists():
        raise InputError(
            f"there is no {str(path)!r}, expected the second moment of layer {layer}; collect it with mechedit moments "
            f"--layers {layer}, or give the path of published moments (.npz)"
        )
    tensors, header = read_tensors(path, METADATA_KEY, mapped=mapped)
    check_record(header, MomentRecord, f"the header of {str(path)!r}", "collect it again")
    if set(tensors) != {"matrix"} or header["layer"] != layer:
        raise InputError(f"{str(path)!r} is not the second moment of layer {layer}; collect it again")
    check_matrix(tensors["matrix"], header["count"], repr(str(path)))
    return SecondMoment(layer=layer, matrix=tensors["matrix"], count=header["count"], provenance=header)


def check_moments(moments: Mapping[int, SecondMoment], model: Model) -> None:
    """Refuse moments of other layers or of another model.

    Raises:
        InputError: names the first field that differs.
    """
    expected = {"algorithm": ALGORITHMS["moments"], **model.identity().record}
    for layer, moment in moments.items():
        check_header(moment.provenance, {**expected, "layer": layer}, f"the second moment of layer {layer}")


def check_header(header: Mapping[str, Any], provenance: Mapping[str, Any], what: str, remedy: str = MAKE_AGAIN) -> None:
    """Refuse moments, finished or not, of another model, text, layer or algorithm; `INPUT_FIELDS` lists what counts.

    Args:
        header: header of the file.
        provenance: what it should have been made with; fields that it lacks are not compared.
        what: name of the file for the message.
        remedy: what to do about it.

    Raises:
        InputError: names the first field that differs.
    """
    ModelIdentity.of(provenance).require(ModelIdentity.of(header), what, remedy)
    check_provenance(header, {name: provenance[name] for name in INPUT_FIELDS if name in provenance}, what, remedy)


def moment_path(folder: str | Path, layer: int) -> Path:
    """Path of one layer's moment in a results folder."""
    return Path(folder) / "moments" / f"layer_{layer}.safetensors"


def check_matrix(matrix: Tensor, count: int, what: str) -> None:
    """Refuse a matrix that cannot be a second moment over `count` tokens.

    Raises:
        InputError: it is not square, of fewer tokens than it is wide, or not finite.
    """
    width = len(matrix) if matrix.ndim else 0
    if not width or matrix.shape != (width, width):
        raise InputError(
            f"{what} holds a matrix of shape {tuple(matrix.shape)}, expected a square one; collect it again"
        )
    if count < width:
        raise InputError(
            f"{what} is the mean over {count} tokens and thus singular, expected at least d_mlp = {width} "
            f"(better {100 * width}); collect it again over more text"
        )
    # A few rows at a time, as it may be larger than what memory has to spare.
    if any(not bool((rows.abs() <= LARGEST).all()) for rows in matrix.split(_ROWS_CHECKED)):
        raise InputError(
            f"{what} holds values that are not finite, or beyond {LARGEST:g}; collect it again in float32 or bfloat16"
        )
