"""The layer ranges that papers and their code use, by model, with the source of each.

They are for comparison, not to be followed: most were chosen by eye or copied from a model of similar size, and some
contradict each other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("published.json")


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


def published_ranges(model: str) -> list[PublishedRange]:
    """Ranges published for a model, MEMIT's first; none when it is not in the registry.

    Args:
        model: a hub name, a folder or a short name. Its last part counts, without case; a model and its chat or
            instruction-tuned form count as one, and each range names the model that it was published for.
    """
    name = canonical(model)
    return [entry for names, entry in _registry() if name in names]


def canonical(model: str) -> str:
    """The name without organization, case, and the endings that mark a tuned or converted copy."""
    name = model.replace("\\", "/").rstrip("/").rpartition("/")[2].lower().replace("_", "-")
    endings = ("-hf", "-chat", "-instruct", "-it", "-base", "-v0.1")
    while name.endswith(endings):
        name = name.removesuffix(next(ending for ending in endings if name.endswith(ending)))
    return name.removeprefix("meta-")


@cache
def _registry() -> tuple[tuple[frozenset[str], PublishedRange], ...]:
    """Each range with the canonical names of its model."""
    models = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(
        (
            frozenset(map(canonical, (name, *content["names"]))),
            PublishedRange(
                model=entry.get("model", name),
                method=entry["method"],
                layers=tuple(range(entry["first"], entry["last"] + 1)) if "first" in entry else tuple(entry["layers"]),
                source=entry["source"],
                note=entry.get("note", ""),
            ),
        )
        for name, content in models.items()
        for entry in content["ranges"]
    )
