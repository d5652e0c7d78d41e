"""Checkpoints: the running sum of one layer over the chunks that one process reads.

Each is a file of its own, `moments/parts/layer_L.shard_I_of_N.safetensors` for process I of N, replaced as a whole
each time. A killed run loads it and goes on from its position, adding the same batches in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required

import torch
from torch import Tensor
from typing_extensions import TypedDict

from mechedit.errors import InputError
from mechedit.files import read_tensors, write_tensors
from mechedit.locks import locked
from mechedit.moments.accumulator import MomentAccumulator
from mechedit.moments.chunks import START, TextPosition
from mechedit.moments.convergence import Convergence, ConvergenceTracker
from mechedit.moments.second_moment import METADATA_KEY, MomentRecord, check_header
from mechedit.provenance import check_provenance
from mechedit.records import Number, Whole, check_record
from mechedit.shards import Rank
from mechedit.temporary_names import sweep

PROGRESS_FIELDS = ("share", "place", "done", "read")
"""Fields of a checkpoint's header that say how far it has come, and not what it is of."""


class CurveRecord(TypedDict):
    """The convergence curve of a checkpoint so far."""

    rows: list[tuple[Number | None, Number | None, Number | None]]
    count: Whole
    settings: dict[str, Any]


class CheckpointRecord(MomentRecord, total=False):
    """The header of a checkpoint: that of a moment, and how far it has come."""

    share: Required[tuple[Whole, Whole]]
    place: Required[tuple[Whole, Whole, Whole]]
    done: Required[bool]
    read: Required[list[Whole]]
    curve: CurveRecord


@dataclass(kw_only=True, eq=False)
class Checkpoint:
    """One layer's sum over the chunks of one process, as far as it has come."""

    layer: int
    rank: Rank
    """Process whose chunks are summed."""
    accumulator: MomentAccumulator
    provenance: Mapping[str, Any]
    layers_read: tuple[int, ...]
    """Layers whose keys are read in the same runs; reading others may round differently."""
    position: TextPosition = START
    """Position from which reading goes on."""
    done: bool = False
    """Whether all chunks of the process are summed."""
    tracker: ConvergenceTracker | None = None
    """Convergence curve of the layer, if one is measured."""

    def save(self, folder: Path) -> Path:
        """Write the checkpoint atomically, and return its path."""
        path = checkpoint_path(folder, self.layer, self.rank)
        header = {
            **self.provenance,
            "layer": self.layer, "count": self.accumulator.count, "share": self.rank, "place": self.position,
            "done": self.done, "read": self.layers_read,
        }  # fmt: skip
        tensors = {"total": self.accumulator.total}
        if self.tracker is not None:
            # JSON holds no NaN.
            rows = [[None if value != value else value for value in row] for row in self.tracker.changes]
            settings = self.tracker.settings.as_json()
            header["curve"] = {"rows": rows, "count": self.tracker.count, "settings": settings}
            snapshot = {"keys": self.tracker.keys, "matrix": self.tracker.matrix, "update": self.tracker.update}
            tensors |= {name: tensor for name, tensor in snapshot.items() if tensor is not None}
        write_tensors(path, tensors, METADATA_KEY, header)
        return path

    def remove(self, folder: Path) -> None:
        """Delete the checkpoint's file, and the folder of checkpoints when that is then empty."""
        remove_checkpoint(folder, self.layer, self.rank)


def load_checkpoint(path: Path, device: torch.device | str, convergence: Convergence | None = None) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: its file.
        device: where its sum is kept.
        convergence: settings of the convergence curve; without them the curve is not read.

    Raises:
        InputError: the file is absent, damaged or not a checkpoint.
    """
    tensors, header = read_tensors(path, METADATA_KEY)
    check_record(header, CheckpointRecord, f"the header of {str(path)!r}", "remove the file")
    width = len(tensors["total"]) if "total" in tensors and tensors["total"].ndim else 0
    if not width or tensors["total"].shape != (width, width):
        raise InputError(f"{str(path)!r} is not a checkpoint of mechedit moments; remove it")
    accumulator = MomentAccumulator(len(tensors["total"]), device)
    accumulator.total, accumulator.count = tensors["total"].to(device), header["count"]
    fields = ("layer", "count", "curve", *PROGRESS_FIELDS)
    checkpoint = Checkpoint(
        layer=header["layer"],
        rank=Rank(*header["share"]),
        accumulator=accumulator,
        provenance={name: value for name, value in header.items() if name not in fields},
        layers_read=tuple(header["read"]),
        position=TextPosition(*header["place"]),
        done=header["done"],
    )
    if convergence is not None and "curve" in header:
        if "keys" not in tensors or tensors["keys"].ndim != 2 or len(tensors["keys"]) != width:
            raise InputError(f"{str(path)!r} lacks the keys of its convergence curve; remove it")
        checkpoint.tracker = _load_tracker(tensors, header["curve"], convergence, device)
    return checkpoint


def _load_tracker(
    tensors: Mapping[str, Tensor], curve: Mapping[str, Any], settings: Convergence, device: torch.device | str
) -> ConvergenceTracker:
    tracker = ConvergenceTracker(tensors["keys"], settings)
    tracker.count = curve["count"]
    tracker.changes = [[float("nan") if value is None else value for value in row] for row in curve["rows"]]
    tracker.matrix, tracker.update = (
        tensors[name].to(device) if name in tensors else None for name in ("matrix", "update")
    )
    return tracker


def remove_checkpoint(folder: str | Path, layer: int, rank: Rank) -> None:
    """Delete the file of a checkpoint, if it is there, and the folder of checkpoints when that is then empty."""
    checkpoint_path(folder, layer, rank).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        checkpoints_folder(folder).rmdir()


def checkpoints_folder(folder: str | Path) -> Path:
    """Folder of the checkpoints in a results folder."""
    return Path(folder) / "moments" / "parts"


def shard_lock(
    folder: str | Path, layer: int, rank: Rank, *, made_with: str | None = None
) -> contextlib.AbstractContextManager[None]:
    """The lock of one layer's and process's checkpoint, and of the moment where that is the only process.

    Args:
        folder: results folder.
        layer: layer of the sum.
        rank: process whose chunks are summed.
        made_with: hash of the model, the text and the settings.
    """
    name = f"moments_layer_{layer}.shard_{rank.index}_of_{rank.world_size}"
    what = f"the shard {rank.index}/{rank.world_size} of" if rank.world_size > 1 else "the second moment of"
    return locked(Path(folder) / name, f"{what} layer {layer} in {str(folder)!r}", made_with=made_with)


def checkpoint_path(folder: str | Path, layer: int, rank: Rank) -> Path:
    """Path of one layer's and process's checkpoint in a results folder."""
    return checkpoints_folder(folder) / f"layer_{layer}.shard_{rank.index}_of_{rank.world_size}.safetensors"


def check_checkpoint(
    header: Mapping[str, Any], provenance: Mapping[str, Any], convergence: Convergence | None, what: str
) -> None:
    """Refuse a checkpoint of another model or text, or with another convergence curve.

    Raises:
        InputError: names the first field that differs.
    """
    remedy = "choose another --out, or pass --overwrite to begin anew"
    check_header(header, provenance, what, remedy)
    settings = None if convergence is None else convergence.as_json()
    check_provenance({"convergence": header.get("curve", {}).get("settings")}, {"convergence": settings}, what, remedy)


def sweep_moments(folder: str | Path) -> None:
    """Remove what killed processes left where moments and checkpoints are written in a results folder."""
    parts = checkpoints_folder(folder)
    sweep([parts, parts.parent])


def remove_temporary_files(folder: str | Path, layer: int, rank: Rank) -> None:
    """Remove what a process left that was killed while it wrote a checkpoint, also by names without a process."""
    sweep_moments(folder)
    path = checkpoint_path(folder, layer, rank)
    for temporary in path.parent.glob(f".{path.stem}.*{path.suffix}"):
        if temporary.is_file():
            temporary.unlink(missing_ok=True)
