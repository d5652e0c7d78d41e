"""SHA-256 of a tokenizer: equal for two that give the same tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mechedit.provenance import value_hash


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a fast tokenizer, without the padding and truncation that calls leave behind in it."""
    content: Mapping[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return value_hash({key: value for key, value in content.items() if key not in ("padding", "truncation")})
