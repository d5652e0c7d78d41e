"""A cache of target results: one file per subject group, under the hash of all that determines them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from mechedit.cache import Cache, Codec
from mechedit.data import EditRequest
from mechedit.errors import InputError, brief
from mechedit.files import read_object, read_tensors, write_json, write_tensors
from mechedit.provenance import ModelIdentity, numbered, value_hash
from mechedit.records import check_record
from mechedit.targets.config import TargetConfig
from mechedit.targets.objective import TERMS

NOT_FINITE = "not finite"
"""Why a search stopped whose loss was not finite."""
UNFINISHED = ".batch.json"
"""Suffix of the note that a batch's results are being written."""
METADATA_KEY = "targets"
"""Metadata entry of a file that holds its header."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetResult:
    """The result of the search for one fact."""

    z: Float[Tensor, " d_model"]
    """h + δ at the subject's last token."""
    initial: Float[Tensor, " d_model"]
    """h, the clean state there."""
    terms: Float[Tensor, "step term"]
    """`TERMS` at every step."""
    stopped: str
    """Why the search ended."""

    @property
    def converged(self) -> bool:
        """Whether the object is the likeliest answer behind all prefixes, every one of its tokens, with z written."""
        return self.stopped != NOT_FINITE and float(self.terms[-1, TERMS.index("margin")]) > 0

    @property
    def norm_ratio(self) -> float:
        """‖δ‖ / ‖h‖."""
        return float((self.z - self.initial).norm() / self.initial.norm())


def terms_by_step(results: Mapping[str, TargetResult]) -> pd.DataFrame:
    """`TERMS` of every fact at every step, one row each."""
    steps = [len(result.terms) for result in results.values()]
    terms = torch.cat([result.terms for result in results.values()]).double().numpy()
    return pd.DataFrame(
        {
            "id": np.repeat(np.array(list(results), dtype=object), steps),
            **dict(zip(TERMS, terms.T, strict=True)),
            "step": np.concatenate([np.arange(count) for count in steps]),
        }
    )


@dataclass(frozen=True, kw_only=True)
class TargetCache:
    """Cached results for one model, layer, set of prefixes and settings."""

    cache: Cache
    made_with: Mapping[str, Any]
    """All that determines the results, except the requests: weights, tokenizer, dtype, layer, prefixes, settings."""

    @staticmethod
    def at(
        folder: str | Path | None,
        provenance: Mapping[str, Any],
        layer: int,
        prefixes: Sequence[str],
        config: TargetConfig,
    ) -> TargetCache:
        """The cache in a folder.

        Args:
            folder: the folder of the files; None for a cache that stores nothing.
            provenance: provenance of the model.
            layer: 0-based block of z.
            prefixes: context templates.
            config: settings of the search.
        """
        # The first two change which prompts run together, but no fact's loss; the others the prefixes, which are given.
        settings = {
            name: value
            for name, value in dataclasses.asdict(config).items()
            if name not in ("batch_size", "pass_tokens", "seed", "generated_prefixes")
            # Only one of the learning rates is used.
            and name != ("lr" if config.lr is None else "relative_lr")
            # Without a margin, results keep the key that they had before there was one.
            and not (name == "margin" and value is None)
        }
        model = ModelIdentity.of(provenance).record
        if config.part == "resid":
            # A state of the residual stream is the same whichever module is written.
            del model["module"]
        made_with = numbered("targets", {**model, "layer": layer, "prefixes": list(prefixes), "settings": settings})
        return TargetCache(cache=Cache.at(folder), made_with=made_with)

    def key(self, group: Sequence[EditRequest]) -> str:
        """The hash of all that determines the results of one subject group."""
        requests = [
            (request.subject, request.prompt, request.target_new, *_surroundings(request.plain())) for request in group
        ]
        return value_hash({**self.made_with, "requests": requests})

    def read(self, groups: Sequence[Sequence[EditRequest]]) -> dict[str, list[TargetResult]]:
        """The cached results among `groups`, by key; but for those of a batch that was not written to its end.

        Those that are searched for together round together: the rest of a batch alone would give other bits.
        """
        halves = {key for keys in self._unfinished().values() for key in keys}
        cached = {key: self.cache.read(key, RESULTS) for key in map(self.key, groups) if key not in halves}
        return {key: results for key, results in cached.items() if results is not None}

    def write(self, groups: Sequence[Sequence[EditRequest]], results: Sequence[Sequence[TargetResult]]) -> None:
        """Store the results of each group, which were searched for together, in a file of its own."""
        keys = [self.key(group) for group in groups]
        if self.cache.folder is not None and len(keys) > 1:
            write_json(self.cache.folder / f"{value_hash(keys)[:32]}{UNFINISHED}", {"keys": keys})
        for key, group_results in zip(keys, results, strict=True):
            self.cache.write(key, list(group_results), RESULTS)
        for path, of_batch in self._unfinished().items():
            if set(of_batch) & set(keys):
                path.unlink(missing_ok=True)

    def _unfinished(self) -> dict[Path, list[str]]:
        """The notes of batches that are being written, or were when their process was killed, and their keys."""
        notes: dict[Path, list[str]] = {}
        for path in [] if self.cache.folder is None else self.cache.folder.glob(f"*{UNFINISHED}"):
            with contextlib.suppress(InputError):  # another process may have removed its note by now
                content = read_object(path)
                check_record(content, UnfinishedRecord, repr(str(path)), "remove it")
                notes[path] = content["keys"]
        return notes


class UnfinishedRecord(TypedDict):
    """A note on a batch whose results are being written: their keys."""

    keys: list[str]


class ResultsRecord(TypedDict):
    """The header of a group's file: why each search ended, and after how many steps."""

    stopped: list[str]
    steps: list[Annotated[int, Field(ge=1)]]


def _write(path: Path, results: list[TargetResult]) -> None:
    tensors = {
        "z": torch.stack([result.z for result in results]),
        "initial": torch.stack([result.initial for result in results]),
        "terms": torch.cat([result.terms for result in results]),
    }
    header = {"stopped": [result.stopped for result in results], "steps": [len(result.terms) for result in results]}
    write_tensors(path, tensors, METADATA_KEY, header)


def _read(path: Path) -> list[TargetResult]:
    tensors, header = read_tensors(path, METADATA_KEY)
    check_record(header, ResultsRecord, f"the header of {str(path)!r}", "remove the file")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    count, width = len(header["steps"]), shapes.get("z", [0])[-1:]
    expected = {"z": [count, *width], "initial": [count, *width], "terms": [sum(header["steps"]), len(TERMS)]}
    if shapes != expected or len(header["stopped"]) != count:
        raise InputError(
            f"{str(path)!r} holds tensors of the shapes {brief(shapes)} for {count} facts, expected {brief(expected)}; "
            f"remove the file"
        )
    terms = tensors["terms"].split(header["steps"])
    return [
        TargetResult(z=tensors["z"][i], initial=tensors["initial"][i], terms=terms[i], stopped=stopped)
        for i, stopped in enumerate(header["stopped"])
    ]


RESULTS = Codec(read=_read, write=_write, suffix=".safetensors")
"""File format of the results of one subject group."""


def _surroundings(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The joint and the turn of a request's record, if it has any: a request without keeps the key it always had."""
    surroundings = {name: record[name] for name in ("joint", "turn") if name in record}
    return [surroundings] if surroundings else []
