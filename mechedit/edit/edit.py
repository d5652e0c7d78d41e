"""`Edit`: for each layer two factors with ΔW = left · right, and a manifest.

On disk an edit is one safetensors file with `layer.L.left` [d_mlp, r] and `layer.L.right` [r, d_model].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mechedit.arguments import checked
from mechedit.bounds import LARGEST
from mechedit.edit.manifest_record import ManifestRecord
from mechedit.errors import InputError, brief_list, check_finite
from mechedit.files import read_tensors, write_tensors
from mechedit.provenance import ModelIdentity
from mechedit.records import check_record
from mechedit.split_tensors import row_wise, rows_of

METADATA_KEY = "manifest"
"""Name of the manifest in the file's metadata."""
SIDES = ("left", "right")


@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """One layer's update, ΔW = left · right, in the orientation [d_mlp, d_model]."""

    left: Float[Tensor, "d_mlp rank"]
    right: Float[Tensor, "rank d_model"]

    @property
    def rank(self) -> int:
        """Columns of `left`: the rank of ΔW, or more than that."""
        return self.left.shape[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """A change of the down-projections of some layers, or of attention's output projections, independent of a model."""

    factors: Mapping[int, Factors]
    """The factors of ΔW by 0-based layer."""
    manifest: Mapping[str, Any]
    """How it was made: `method`, `layers`, `model` (provenance before the edit), `requests` (ids), `facts` (what each
    request writes, in words; older edits lack it), settings …"""
    remake: Callable[[Sequence[str]], Edit] | None = field(default=None, repr=False, compare=False)
    """Makes the edit again without the requests of some ids, by the method that made it; None once it was saved and
    loaded, pickled, or changed."""

    def __repr__(self) -> str:
        written = len(self.manifest.get("requests", ()))
        return (
            f"Edit(method={self.manifest.get('method')!r}, requests={written}, module={self.module!r}, "
            f"layers={self.layers}, rank={max((factors.rank for factors in self.factors.values()), default=0)})"
        )

    @property
    def module(self) -> str:
        """The module whose projections are edited: `mlp`, also where an older manifest does not say so, or `attn`."""
        return ModelIdentity.of(self.manifest.get("model", {})).module

    @property
    def layers(self) -> list[int]:
        """The edited layers, ascending."""
        return sorted(self.factors)

    def delta(self, layer: int, mesh: DeviceMesh | None = None) -> Float[Tensor, "d_mlp d_model"]:
        """ΔW of one layer, in float64.

        Args:
            layer: 0-based.
            mesh: processes over which ΔW is split in rows (`Model.mesh`); each computes its own.

        Raises:
            InputError: the edit does not touch this layer.
        """
        if layer not in self.factors:
            raise InputError(f"the edit has no layer {layer}, expected one of {self.layers}; choose one of them")
        factors = self.factors[layer]
        right = factors.right.double()
        return row_wise(lambda rows: rows.double() @ right.to(rows.device), rows_of(factors.left, mesh))

    @checked
    def without(self, ids: Sequence[str] | str) -> Edit:
        """The edit that its method would have made without some of its requests: they are revoked.

        Its targets must have been kept (`cache`): then no search runs, but for other facts about a subject of those
        that are left out, with which they shared a δ. What depends on the number of facts, such as λ, follows it.

        Args:
            ids: of the requests to leave out.

        Raises:
            InputError: an id that the edit does not have, or no request remains; the edit was not made in this
                process, or its targets were not kept.
        """
        if self.remake is None:
            raise InputError(
                "the edit does not know how it was made (it was loaded, merged or truncated), expected one that a "
                "method returned; make it again without the requests, from the targets that it left, or use mechedit "
                "edit --without"
            )
        return self.remake([ids] if isinstance(ids, str) else list(ids))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "remake": None}

    @checked
    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically, with the manifest in its header."""
        tensors = {
            f"layer.{layer}.{side}": getattr(factors, side) for layer, factors in self.factors.items() for side in SIDES
        }
        write_tensors(path, tensors, METADATA_KEY, dict(self.manifest))

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Edit:
        """Read what `save` wrote.

        Raises:
            InputError: the file is absent, cut short, damaged or not an edit; its factors do not fit each other or are
                not finite; its manifest does not say which weights the edit is for, or names a layer that is not there.
        """
        tensors, manifest = read_tensors(path, METADATA_KEY)
        edit = cls(factors=factors_of(tensors, path), manifest=_manifest(manifest, path))
        missing = [layer for layer in edit.manifest.get("layers", ()) if layer not in edit.factors]
        if missing:
            raise InputError(
                f"{str(path)!r} holds the layers {edit.layers} and lacks {missing}, which its manifest names; expected "
                f"all of them: make the edit again with mechedit edit, or copy it again"
            )
        check_factors(edit)
        return edit


def has_same_factors(first: Edit, second: Edit) -> bool:
    """Whether two edits hold the same factors (one may have been saved and loaded)."""
    return first is second or (
        (first.layers, first.module) == (second.layers, second.module)
        and all(
            _equal(getattr(first.factors[layer], side), getattr(second.factors[layer], side))
            for layer in first.layers
            for side in SIDES
        )
    )


def check_factors(edit: Edit) -> None:
    """Refuse factors that are not finite, or so large that their products would not be.

    Raises:
        InputError: names the layer and the factor, and says how many of its values are not finite.
    """
    for layer, factors in edit.factors.items():
        for side in SIDES:
            factor = getattr(factors, side)
            check_finite(f"the edit's layer {layer}: the values of its {side} factor", factor)
            if factor.numel() and float(factor.abs().max()) > LARGEST:
                raise InputError(
                    f"the edit's layer {layer}: its {side} factor holds {float(factor.abs().max()):.1e}, expected "
                    f"values of at most {LARGEST:g}; make the edit again"
                )


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.cpu(), second.cpu())


def factors_of(tensors: Mapping[str, Tensor], path: str | Path) -> dict[int, Factors]:
    """The tensors of an edit file by layer.

    Raises:
        InputError: a tensor is unknown or missing, or the factors of a layer do not fit each other.
    """
    names = {name: re.fullmatch(r"layer\.(0|[1-9][0-9]{0,5})\.(left|right)", name) for name in tensors}
    unknown = sorted(name for name, match in names.items() if match is None)
    layers = sorted({int(match[1]) for match in names.values() if match})
    expected = [f"layer.{layer}.{side}" for layer in layers for side in SIDES]
    missing = [name for name in expected if name not in tensors]
    misfits = [] if missing else _misfits(tensors, layers)
    if unknown or missing or not layers or misfits:
        raise InputError(
            f"{str(path)!r} is not an edit (unknown: {brief_list(unknown)}; missing: {brief_list(missing)}; "
            f"layers that do not fit: {brief_list(misfits)}), expected layer.L.left [d_mlp, r] and layer.L.right "
            f"[r, d_model] in floating point for at least one layer; make it again"
        )
    return {
        layer: Factors(left=tensors[f"layer.{layer}.left"], right=tensors[f"layer.{layer}.right"]) for layer in layers
    }


def _misfits(tensors: Mapping[str, Tensor], layers: list[int]) -> list[str]:
    """A phrase for each layer whose factors have shapes or dtypes that do not fit."""
    misfits = []
    for layer in layers:
        left, right = (tensors[f"layer.{layer}.{side}"] for side in SIDES)
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != len(right):
            misfits.append(f"{layer} has left {list(left.shape)} and right {list(right.shape)}")
        elif not left.is_floating_point() or not right.is_floating_point():
            misfits.append(f"{layer} has left in {left.dtype} and right in {right.dtype}")
    return misfits


def _manifest(content: Any, path: str | Path) -> dict[str, Any]:
    """The manifest, checked.

    Raises:
        InputError: a field is of another type; or it does not name the weights that the edit is for.
    """
    check_record(content, ManifestRecord, f"the manifest of {str(path)!r}", "make the edit again")
    if not content.get("model", {}).get("weights_hash"):
        raise InputError(
            f"the manifest of {str(path)!r} does not say which model the edit is for (model.weights_hash is absent); "
            f"expected an edit that mechedit wrote: make it again"
        )
    return content
