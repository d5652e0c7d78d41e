"""Where a result comes from, and whether two results come from the same model, input and algorithm.

A provenance records more than decides a result: the name that the user gave the model, the backend and the release
of mechedit are written down (`RECORDED`), but a renamed folder or a new release gives the same numbers. Weights,
tokenizer, dtype and the edited module (`ModelIdentity`) decide, and so does the algorithm's number (`ALGORITHMS`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mechedit.errors import InputError, brief
from mechedit.files import plain

VERSION = "0.1.0"
RECORDED = ("mechedit", "model", "backend")
"""Fields of a model's provenance that are written down and decide nothing: release, name and backend."""
ALGORITHMS = {
    "trace": 2,
    "estimates": 2,
    "moments": 1,
    "targets": 5,
    "edit": 4,
    "sweep": 4,
    "finals": 4,
    "baseline": 3,
    "baseline_zsre": 2,
    "evaluate": 3,
    "session": 4,
}
"""Number of each artifact's algorithm. Raise one by hand when a change of the code changes that artifact's numbers:
results of another number are not reused. Results without a number are of algorithm 1.

2: an object's tokens are those that it has behind its prompt, not behind a space. Of estimates (approximate traces):
noise samples are dealt over the points.
3: the learning rate of the search for z and λ are in relative units by default, and a search has converged when the
object is the likeliest answer. Of scores: the sentence of an edit whose object ends in a dot has one dot.
4: the unit of the learning rate is a typical coordinate, and what is written through a norm is the nearest output that
it can give.
5: h, to which δ is added, is that of the bare prompt, also where the first context template is another."""
DEFAULTS: dict[str, Any] = {"module": "mlp", "algorithm": 1}
"""Values assumed where an older artifact lacks the field."""
CAST_HASHES = "weights_hash_as"
"""Where an edit's manifest, under `model`, has the hashes of the same weights in other dtypes, by dtype."""
MAKE_AGAIN = "make it again for this model"


@dataclass(frozen=True)
class ModelIdentity:
    """Weights, tokenizer, dtype and edited module: equal for two results of the same model; see `Model.identity`."""

    dtype: str | None
    """Dtype of the weights, without `torch.`. It stands first, since the weights of another dtype differ too."""
    tokenizer: str | None
    """SHA-256 of the tokenizer."""
    weights: str | None
    """SHA-256 of all parameters."""
    module: str
    """What edits are written into: `mlp` or `attn`."""

    @staticmethod
    def of(provenance: Mapping[str, Any]) -> ModelIdentity:
        """The identity in a provenance; fields that it lacks are None, and the module `mlp`."""
        return ModelIdentity(
            dtype=provenance.get("dtype"),
            tokenizer=provenance.get("tokenizer_hash"),
            weights=provenance.get("weights_hash"),
            module=provenance.get("module", DEFAULTS["module"]),
        )

    @property
    def record(self) -> dict[str, str | None]:
        """The identity as a provenance holds it."""
        return {key: getattr(self, name) for name, key in _KEYS.items()}

    def require(
        self, identity: ModelIdentity, what: str, remedy: str = MAKE_AGAIN, *, ignoring: Collection[str] = ()
    ) -> None:
        """Refuse a result of another model than this one.

        Args:
            identity: of the model that the result was made with.
            what: names the result in the message.
            remedy: what to do about it.
            ignoring: fields that may differ.

        Raises:
            InputError: names the first field that differs, with both values.
        """
        compared = [field.name for field in fields(self) if field.name not in ignoring]
        check_provenance(identity.record, {_KEYS[name]: getattr(self, name) for name in compared}, what, remedy)


_KEYS = {"weights": "weights_hash", "tokenizer": "tokenizer_hash", "dtype": "dtype", "module": "module"}
"""The names of an identity's fields in files."""


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def value_hash(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hex: equal settings give equal hashes."""
    text = json.dumps(value, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


def determining(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A provenance without the fields that are only recorded (`RECORDED`)."""
    return {name: value for name, value in provenance.items() if name not in RECORDED}


def numbered(artifact: str, key: Mapping[str, Any]) -> dict[str, Any]:
    """A key with the number of the artifact's algorithm.

    Number 1 is left out, so that what was made before there were numbers keeps its key.
    """
    number = ALGORITHMS[artifact]
    return dict(key) if number == DEFAULTS["algorithm"] else {**key, "algorithm": number}


def check_provenance(
    provenance: Mapping[str, Any], expected: Mapping[str, Any], what: str, remedy: str = MAKE_AGAIN
) -> None:
    """Compare the fields of `expected` with those of an artifact; `DEFAULTS` fills in what older artifacts lack.

    Raises:
        InputError: names the first field that differs, with both values.
    """
    for field, value in expected.items():
        recorded = provenance.get(field, DEFAULTS.get(field.rpartition(".")[2]))
        if recorded != value:
            raise InputError(f"{what} was made with {field} = {brief(recorded)}, expected {brief(value)}; {remedy}")
