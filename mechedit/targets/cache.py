"""What was found, kept in a folder under the hash of all that determines it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.data import EditRequest
from mechedit.files import read_header, read_tensors, write_tensors
from mechedit.provenance import value_hash
from mechedit.targets.config import TargetConfig
from mechedit.targets.objective import TERMS

KEY = "targets"
"""Where the keys lie in a file's metadata."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """The outcome for one fact."""

    z: Float[Tensor, " d_model"]
    initial: Float[Tensor, " d_model"]
    terms: Float[Tensor, "step term"]
    """`TERMS` at every step."""
    stopped: str
    """Why the search ended."""

    @property
    def norm_ratio(self) -> float:
        """‖δ‖ / ‖h‖."""
        return float((self.z - self.initial).norm() / self.initial.norm())

    def frame(self, name: str) -> pd.DataFrame:
        """One row a step."""
        values = {term: column.tolist() for term, column in zip(TERMS, self.terms.T, strict=True)}
        return pd.DataFrame({"id": name, **values, "step": range(len(self.terms))})


@dataclass(frozen=True, kw_only=True)
class Store:
    """A folder of finished searches; without one, nothing is kept."""

    folder: Path | None
    made_with: Mapping[str, Any]
    """What determines all of them: weights, tokenizer, dtype, layer, prefixes, settings."""

    @staticmethod
    def at(
        folder: str | Path | None,
        provenance: Mapping[str, Any],
        layer: int,
        prefixes: Sequence[str],
        config: TargetConfig,
    ) -> Store:
        """The store of one model, layer, set of prefixes and settings."""
        # Of the settings, these change which facts and rows run together, but no fact's loss; the prefixes are given.
        settings = {
            name: value
            for name, value in dataclasses.asdict(config).items()
            if name not in ("batch_size", "pass_tokens", "seed")
        }
        own = {field: provenance[field] for field in ("weights_hash", "tokenizer_hash", "dtype")}
        if config.part != "resid" and provenance["module"] != "mlp":
            # A state of the residual stream is the same whatever is written; and what was found before stays valid.
            own["module"] = provenance["module"]
        made_with = {**own, "layer": layer, "prefixes": list(prefixes), "settings": settings}
        return Store(folder=None if folder is None else Path(folder), made_with=made_with)

    def key(self, unit: Sequence[EditRequest]) -> str:
        """The hash of all that determines what is found for requests that share a δ."""
        asked = [(request.subject, request.prompt, request.target_new) for request in unit]
        return value_hash({**self.made_with, "requests": asked})

    def read(self, units: Sequence[Sequence[EditRequest]]) -> dict[str, list[Found]]:
        """What is there of `units`, by key."""
        wanted = {self.key(unit) for unit in units}
        found: dict[str, list[Found]] = {}
        for file in sorted(self.folder.glob("*.safetensors")) if self.folder and self.folder.is_dir() else ():
            if wanted & set(read_header(file, KEY)["keys"]):
                found |= {key: facts for key, facts in _read(file).items() if key in wanted}
        return found

    def write(self, units: Sequence[Sequence[EditRequest]], found: Sequence[Sequence[Found]]) -> None:
        """Keep what was found for `units`, in one file, atomically."""
        if self.folder is None:
            return
        facts = [one for unit in found for one in unit]
        header = {
            "keys": [key for unit, own in zip(units, found, strict=True) for key in [self.key(unit)] * len(own)],
            "stopped": [one.stopped for one in facts],
            "steps": [len(one.terms) for one in facts],
        }
        tensors = {
            "z": torch.stack([one.z for one in facts]),
            "initial": torch.stack([one.initial for one in facts]),
            "terms": torch.cat([one.terms for one in facts]),
        }
        write_tensors(self.folder / f"{value_hash(header['keys'])[:32]}.safetensors", tensors, KEY, header)


def _read(file: Path) -> dict[str, list[Found]]:
    tensors, header = read_tensors(file, KEY)
    found: dict[str, list[Found]] = {}
    terms = tensors["terms"].split(header["steps"])
    for i, (key, stopped) in enumerate(zip(header["keys"], header["stopped"], strict=True)):
        one = Found(z=tensors["z"][i], initial=tensors["initial"][i], terms=terms[i], stopped=stopped)
        found.setdefault(key, []).append(one)
    return found
