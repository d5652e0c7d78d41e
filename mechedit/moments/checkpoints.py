"""Checkpoints: one layer's sum over one process's shards, as far as it has come.

A file a layer and share, `moments/parts/layer_L.shard_I_of_N.safetensors`, replaced whole each time. A killed run
reads it and goes on from its place, adding the same batches in the same order.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechedit.errors import InputError
from mechedit.files import read_tensors, write_tensors
from mechedit.moments.accumulator import MomentAccumulator
from mechedit.moments.convergence import Convergence, Curve
from mechedit.moments.second_moment import KEY
from mechedit.moments.shards import START, Place, Share
from mechedit.provenance import check_provenance

SPENT = 0.02
"""Most of the time that goes into writing checkpoints."""
SAME_KEYS = ("model", "backend", "mechedit", "count")
"""Another backend or release of mechedit, or another name for the same weights, gives the same keys."""


@dataclass(kw_only=True, eq=False)
class Part:
    """One layer's sum over a share of the text."""

    layer: int
    share: Share
    fitter: MomentAccumulator
    provenance: Mapping[str, Any]
    read: tuple[int, ...]
    """Layers whose keys were read in the same runs: a run that reads others may round differently."""
    place: Place = START
    done: bool = False
    curve: Curve | None = None

    def save(self, folder: Path) -> Path:
        """Write the checkpoint, atomically."""
        path = part_path(folder, self.layer, self.share)
        header = {
            **self.provenance,
            "layer": self.layer, "count": self.fitter.count, "share": self.share, "place": self.place,
            "done": self.done, "read": self.read,
        }  # fmt: skip
        tensors = {"total": self.fitter.total}
        if self.curve is not None:
            rows = [[None if value != value else value for value in row] for row in self.curve.rows]
            header["curve"] = {"rows": rows, "count": self.curve.count, "settings": self.curve.settings.plain()}
            kept = {"keys": self.curve.keys, "matrix": self.curve.matrix, "update": self.curve.update}
            tensors |= {name: tensor for name, tensor in kept.items() if tensor is not None}
        write_tensors(path, tensors, KEY, header)
        return path

    def remove(self, folder: Path) -> None:
        """Remove the checkpoint, and the folder when it is the last."""
        part_path(folder, self.layer, self.share).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            part_path(folder, self.layer, self.share).parent.rmdir()


def load_part(path: Path, device: torch.device | str, convergence: Convergence | None = None) -> Part:
    """Read a checkpoint, with its curve when the settings of that are given.

    Raises:
        InputError: it is absent, damaged or not a checkpoint.
    """
    tensors, header = read_tensors(path, KEY)
    if "total" not in tensors or not {"layer", "count", "share", "place", "done", "read"} <= header.keys():
        raise InputError(f"{str(path)!r} is not a checkpoint of mechedit moments; remove it")
    own = ("share", "place", "done", "read", "curve", "layer", "count")
    fitter = MomentAccumulator(len(tensors["total"]), device)
    fitter.total, fitter.count = tensors["total"].to(device), header["count"]
    part = Part(
        layer=header["layer"],
        share=Share(*header["share"]),
        fitter=fitter,
        provenance={name: value for name, value in header.items() if name not in own},
        read=tuple(header["read"]),
        place=Place(*header["place"]),
        done=header["done"],
    )
    if convergence is not None and "curve" in header:
        part.curve = _curve(tensors, header["curve"], convergence, device)
    return part


def _curve(
    tensors: Mapping[str, Tensor], kept: Mapping[str, Any], settings: Convergence, device: torch.device | str
) -> Curve:
    curve = Curve(tensors["keys"], settings)
    curve.count = kept["count"]
    curve.rows = [[float("nan") if value is None else value for value in row] for row in kept["rows"]]
    curve.matrix, curve.update = (
        tensors[name].to(device) if name in tensors else None for name in ("matrix", "update")
    )
    return curve


def parts_folder(folder: str | Path) -> Path:
    """Where the checkpoints of a results folder lie."""
    return Path(folder) / "moments" / "parts"


def part_path(folder: str | Path, layer: int, share: Share) -> Path:
    """Where one checkpoint lies."""
    return parts_folder(folder) / f"layer_{layer}.shard_{share.index}_of_{share.count}.safetensors"


def check_part(
    header: Mapping[str, Any], provenance: Mapping[str, Any], convergence: Convergence | None, what: str
) -> None:
    """Refuse a checkpoint of another model or text, or of another curve.

    Raises:
        InputError: names the first field that differs.
    """
    fields = {name: value for name, value in provenance.items() if name not in SAME_KEYS}
    remedy = "choose another --out, or pass --overwrite to begin anew"
    check_provenance(header, fields, what, remedy)
    settings = None if convergence is None else convergence.plain()
    check_provenance({"convergence": header.get("curve", {}).get("settings")}, {"convergence": settings}, what, remedy)


def clear_leftovers(folder: str | Path, layer: int, share: Share) -> None:
    """Remove what a killed process left of a checkpoint that it was writing."""
    path = part_path(folder, layer, share)
    for left in path.parent.glob(f".{path.stem}.*{path.suffix}"):
        left.unlink(missing_ok=True)


class Checkpoints:
    """Saves parts when it is time: after `every` seconds, and no more often than `SPENT` of the time allows."""

    def __init__(self, folder: Path | None, every: float | int) -> None:
        """Count from now.

        Args:
            folder: where to; None writes nothing.
            every: seconds between two at least.
        """
        self.folder, self.every = folder, every
        self.last, self.cost = time.monotonic(), 0.0

    def tick(self, parts: Iterable[Part]) -> None:
        """Save the parts if it is time."""
        start = time.monotonic()
        if self.folder is None or start - self.last < max(self.every, self.cost / SPENT):
            return
        for part in parts:
            part.save(self.folder)
        self.last = time.monotonic()
        self.cost = self.last - start
