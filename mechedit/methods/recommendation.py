"""The settings of a method for a model, and where they come from.

In this order, the first that names a setting wins: what the user says, `tuned.json` beside the checkpoint, `tuned.json`
in the folder of tuned settings, `editing.json` beside the checkpoint, the method's defaults. Where none of them names
layers, `with_published_layers` takes those that were published for the model.

Published settings are in absolute units (λ in new facts, the learning rate in units of the residual stream), and were
chosen for other conditions than a user's: they are taken only where they are asked for (`published=True`), and then in
place of all files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from mechedit.edit import Edit
from mechedit.errors import InputError
from mechedit.files import read_object
from mechedit.methods.settings import MethodConfig
from mechedit.methods.tuned_settings import TunedSettings, tuned_settings
from mechedit.models import Model
from mechedit.provenance import file_hash, value_hash
from mechedit.published import PublishedSettings, Shape, published_settings
from mechedit.records import read_record
from mechedit.targets.config import TargetSettings

Config = TypeVar("Config", bound=MethodConfig)
SETTINGS_FROM = "settings_from"
"""Where an edit's manifest says which files its settings come from, the strongest first; absent where its caller chose
all of them."""
UNITS = {"lr": "relative_lr", "covariance_weight": "relative_covariance_weight"}
"""Settings in absolute units, and those that say the same in relative ones."""


@dataclass(frozen=True, kw_only=True)
class SettingsSource:
    """Where some settings come from."""

    name: str
    """`tuned.json`, `editing.json` or `published`."""
    hash: str
    """Hash of what it says."""
    file: str
    """Path of the file, or the publication; not recorded, since it decides nothing."""
    settings: tuple[str, ...]
    """Names of what was taken from it, `layers` among them where it names these."""

    @property
    def record(self) -> dict[str, Any]:
        """What a manifest holds."""
        return {"source": self.name, "hash": self.hash, "settings": list(self.settings)}

    def below(self, stronger: Mapping[str, Any]) -> SettingsSource:
        """The source without what a stronger one replaces, in the same unit or the other."""
        replaced = {*stronger, *replaced_by(stronger)}
        return replace(self, settings=tuple(name for name in self.settings if name not in replaced))

    def in_words(self) -> str:
        """The file, the beginning of its hash, and what comes from it."""
        return f"{', '.join(self.settings) or 'nothing'} from {self.file} ({self.hash[:12]})"


@dataclass(frozen=True, kw_only=True)
class Recommendation(Generic[Config]):
    """The settings of a method for a model where its user says nothing."""

    config: Config
    """The settings."""
    layers: tuple[int, ...] | None
    """The layers to edit; None where no source names any."""
    sources: tuple[SettingsSource, ...]
    """Where they come from, the strongest first; what no source names has the method's default."""

    @property
    def record(self) -> list[dict[str, Any]]:
        """The sources as a manifest holds them."""
        return [source.record for source in self.sources]

    def changed(self, changes: Mapping[str, Any]) -> Recommendation[Config]:
        """The recommendation with settings that its user chose; one in either unit replaces that in the other.

        Raises:
            InputError: a bad value, or one that does not fit the others.
        """
        kind = type(self.config)
        defaults = asdict(kind())
        weaker = {name: value for name, value in asdict(self.config).items() if value != defaults[name]}
        sources = tuple(source.below(changes) for source in self.sources)
        return replace(self, config=kind(**with_settings(weaker, changes)), sources=sources)

    def for_own_layers(self) -> Recommendation[Config]:
        """The recommendation for a user who names the layers, which then come from no source."""
        return replace(self, sources=tuple(source.below({"layers": None}) for source in self.sources))


def recommendation(
    kind: type[Config],
    method: str,
    model: Model,
    *,
    tuned: bool = True,
    file: str | Path | None = None,
    published: bool = False,
) -> Recommendation[Config]:
    """The settings of a method for a model, by the order of the module's docstring.

    Args:
        kind: class of the settings.
        method: name of the method.
        model: for which they are.
        tuned: whether to look for tuned settings.
        file: of tuned settings, in place of those beside the checkpoint and in the folder of tuned settings.
        published: take what was published for the model in place of all files: layers and settings.

    Raises:
        InputError: a file is damaged, names a setting that the method lacks, or gives one a bad value; `file` is of
            another model or method; nothing was published for the model, or what was is not the same for all models
            of its shape.
    """
    if published:
        entry = _first_published(method, model)
        source = _published_source(entry, ("layers", *entry.settings))
        return Recommendation(config=kind(**entry.settings), layers=entry.range.layers, sources=(source,))
    editing = _editing_file(method, model)
    sources, parts, layers = [], [], None
    if editing is not None:
        path, settings = editing
        parts.append((path, settings))
        sources.append(_source("editing.json", path, file_hash(path), settings))
    from_tuning = _tuned(method, model, tuned, file)
    if from_tuning is not None:
        layers = from_tuning.layers
        parts.append((from_tuning.file, from_tuning.settings))
        names = {"layers": layers, **from_tuning.settings}
        sources = [source.below(names) for source in sources]
        sources.insert(0, _source("tuned.json", from_tuning.file, from_tuning.hash, names))
    merged: Mapping[str, Any] = {}
    config = kind()
    for path, settings in parts:
        merged = with_settings(merged, settings)
        config = read_record(merged, kind, f"the settings of {method!r} in {str(path)!r}", "fix the file")
    suited: Any
    suited, of_files = config.suited(model)
    return Recommendation(config=suited, layers=of_files if layers is None else layers, sources=tuple(sources))


def with_published_layers(recommended: Recommendation[Config], method: str, model: Model) -> Recommendation[Config]:
    """The recommendation with the layers that were published for this model and method, where it has none.

    Raises:
        InputError: none were published, or not the same for all models of its shape; or the method lacks a file.
    """
    if recommended.layers is not None:
        return recommended
    recommended.config.require_files(model)
    entry = _first_published(method, model)
    sources = (*recommended.sources, _published_source(entry, ("layers",)))
    return replace(recommended, layers=entry.range.layers, sources=sources)


def published_for(method: str, model: Model) -> list[PublishedSettings]:
    """What was published for a method on a model, by its name, or else by its architecture and size.

    None where the model writes into another module than its MLPs, of which nothing was published.
    """
    if model.module != "mlp":
        return []
    shape = Shape(type=model.family.model_type, layers=model.n_layers, d_model=model.d_model, d_mlp=model.d_key)
    return published_settings(model.name, shape, method)


def _first_published(method: str, model: Model) -> PublishedSettings:
    """The first entry published for a method on a model.

    Raises:
        InputError: there is none; or the model goes by its shape, which models with other layers have as well.
    """
    entries = published_for(method, model)
    if not entries:
        raise InputError(
            f"nothing was published for {method} on {model.name!r}, nor on a model of its architecture and size "
            f"({model.family.model_type}, {model.n_layers} layers, d_model {model.d_model}); give the layers, or tune "
            f"them (mechedit tune)"
        )
    if len({entry.name for entry in entries}) > 1 and len({(e.range.layers, str(e.settings)) for e in entries}) > 1:
        published = "; ".join(entry.in_words() for entry in entries)
        raise InputError(
            f"{model.name!r} has the architecture and size of several published models, which {method} edits "
            f"otherwise ({published}); expected a name that tells which it is: give layers and settings yourself"
        )
    return entries[0]


def _published_source(entry: PublishedSettings, names: tuple[str, ...]) -> SettingsSource:
    """Where published layers and settings come from, and for which model they were published."""
    content = value_hash([entry.range.model, entry.range.method, entry.range.layers, entry.range.source])
    file = f"{entry.range.source}, published for {entry.range.model} and not tried here"
    if entry.range.note:
        file += f" ({entry.range.note})"
    return SettingsSource(name="published", hash=content, file=file, settings=names)


def with_settings(weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those of a stronger source, which replace the weaker one's.

    A setting in one unit also replaces the same in the other unit, and a published convention, which has absolute
    units of its own, those in relative units. The convention `paper` fixes others (`TargetSettings.by_text`).
    """
    replaced = replaced_by(stronger)
    return {**{name: value for name, value in weaker.items() if name not in replaced}, **stronger}


def replaced_by(stronger: Mapping[str, Any]) -> set[str]:
    """Settings of a weaker source, under other names than these, that settings replace (`with_settings`)."""
    replaced = {absolute for absolute, relative in UNITS.items() if stronger.get(relative) is not None}
    replaced |= {relative for absolute, relative in UNITS.items() if stronger.get(absolute) is not None}
    if stronger.get("convention", "default") != "default":
        replaced |= set(UNITS.values())
    if stronger.get("convention") == "paper":
        replaced |= set(TargetSettings.by_text)
    return replaced


def _tuned(method: str, model: Model, tuned: bool, file: str | Path | None) -> TunedSettings | None:
    if file is None:
        return tuned_settings(method, model) if tuned else None
    loaded = TunedSettings.load(file, method)
    loaded.require(model)
    return loaded


def _editing_file(method: str, model: Model) -> tuple[Path, Mapping[str, Any]] | None:
    """The checkpoint's `editing.json` and its section for the method; None without a section.

    Raises:
        InputError: it holds no object.
    """
    path = Path(model.checkpoint) / "editing.json"
    if not model.checkpoint or not path.is_file():
        return None
    settings = read_object(path, method).get(method)
    return (path, settings) if settings else None


def _source(name: str, path: Path, content_hash: str, settings: Mapping[str, Any]) -> SettingsSource:
    names = tuple(setting for setting, value in settings.items() if value is not None)
    return SettingsSource(name=name, hash=content_hash, file=str(path), settings=names)


def with_sources(edit: Edit, recommended: Recommendation[Any], *, layers: bool) -> Edit:
    """The edit, its manifest with the files that its settings come from.

    Args:
        edit: made with these settings.
        recommended: the settings.
        layers: whether the layers were taken from them, too.
    """
    records = (recommended if layers else recommended.for_own_layers()).record
    return replace(edit, manifest={**edit.manifest, SETTINGS_FROM: records})
