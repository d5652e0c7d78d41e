"""`TunedSettings`: layers and settings that `mechedit tune` chose for a model, and the file that holds them.

`tuned.json` says which model it is of, and holds a section per method: layers, settings, and the evidence for them. It
lies beside the checkpoint that it is of, or in the folder of `tuned_folder`, from where methods take it by themselves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mechedit.cache import cache_folder
from mechedit.edit.applied_edits import applied_edits
from mechedit.errors import InputError, brief, brief_list
from mechedit.files import plain_copy, read_object, write_json
from mechedit.models import Model
from mechedit.notices import warn
from mechedit.paths import expanded_path
from mechedit.provenance import CAST_HASHES, VERSION, ModelIdentity, value_hash
from mechedit.records import ModelRecord, check_record

TUNED_FILE = "tuned.json"
"""Name of the file."""
TUNED_VARIABLE = "MECHEDIT_TUNED"
"""Environment variable with the path of the folder of tuned settings."""
_REMEDY = "tune again, remove the file, or leave it out with --no-tuned"


@dataclass(frozen=True, kw_only=True)
class TunedSettings:
    """What was tuned for one model and method."""

    method: str
    """Name of the method."""
    layers: tuple[int, ...]
    """The layers to edit, 0-based, ascending."""
    settings: Mapping[str, Any]
    """Settings of the method by name; those that were not tuned are absent."""
    record: Mapping[str, Any]
    """The method's section of the file: layers, settings, seed, budget, trials, warnings, and its hash."""
    model: Mapping[str, Any]
    """Provenance of the model, with the hashes of its weights in other dtypes."""
    file: Path
    """The file."""

    @property
    def hash(self) -> str:
        """Hash of all that was measured and chosen, without the seconds that it took."""
        return self.record["hash"]

    @staticmethod
    def load(path: str | Path, method: str) -> TunedSettings:
        """Read the settings of a method.

        Raises:
            InputError: no such file; it is not one that `mechedit tune` wrote, was changed since, or holds another
                method's settings.
        """
        sections = _sections(Path(path))
        if method not in sections["methods"]:
            raise InputError(
                f"{str(path)!r} holds tuned settings of {brief_list(sections['methods'])}, expected {method!r}; tune "
                f"that method, or leave the file out"
            )
        return _of_section(sections["methods"][method], method, sections["model"], Path(path))

    def fits(self, model: Model) -> bool:
        """Whether they were tuned on these weights, in the same dtype or rounded to the model's."""
        return is_of_model(self.model, model)

    def require(self, model: Model) -> None:
        """Refuse settings that were tuned on another model.

        Raises:
            InputError: names what differs.
        """
        if not self.fits(model):
            what, tuned_on = f"{str(self.file)!r}", ModelIdentity.of(self.model)
            unedited_identity(model).require(tuned_on, what, "tune this model, or leave the file out")


def tuned_folder() -> Path:
    """The folder of tuned settings: $MECHEDIT_TUNED, else `tuned` in mechedit's cache folder."""
    if configured := os.environ.get(TUNED_VARIABLE):
        return expanded_path(configured)
    return cache_folder() / "tuned"


def tuned_folder_of(model: Model) -> Path:
    """The folder in `tuned_folder` for a model."""
    return tuned_folder() / str(unedited_identity(model).weights)[:16]


def tuned_settings(method: str, model: Model) -> TunedSettings | None:
    """The settings tuned for a model: those beside its checkpoint, else those in `tuned_folder`; None without any.

    A file of another model is left out with a warning: a checkpoint that was trained on carries that of its source.

    Raises:
        InputError: a file is damaged, or was changed since it was written.
    """
    files = [Path(model.checkpoint) / TUNED_FILE] if model.checkpoint else []
    if tuned_folder().is_dir():
        files.append(tuned_folder_of(model) / TUNED_FILE)
    for file in filter(Path.is_file, files):
        sections = _sections(file)
        if method not in sections["methods"]:
            continue
        tuned = _of_section(sections["methods"][method], method, sections["model"], file)
        if tuned.fits(model):
            return tuned
        warn(f"{str(file)!r} was tuned for another model, and is left out: {_REMEDY}")
    return None


def write_tuned(path: str | Path, model: Model, method: str, record: Mapping[str, Any]) -> TunedSettings:
    """Write a method's section into a file, atomically; sections of other methods stay if they are of this model.

    Args:
        path: the file, which may exist.
        model: unedited.
        method: name of the method.
        record: layers, settings and evidence, without a hash.
    """
    path, provenance = Path(path), {**model.provenance(), CAST_HASHES: model.cast_hashes()}
    section = plain_copy(record)
    section["hash"] = record_hash(section)
    sections: dict[str, Any] = {}
    if path.is_file():
        before = _sections(path)
        if ModelIdentity.of(before["model"]) == ModelIdentity.of(provenance):
            sections = before["methods"]
    content = {"mechedit": VERSION, "model": provenance, "methods": {**sections, method: section}}
    write_json(path, content)
    return _of_section(section, method, provenance, path)


def record_hash(record: Any) -> str:
    """SHA-256 of a section without its hash and without seconds, which differ from run to run."""
    return value_hash(_without_seconds({name: value for name, value in record.items() if name != "hash"}))


def is_of_model(made_for: Mapping[str, Any], model: Model) -> bool:
    """Whether a provenance is of these weights before their edits, in the same dtype or rounded to the model's."""
    identity, other_identity = unedited_identity(model), ModelIdentity.of(made_for)
    rounded = (made_for.get(CAST_HASHES) or {}).get(identity.dtype)
    same_weights = identity.weights in (other_identity.weights, rounded)
    return same_weights and (identity.tokenizer, identity.module) == (other_identity.tokenizer, other_identity.module)


def unedited_identity(model: Model) -> ModelIdentity:
    """Identity of the model before the edits that are applied to it."""
    identity, applied = model.identity(), applied_edits(model)
    weights = applied[0].edit.manifest.get("model", {}).get("weights_hash") if applied else None
    return replace(identity, weights=weights or identity.weights)


def _without_seconds(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_seconds(entry) for name, entry in value.items() if name != "seconds"}
    return [_without_seconds(entry) for entry in value] if isinstance(value, list | tuple) else value


def _sections(path: Path) -> dict[str, Any]:
    """The content of a file, whose `model` and `methods` are objects.

    Raises:
        InputError: it is not what `write_tuned` wrote.
    """
    content = read_object(path, "model", "methods")
    if not content.get("model") or not content.get("methods"):
        raise _damaged(path, "it has no model or no methods")
    check_record(content["model"], ModelRecord, f"the model in {str(path)!r}", _REMEDY)
    return content


def _of_section(section: Any, method: str, model: Mapping[str, Any], path: Path) -> TunedSettings:
    """The settings in a section.

    Raises:
        InputError: it is damaged, or was changed since it was written.
    """
    if not isinstance(section, dict):
        raise _damaged(path, f"{method} is {brief(section)}")
    layers, settings = section.get("layers"), section.get("settings")
    if not isinstance(layers, list) or not layers or not all(type(layer) is int and layer >= 0 for layer in layers):
        raise _damaged(path, f"the layers of {method} are {brief(layers)}")
    if layers != sorted(set(layers)):
        raise _damaged(path, f"the layers of {method} are {brief(layers)}")
    if not isinstance(settings, dict):
        raise _damaged(path, f"the settings of {method} are {brief(settings)}")
    if section.get("hash") != record_hash(section):
        raise _damaged(path, f"the section {method!r} was changed after it was written")
    return TunedSettings(method=method, layers=tuple(layers), settings=settings, record=section, model=model, file=path)


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(f"{str(path)!r} is not what `mechedit tune` wrote ({problem}); {_REMEDY}")
