"""The layers and settings that papers and their code edit with, by model, with the source of each.

`settings.json` holds them: those of ROME, MEMIT, PMET and AlphaEdit, and the presets of collections such as EasyEdit
and EAMET. Most were chosen by eye or copied from a model of similar size, and some contradict each other, which their
notes say. They are in the published code's units, so that `convention` is memit-2022 with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mechedit.arguments import checked

FILE = Path(__file__).with_name("settings.json")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Architecture and size: what tells models apart where their names do not."""

    type: str
    """`config.model_type` of transformers."""
    layers: int
    d_model: int
    d_mlp: int


@dataclass(frozen=True, kw_only=True)
class PublishedRange:
    """The layers that a paper or its code edits in a model."""

    model: str
    """The model as the source calls it."""
    method: str
    """Editing method."""
    layers: tuple[int, ...]
    """Counted from 0."""
    source: str
    """Repository and file, or paper and section."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PublishedSettings:
    """The layers and settings that a paper or its code edits a model with."""

    name: str
    """Canonical name of the model; its tuned forms count as one with it."""
    range: PublishedRange
    """Model, method, layers and source."""
    settings: Mapping[str, Any]
    """Settings by their names here, in the published units."""
    shape: Shape | None
    """Architecture and size of the model; None where it is not one of transformers' own."""

    @property
    def method(self) -> str:
        """The method by its name here, such as `ft_l`."""
        return self.range.method.lower().replace("-", "_")

    def in_words(self) -> str:
        """Model, layers and source, with the note."""
        published, layers = self.range, ", ".join(map(str, self.range.layers))
        note = f"; {published.note}" if published.note else ""
        return f"{published.model}, layers {layers} ({published.source}{note})"


@checked
def published_settings(model: str, shape: Shape | None = None, method: str | None = None) -> list[PublishedSettings]:
    """The settings published for a model: by its name, and else by its architecture and size.

    A model of a known name but of another shape is another model. One shape may be that of several models, such as
    Qwen2-7B and Qwen2.5-7B: the settings of all of them are returned, and each says whose they are.

    Args:
        model: a hub name, a folder or a short name, as for `published_ranges`.
        shape: architecture and size; None to go by the name alone.
        method: only those of this method, by its name here.
    """
    name, entries = canonical(model), [(names, entry) for names, entry in _registry() if method in (None, entry.method)]
    by_name = [entry for names, entry in entries if name in names and _may_be(entry.shape, shape)]
    return by_name or [entry for _, entry in entries if shape is not None and entry.shape == shape]


@checked
def published_ranges(model: str) -> list[PublishedRange]:
    """Ranges published for a model, MEMIT's first; none when it is not in the registry.

    Args:
        model: a hub name, a folder or a short name. Its last part counts, without case; a model and its chat or
            instruction-tuned form count as one, and each range names the model that it was published for.
    """
    return [entry.range for entry in published_settings(model)]


def canonical(model: str) -> str:
    """The name without organization, case, and the endings that mark a tuned or converted copy."""
    name = model.replace("\\", "/").rstrip("/").rpartition("/")[2].lower().replace("_", "-")
    endings = ("-hf", "-chat", "-instruct", "-it", "-base", "-v0.1")
    while name.endswith(endings):
        name = name.removesuffix(next(ending for ending in endings if name.endswith(ending)))
    return name.removeprefix("meta-")


def _may_be(published: Shape | None, shape: Shape | None) -> bool:
    """Whether a model of this shape can be the one of that shape; an unknown shape can be any."""
    return published is None or shape is None or published == shape


@cache
def _registry() -> tuple[tuple[frozenset[str], PublishedSettings], ...]:
    """Each entry with the canonical names of its model."""
    models = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(
        (
            frozenset(map(canonical, (name, *content["names"]))),
            PublishedSettings(
                name=canonical(name),
                range=PublishedRange(
                    model=entry.get("model", name),
                    method=entry["method"],
                    layers=tuple(entry["layers"]),
                    source=entry["source"],
                    note=entry.get("note", ""),
                ),
                settings=entry["settings"],
                shape=Shape(**content["shape"]) if "shape" in content else None,
            ),
        )
        for name, content in models.items()
        for entry in content["published"]
    )
