"""Editors of MEND for small models."""

from __future__ import annotations

from typing import Any

from mechedit.methods import MendEditor
from mechedit.methods.mend_editor import EditorNetwork
from mechedit.provenance import CAST_HASHES


def editor_of(model: Any, network: EditorNetwork, layers: tuple[int, ...], rank: int = 4) -> MendEditor:
    """An editor of a model that was never trained."""
    record = {
        **model.provenance(), CAST_HASHES: model.cast_hashes(), "layers": list(layers), "rank": rank,
        "d_key": model.d_key, "d_model": model.d_model, "steps": 0, "curve": [],
    }  # fmt: skip
    return MendEditor(network=network, layers=layers, record=record)


def identity_editor(model: Any, layers: tuple[int, ...], rate: float = 1e-4) -> MendEditor:
    """An editor whose edit is a step along the gradient."""
    return editor_of(model, EditorNetwork(model.d_key, model.d_model, len(layers), 4, rate=rate), layers)
