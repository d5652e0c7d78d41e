"""`EditedBatch`: one batch of a session, with its edit, its keys and what was measured after it.

On disk it is one safetensors file with `layer.L.left`, `layer.L.right` and `layer.L.keys`; all else is in its header.
The file is written atomically, so a killed session always resumes between two batches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import TypedDict

from mechedit.data import EditRequest
from mechedit.edit import Edit
from mechedit.edit.edit import SIDES, check_factors, factors_of
from mechedit.edit.manifest_record import ManifestRecord
from mechedit.errors import InputError, first_line
from mechedit.files import read_tensors, write_tensors
from mechedit.provenance import value_hash
from mechedit.records import Number, Whole, check_record, read_record
from mechedit.session.metrics import SCORE_COLUMNS, HistoryEntry, history_frame

METADATA_KEY = "batch"
"""Key of the header in the file's metadata."""


class ScoresRecord(TypedDict):
    """Scores of the active requests, by column."""

    case: list[str]
    measure: list[str]
    value: list[Number | None]


class BatchRecord(TypedDict):
    """The header of a batch's file."""

    number: Whole
    requests: list[dict[str, Any]]
    measures: list[HistoryEntry]
    in_force: Whole
    superseded: list[str]
    refused: str | None
    weights_hash: str
    scores: ScoresRecord
    manifest: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class EditedBatch:
    """One batch of requests, accepted or rejected, and the edit that was made for it."""

    number: int
    """Number of the batch in the session, from 1."""
    requests: tuple[EditRequest, ...]
    """The requests that were written."""
    edit: Edit
    """The edit of this batch alone, made for the model as the earlier batches left it."""
    keys: Mapping[int, Float[Tensor, "d_mlp fact"]]
    """Keys that the edit was fitted at, per edited layer, one column per request; later batches preserve them."""
    overridden: tuple[str, ...]
    """Ids of earlier requests that this batch contradicts and replaces."""
    scores: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(SCORE_COLUMNS)))
    """Scores of each active request after this batch: `case, measure, value` (in percent)."""
    entries: tuple[HistoryEntry, ...] = ()
    """Numbers measured after this batch."""
    n_active: int = 0
    """Number of active requests, those of this batch included."""
    rejected: str | None = None
    """Reason why the batch was taken back; None if it was accepted."""
    weights_hash: str = ""
    """Hash of the model's weights with this batch written."""

    @property
    def history(self) -> pd.DataFrame:
        """The entries as a tidy frame (`HISTORY_COLUMNS`)."""
        return history_frame(self.number, self.n_active, self.entries, rejected=self.rejected is not None)

    @property
    def requests_hash(self) -> str:
        """Hash of the requests."""
        return requests_hash(self.requests)

    def save(self, path: str | Path) -> None:
        """Write the batch to one file, atomically."""
        tensors = {f"layer.{layer}.keys": keys for layer, keys in self.keys.items()}
        for layer, factors in self.edit.factors.items():
            tensors |= {f"layer.{layer}.{side}": getattr(factors, side) for side in SIDES}
        header = {
            "number": self.number,
            "requests": self.requests,
            "measures": self.entries,
            "in_force": self.n_active,
            "superseded": self.overridden,
            "refused": self.rejected,
            "weights_hash": self.weights_hash,
            "scores": self.scores.to_dict("list"),
            "manifest": dict(self.edit.manifest),
        }
        write_tensors(path, tensors, METADATA_KEY, header)

    @staticmethod
    def load(path: str | Path) -> EditedBatch:
        """Read a batch that `save` wrote.

        Raises:
            InputError: the file is absent, cut short or not a batch of a session; its factors are not finite.
        """
        tensors, header = read_tensors(path, METADATA_KEY)
        what, remedy = f"the header of {str(path)!r}", "remove it and all later ones, and write them again"
        check_record(header, BatchRecord, what, remedy)
        manifest = header["manifest"]
        check_record(manifest, ManifestRecord, f"the manifest of {str(path)!r}", remedy)
        try:
            if not manifest["model"]["weights_hash"]:
                raise InputError(f"the manifest of {str(path)!r} has no weights_hash of the model; {remedy}")
            keys = {layer: tensors.pop(f"layer.{layer}.keys") for layer in manifest["layers"]}
            edit = Edit(factors=factors_of(tensors, path), manifest=manifest)
            if keys.keys() != edit.factors.keys() or any(keys[layer].ndim != 2 for layer in keys):
                raise InputError(
                    f"{what} names the layers {list(keys)}, but the tensors are of {edit.layers}; {remedy}"
                )
            batch = EditedBatch(
                number=header["number"],
                requests=tuple(read_record(fields, EditRequest, what, remedy) for fields in header["requests"]),
                edit=edit,
                keys=keys,
                overridden=tuple(header["superseded"]),
                scores=pd.DataFrame(header["scores"], columns=list(SCORE_COLUMNS)),
                entries=tuple(HistoryEntry(*entry) for entry in header["measures"]),
                n_active=header["in_force"],
                rejected=header["refused"],
                weights_hash=header["weights_hash"],
            )
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{str(path)!r} is not a batch of a session ({type(error).__name__}: {first_line(error)}); expected "
                f"what EditSession wrote: {remedy}"
            ) from error
        check_factors(edit)
        return batch


def requests_hash(requests: Sequence[EditRequest]) -> str:
    """Hash of some requests, by which a resumed session recognizes a finished batch."""
    return value_hash([request.plain() for request in requests])


def active_requests(batches: Sequence[EditedBatch]) -> list[EditRequest]:
    """The requests of these batches that no later one overrides."""
    overridden = {request_id for batch in batches for request_id in batch.overridden}
    return [request for batch in batches for request in batch.requests if request.id not in overridden]


def active_keys(
    batches: Sequence[EditedBatch], exclude: Collection[str] = ()
) -> dict[int, Float[Tensor, "d_mlp fact"]]:
    """Keys of the active requests, in their order, per edited layer; empty if there are none.

    Args:
        batches: accepted batches.
        exclude: ids of requests whose keys are left out.
    """
    ids = {request.id for request in active_requests(batches)} - set(exclude)
    masks = [torch.tensor([request.id in ids for request in batch.requests], device="cpu") for batch in batches]
    return {
        layer: torch.cat([batch.keys[layer][:, mask] for batch, mask in zip(batches, masks, strict=True)], 1)
        for layer in (batches[0].keys if ids else ())
    }
