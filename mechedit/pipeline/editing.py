"""The steps that collect second moments and make the edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from mechedit.cache import Codec, codec_of
from mechedit.data import EditRequest
from mechedit.edit import Edit
from mechedit.methods import METHODS, MethodConfig
from mechedit.models import Model
from mechedit.moments import Convergence, MomentsConfig, SecondMoment, collect_dealt
from mechedit.provenance import value_hash
from mechedit.run_folder import RunFolder

EDIT: Codec[Edit] = codec_of(Edit, suffix=".safetensors")


def moments_step(
    folder: RunFolder,
    model: Model,
    texts: str | Path,
    layers: Sequence[int],
    config: MomentsConfig,
    convergence: Convergence | None = None,
) -> dict[int, SecondMoment]:
    """Collect second moments into moments/; files with the same provenance are reused."""
    return collect_dealt(model, texts, layers, config, folder.path, overwrite=folder.overwrite, convergence=convergence)


def edit_step(
    folder: RunFolder,
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    moments: Mapping[int, SecondMoment],
    method: str,
    config: MethodConfig,
    file: str = "edit.safetensors",
    sourced: Callable[[Edit], Edit] = lambda edit: edit,
) -> Edit:
    """Make the edit with a named method; the model is left as it was.

    `sourced` notes in its manifest where its settings come from.
    """
    stamp = {**edit_stamp(model, requests, moments, method, config), "layers": list(layers)}
    make = partial(METHODS[method], model, requests, layers, moments, config=config, cache=folder.path / "targets")
    return folder.step("edit", stamp, lambda: sourced(make()), EDIT, at=file)


def edit_stamp(
    model: Model,
    requests: Sequence[EditRequest],
    moments: Mapping[int, SecondMoment],
    method: str,
    config: MethodConfig,
) -> dict[str, Any]:
    """Stamp fields that edits and sweeps share."""
    return {
        "model": model.provenance(),
        "requests": value_hash([request.plain() for request in requests]),
        "moments": value_hash({layer: moment.provenance for layer, moment in moments.items()}),
        "method": method,
        "settings": asdict(config),
    }
