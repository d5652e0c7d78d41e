"""The value itself: per layer two factors with ΔW = left · right, and a manifest.

On disk it is one safetensors file with `layer.L.left` [d_mlp, r] and `layer.L.right` [r, d_model].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import InputError, check_finite
from mechedit.files import read_tensors, write_tensors
from mechedit.provenance import BEFORE

KEY = "manifest"
"""Where the manifest lies in the file's metadata."""
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
    """A change of some layers' down-projections, or of attention's output projections, apart from any model."""

    factors: Mapping[int, Factors]
    """By 0-based layer."""
    manifest: Mapping[str, Any]
    """What made it: `method`, `layers`, `model` (provenance before the edit), `requests` (ids), `facts` (what each
    request writes, in words; older edits lack it), settings …"""

    @property
    def module(self) -> str:
        """What it is written into: `mlp`, also where an older manifest does not say so, or `attn`."""
        return self.manifest.get("model", {}).get("module", BEFORE["module"])

    @property
    def layers(self) -> list[int]:
        """The edited layers, ascending."""
        return sorted(self.factors)

    def delta(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """ΔW of one layer, in float64.

        Raises:
            InputError: the edit does not touch this layer.
        """
        if layer not in self.factors:
            raise InputError(f"the edit has no layer {layer}, expected one of {self.layers}; choose one of them")
        factors = self.factors[layer]
        return factors.left.double() @ factors.right.double()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically, with the manifest in its header."""
        tensors = {
            f"layer.{layer}.{side}": getattr(factors, side) for layer, factors in self.factors.items() for side in SIDES
        }
        write_tensors(path, tensors, KEY, dict(self.manifest))

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read what `save` wrote.

        Raises:
            InputError: no such file; cut short; not an edit; factors that do not fit each other or are not finite;
                a manifest that does not say which weights the edit is for.
        """
        tensors, manifest = read_tensors(path, KEY)
        edit = cls(factors=_factors(tensors, path), manifest=_manifest(manifest, path))
        check_factors(edit)
        return edit


def same(one: Edit, other: Edit) -> bool:
    """Whether two edits hold the same factors (one may have been saved and loaded)."""
    return one is other or (
        (one.layers, one.module) == (other.layers, other.module)
        and all(
            _equal(getattr(one.factors[layer], side), getattr(other.factors[layer], side))
            for layer in one.layers
            for side in SIDES
        )
    )


def check_factors(edit: Edit) -> None:
    """Refuse factors that are not finite.

    Raises:
        InputError: names the layer and the factor, and says how many of its values.
    """
    for layer, factors in edit.factors.items():
        for side in SIDES:
            check_finite(f"the edit's layer {layer}: the values of its {side} factor", getattr(factors, side))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())


def _factors(tensors: Mapping[str, Tensor], path: str | Path) -> dict[int, Factors]:
    """Pair up an edit file's tensors, or say what is wrong with them."""
    names = {name: re.fullmatch(r"layer\.(0|[1-9]\d*)\.(left|right)", name) for name in tensors}
    strange = sorted(name for name, match in names.items() if match is None)
    layers = sorted({int(match[1]) for match in names.values() if match})
    wanted = [f"layer.{layer}.{side}" for layer in layers for side in SIDES]
    lacking = [name for name in wanted if name not in tensors]
    misfits = [] if lacking else _misfits(tensors, layers)
    if strange or lacking or not layers or misfits:
        raise InputError(
            f"{str(path)!r} is not an edit (unknown: {strange or 'none'}; missing: {lacking or 'none'}; layers that "
            f"do not fit: {'; '.join(misfits) or 'none'}), expected layer.L.left [d_mlp, r] and layer.L.right "
            f"[r, d_model] in floating point for at least one layer; make it again"
        )
    return {
        layer: Factors(left=tensors[f"layer.{layer}.left"], right=tensors[f"layer.{layer}.right"]) for layer in layers
    }


def _misfits(tensors: Mapping[str, Tensor], layers: list[int]) -> list[str]:
    """What is wrong with the shapes and dtypes of each layer's factors."""
    found = []
    for layer in layers:
        left, right = (tensors[f"layer.{layer}.{side}"] for side in SIDES)
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != len(right):
            found.append(f"{layer} has left {list(left.shape)} and right {list(right.shape)}")
        elif not left.is_floating_point() or not right.is_floating_point():
            found.append(f"{layer} has left in {left.dtype} and right in {right.dtype}")
    return found


def _manifest(found: Any, path: str | Path) -> dict[str, Any]:
    """The manifest, once it is clear that it names the weights it is for."""
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, dict) or not model.get("weights_hash"):
        raise InputError(
            f"the manifest of {str(path)!r} does not say which model the edit is for (model.weights_hash is absent); "
            f"expected an edit that mechedit wrote: make it again"
        )
    return found
