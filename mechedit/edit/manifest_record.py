"""The manifest of an edit as its file holds it: every field that is read by name, with its type."""

from __future__ import annotations

from typing import Annotated, Any, Required

from pydantic import Field
from typing_extensions import TypedDict

from mechedit.records import ModelRecord, Number, Whole


class LayerRecord(TypedDict, total=False):
    """How one layer was written."""

    layer: Required[Whole]
    before: Required[Number]
    after: Required[Number]
    error: Number | None
    condition: Number | None


class TruncationRecord(TypedDict, total=False):
    """How far one layer's update was cut to fewer terms."""

    layer: Required[Whole]
    rank: Whole
    of: Whole
    error: Number


class TrainingRecord(TypedDict, total=False):
    """How a fine-tuning went."""

    losses: Required[Annotated[list[Number], Field(min_length=1)]]
    final_loss: Required[Number]
    stopped_early: Required[bool]
    updates: Whole


class SourceRecord(TypedDict):
    """A file from which settings come."""

    source: str
    hash: str
    settings: list[str]


class ManifestRecord(TypedDict, total=False):
    """What made an edit, and for which model. Older files lack some of it."""

    method: str | None
    mechedit: str
    layers: list[Whole]
    model: ModelRecord
    made_on: str
    requests: list[str]
    facts: list[str]
    prefixes: list[str]
    targets: dict[str, Any]
    settings: dict[str, Any]
    settings_from: list[SourceRecord] | None
    residuals: list[LayerRecord]
    left: list[Number | None]
    unconverged: list[str]
    probability: list[Number | None]
    training: TrainingRecord
    truncated: list[TruncationRecord]
    parts: list[ManifestRecord]
    warnings: list[str]
