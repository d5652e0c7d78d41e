"""Where a result comes from: hashes of files and values, and the fields in which two results must agree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechedit.errors import InputError
from mechedit.files import plain

VERSION = "0.1.0"
BEFORE = {"module": "mlp"}
"""Fields of a provenance that were not always written, with what they would have said."""


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def value_hash(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hex: equal settings give equal hashes."""
    text = json.dumps(value, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


def check_provenance(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    what: str,
    remedy: str = "make it again for this model",
) -> None:
    """Compare the fields of `expected` with those found in an artifact; of older ones, the absent fields are known.

    Raises:
        InputError: names the first field that differs, with both values.
    """
    for field, value in expected.items():
        own = found.get(field, BEFORE.get(field))
        if own != value:
            raise InputError(f"{what} was made with {field} = {own!r}, expected {value!r}; {remedy}")
