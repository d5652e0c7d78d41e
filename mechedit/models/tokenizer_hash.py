"""SHA-256 of a tokenizer: equal for two that give the same tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mechedit.provenance import value_hash

_STATES = 16
"""States of tokenizers whose hashes are remembered."""
_hashes: dict[bytes, str] = {}
"""Hashes by a digest of all that the tokenizer says of itself, which is taken far faster than its canonical JSON."""


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a fast tokenizer, without the padding and truncation that calls leave behind in it."""
    text: str = tokenizer.backend_tokenizer.to_str()
    state = hashlib.sha256(text.encode()).digest()
    if state not in _hashes:
        content: Mapping[str, Any] = json.loads(text)
        canonical = value_hash({key: value for key, value in content.items() if key not in ("padding", "truncation")})
        while len(_hashes) >= _STATES:
            _hashes.pop(next(iter(_hashes)), None)
        _hashes[state] = canonical
        return canonical
    return _hashes[state]
