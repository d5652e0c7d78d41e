"""What is collected: E[k kᵀ] of one layer, its file, and the checks before it is used."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import InputError
from mechedit.files import read_tensors, write_tensors
from mechedit.models import Model
from mechedit.provenance import check_provenance
from mechedit.solve import Factor, NullSpace, factorize, null_space

KEY = "provenance"
"""Where the provenance lies in the file's metadata."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SecondMoment:
    """E[k kᵀ] of one layer's keys, uncentered, and where it comes from."""

    layer: int
    """0-based."""
    matrix: Float[Tensor, "d_mlp d_mlp"]
    """Mean of k kᵀ over tokens, in float64."""
    count: int
    """Tokens in the mean."""
    provenance: Mapping[str, Any]
    """Model, weights, tokenizer, dtype, texts and settings it was made with."""
    curve: pd.DataFrame | None = None
    """How it settled while it was collected, when that was asked for: see `Convergence`."""

    @functools.cached_property
    def factor(self) -> Factor:
        """The matrix factored once, to be solved with by every method and setting that is given this moment.

        Raises:
            InputError: it is not positive definite.
        """
        return factorize(self.matrix, name=f"the second moment of layer {self.layer}")

    def null_space(self, threshold: float | int) -> NullSpace:
        """What old keys hardly use (`mechedit.solve.null_space`), found once for a threshold, as that is cubic work.

        Raises:
            InputError: as `mechedit.solve.null_space`.
        """
        if threshold not in self._spaces:
            self._spaces[threshold] = null_space(self.matrix, threshold)
        return self._spaces[threshold]

    @functools.cached_property
    def _spaces(self) -> dict[float | int, NullSpace]:
        return {}

    def save(self, folder: str | Path) -> None:
        """Write `folder`/moments/layer_L.safetensors, atomically."""
        path = moment_path(folder, self.layer)
        write_tensors(path, {"matrix": self.matrix}, KEY, dict(self.provenance))


def load_moments(folder: str | Path, layers: Sequence[int], model: Model | None = None) -> dict[int, SecondMoment]:
    """Read the moments of `layers` from `folder`/moments; given a `model`, checked against it and put where it is.

    Raises:
        InputError: a file is absent, damaged, or of another model or layer; its matrix is of too few tokens or
            not finite.
    """
    found = {layer: load_moment(folder, layer) for layer in layers}
    if model is None:
        return found
    check_moments(found, model)
    # Where there is no float64 they stay on the CPU, and so does all that is solved with them.
    device = torch.device("cpu") if model.device.type == "mps" else model.device
    return {layer: dataclasses.replace(moment, matrix=moment.matrix.to(device)) for layer, moment in found.items()}


def load_moment(folder: str | Path, layer: int, *, mapped: bool = False) -> SecondMoment:
    """Read and check the moment of one layer; `mapped` leaves the matrix in the file until it is needed.

    Raises:
        InputError: as `load_moments`.
    """
    path = moment_path(folder, layer)
    if not path.exists():
        raise InputError(
            f"there is no {str(path)!r}, expected the second moment of layer {layer}; collect it with "
            f"mechedit moments --layers {layer}"
        )
    tensors, header = read_tensors(path, KEY, mapped=mapped)
    if set(tensors) != {"matrix"} or header.get("layer") != layer or "count" not in header:
        raise InputError(f"{str(path)!r} is not the second moment of layer {layer}; collect it again")
    _check_matrix(tensors["matrix"], header["count"], repr(str(path)))
    return SecondMoment(layer=layer, matrix=tensors["matrix"], count=header["count"], provenance=header)


def check_moments(moments: Mapping[int, SecondMoment], model: Model) -> None:
    """Refuse moments of other layers or of another model.

    Raises:
        InputError: names the first field that differs.
    """
    # Asked for once, since it takes a pass over the weights. Either backend gives the same keys.
    made = model.provenance()
    own = {field: made[field] for field in ("weights_hash", "tokenizer_hash", "dtype", "module")}
    for layer, moment in moments.items():
        check_provenance(moment.provenance, {"layer": layer, **own}, f"the second moment of layer {layer}")


def moment_path(folder: str | Path, layer: int) -> Path:
    """Where one layer's moment lies in a results folder."""
    return Path(folder) / "moments" / f"layer_{layer}.safetensors"


def _check_matrix(matrix: Tensor, count: int, what: str) -> None:
    width = len(matrix)
    if matrix.shape != (width, width):
        raise InputError(
            f"{what} holds a matrix of shape {tuple(matrix.shape)}, expected a square one; collect it again"
        )
    if count < width:
        raise InputError(
            f"{what} is the mean over {count} tokens and thus singular, expected at least d_mlp = {width} "
            f"(better {100 * width}); collect it again over more text"
        )
    if not torch.isfinite(matrix).all():
        raise InputError(f"{what} holds values that are not finite; collect it again in float32 or bfloat16")
