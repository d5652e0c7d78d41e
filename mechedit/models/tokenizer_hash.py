"""SHA-256 of a tokenizer: equal for two that give the same tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mechedit.provenance import value_hash

LEFT_BEHIND = ("padding", "truncation")
"""What calls leave behind in a fast tokenizer: it says nothing of the tokens."""
_AFTER_THEM = ',"added_tokens":'
"""What follows them in a tokenizer's own JSON, which has a dictionary of 262,144 tokens in the rest."""
_STATES = 16
"""States of tokenizers whose hashes are remembered."""
_hashes: dict[bytes, str] = {}
"""Hashes by a digest of all else that the tokenizer says of itself, taken far faster than its canonical JSON."""


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a fast tokenizer, without the padding and truncation that calls leave behind in it."""
    text: str = tokenizer.backend_tokenizer.to_str()
    state = hashlib.sha256(_lasting(text).encode()).digest()
    if state not in _hashes:
        content: Mapping[str, Any] = json.loads(text)
        canonical = value_hash({key: value for key, value in content.items() if key not in LEFT_BEHIND})
        while len(_hashes) >= _STATES:
            _hashes.pop(next(iter(_hashes)), None)
        _hashes[state] = canonical
        return canonical
    return _hashes[state]


def _lasting(text: str) -> str:
    """A tokenizer's JSON without what calls leave behind, if that stands before its tokens."""
    head, separator, rest = text.partition(_AFTER_THEM)
    try:
        content = json.loads(head + "}")
    except ValueError:
        return text
    return json.dumps({key: value for key, value in content.items() if key not in LEFT_BEHIND}) + separator + rest
