"""One batch of a session: what was written, at which keys, and what came of it.

On disk it is one safetensors file with `layer.L.left`, `layer.L.right` and `layer.L.keys`; all else is in its header.
It is there whole or not at all, so a session is never found between two batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.data import EditRequest, Neighbor
from mechedit.edit import Edit, Factors
from mechedit.edit.value import SIDES, check_factors
from mechedit.errors import InputError
from mechedit.files import read_tensors, write_tensors
from mechedit.provenance import value_hash
from mechedit.session.metrics import SCORE_COLUMNS, Measure, frame

KEY = "batch"
"""Where the header lies in the file's metadata."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """What one batch did."""

    number: int
    """From 1."""
    requests: tuple[EditRequest, ...]
    edit: Edit
    """The batch's own, made for the model as the earlier batches left it."""
    keys: Mapping[int, Float[Tensor, "d_mlp fact"]]
    """For each edited layer, those the edit was fitted at, one column a request: what later batches preserve."""
    superseded: tuple[str, ...]
    """Ids of earlier requests that it overwrites."""
    scores: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(SCORE_COLUMNS)))
    """After it, of each request in force: `case, measure, value` (in percent)."""
    measures: tuple[Measure, ...] = ()
    """What the session watches, after it."""
    in_force: int = 0
    """Requests written so far, this batch included, that no later one superseded."""
    refused: str | None = None
    """Why it was taken back; None when it stands."""
    weights_hash: str = ""
    """Of the model with the batch written."""

    @property
    def history(self) -> pd.DataFrame:
        """The measures as a tidy frame (`HISTORY_COLUMNS`)."""
        return frame(self.number, self.in_force, self.measures, refused=self.refused is not None)

    @property
    def asked(self) -> str:
        """The hash of what was asked for."""
        return hash_of(self.requests)

    def save(self, path: str | Path) -> None:
        """Write one file, atomically."""
        tensors = {f"layer.{layer}.keys": keys for layer, keys in self.keys.items()}
        for layer, factors in self.edit.factors.items():
            tensors |= {f"layer.{layer}.{side}": getattr(factors, side) for side in SIDES}
        kept = ("number", "requests", "measures", "in_force", "superseded", "refused", "weights_hash")
        header = {name: getattr(self, name) for name in kept}
        scores = self.scores.to_dict("list")
        write_tensors(path, tensors, KEY, {**header, "scores": scores, "manifest": dict(self.edit.manifest)})

    @staticmethod
    def load(path: str | Path) -> Record:
        """Read what `save` wrote.

        Raises:
            InputError: no such file; cut short; not a batch of a session; factors that are not finite.
        """
        tensors, header = read_tensors(path, KEY)
        try:
            layers = header["manifest"]["layers"]
            sides = {layer: [tensors[f"layer.{layer}.{side}"] for side in SIDES] for layer in layers}
            edit = Edit(
                factors={layer: Factors(left=left, right=right) for layer, (left, right) in sides.items()},
                manifest=header["manifest"],
            )
            record = Record(
                requests=tuple(_request(fields) for fields in header["requests"]),
                edit=edit,
                keys={layer: tensors[f"layer.{layer}.keys"] for layer in layers},
                scores=pd.DataFrame(header["scores"], columns=list(SCORE_COLUMNS)),
                measures=tuple(Measure(*one) for one in header["measures"]),
                superseded=tuple(header["superseded"]),
                **{name: header[name] for name in ("number", "in_force", "refused", "weights_hash")},
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{str(path)!r} is not a batch of a session ({type(error).__name__}: {error}); expected what "
                f"EditSession wrote: remove it and all later ones, and write them again"
            ) from error
        check_factors(edit)
        return record


def hash_of(requests: Sequence[EditRequest]) -> str:
    """The hash by which a batch is known again."""
    return value_hash([dataclasses.asdict(request) for request in requests])


def in_force(records: Sequence[Record]) -> list[EditRequest]:
    """The requests of these batches that no later one superseded."""
    gone = {name for record in records for name in record.superseded}
    return [request for record in records for request in record.requests if request.id not in gone]


def kept_keys(records: Sequence[Record], but: Collection[str] = ()) -> dict[int, Float[Tensor, "d_mlp fact"]]:
    """The keys of `in_force`, in its order, for each edited layer, without those of the ids in `but`.

    Empty when there are none.
    """
    wanted = {request.id for request in in_force(records)} - set(but)
    masks = [torch.tensor([request.id in wanted for request in record.requests]) for record in records]
    return {
        layer: torch.cat([one.keys[layer][:, mask] for one, mask in zip(records, masks, strict=True)], 1)
        for layer in (records[0].keys if wanted else ())
    }


def _request(fields: Mapping[str, Any]) -> EditRequest:
    """A request from its fields as JSON holds them."""
    lists = {name: tuple(fields[name]) for name in ("paraphrases", "attributes", "generations")}
    neighbors = tuple(Neighbor(**neighbor) for neighbor in fields["neighbors"])
    return EditRequest(**{**fields, **lists, "neighbors": neighbors})
