"""Readers of option values: layers, windows, shards, samples of facts, models and settings."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import typer
from transformers.utils import logging

from mechedit import ranks
from mechedit.data import EditRequest, Fact
from mechedit.errors import InputError, brief, check_at_least, check_choice, read_whole
from mechedit.methods import METHODS, MethodConfig, Recommendation
from mechedit.models import Model, load_model, read_layer_range
from mechedit.paths import checked_path
from mechedit.shards import Rank
from mechedit.sweep import Window


def parse_layers(text: str) -> list[int]:
    """Layers as people write them: `3-8`, `3,5,7`, `3-5,8`.

    Raises:
        InputError: anything else, a range that runs backwards, a layer that no model has, or a layer named twice.
    """
    layers: set[int] = set()
    for span in _ranges(text, "layers"):
        if not layers.isdisjoint(span):
            raise InputError(f"the layers {brief(text)} name a layer twice, expected each once")
        layers.update(span)
    return sorted(layers)


def parse_names(text: str) -> tuple[str, ...]:
    r"""Names between commas; `\n` in one stands for a line break."""
    return tuple(name.strip().replace(r"\n", "\n") for name in text.split(","))


def parse_windows(text: str) -> list[Window]:
    """Windows of layers as people write them: `1-4,2-5`, and `3` for one layer.

    Raises:
        InputError: anything else, or a window that runs backwards.
    """
    return [Window(span[0], span[-1]) for span in _ranges(text, "windows")]


def _ranges(text: str, what: str) -> Iterator[range]:
    """The ranges between commas."""
    return (read_layer_range(part, f"the {what} {brief(text)}") for part in text.split(","))


def parse_shard(text: str | None) -> Rank | None:
    """A process's part as people write it, `0/4`.

    Raises:
        InputError: anything else.
    """
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise InputError(f"the shard {brief(text)} cannot be read, expected such as 0/4, the first of four")
    most = 1_000_000
    return Rank.of(read_whole("the shard's number", index, most), read_whole("the number of shards", count, most))


def require_one_process(shard: Rank | None) -> Rank | None:
    """A shard, which is for a process on its own.

    Raises:
        InputError: `torchrun` or `accelerate launch` started several.
    """
    world_size = ranks.current().world_size
    if shard is not None and world_size > 1:
        raise InputError(
            f"--shard {shard} is there, and {world_size} processes share this command, expected one of the two; leave "
            f"--shard out, or start one process"
        )
    return shard


def read_path(text: str | Path) -> Path:
    """A path as an option or argument gives it.

    Raises:
        BadParameter: it is empty, and so would be the current folder; too long; or has a null character in it.
    """
    if text == "":
        raise typer.BadParameter("it is empty, expected a path; give . for the current folder")
    try:
        return checked_path(text)
    except InputError as error:  # a ValueError, in whose place typer would put a message of its own
        raise typer.BadParameter(str(error)) from error


def existing_folder(path: Path) -> Path:
    """Refuse a folder that is not there."""
    if not checked_path(path).is_dir():
        raise InputError(f"there is no folder {str(path)!r}; expected one that mechedit wrote: check the path")
    return path


def require_layers(layers: list[int], n_layers: int) -> None:
    """Refuse layers that the model lacks."""
    if layers[-1] >= n_layers:
        raise InputError(f"layer {layers[-1]} is not in the model, expected layers 0 to {n_layers - 1}")


def first_texts(texts: Sequence[str], count: int) -> list[str]:
    """The first texts that are not blank; only so many are read.

    Raises:
        InputError: none are wanted.
    """
    check_at_least("--max-texts", count, 1, "leave --texts out for no perplexity")
    return list(itertools.islice((text for text in texts if text.strip()), count))


Record = TypeVar("Record", Fact, EditRequest)


def sampled(records: list[Record], count: int | None, seed: int, option: str = "--max-facts") -> list[Record]:
    """A seeded sample in the file's order.

    Raises:
        InputError: none are wanted.
    """
    if count is None or count >= len(records):
        return records
    check_at_least(option, count, 1)
    chosen = set(random.Random(seed).sample(range(len(records)), count))
    return [record for i, record in enumerate(records) if i in chosen]


def load_quietly(
    name: str,
    backend: str,
    device: str | None,
    dtype: str | None,
    merge_adapter: bool = False,
    allow_pickle: bool = False,
) -> Model:
    """Load a model by name without the loading bars of libraries."""
    with quiet():
        return load_model(
            name, backend=backend, device=device, dtype=dtype, merge_adapter=merge_adapter, allow_pickle=allow_pickle
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the loading bars of libraries off the terminal; ours say what matters."""
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def method_config(method: str, model: Model, seed: int, settings: list[str] | None) -> MethodConfig:
    """The method's settings: those recommended for the model, then the seed, then --set name=value."""
    return method_settings(method, model, seed, settings).config


def method_settings(
    method: str,
    model: Model,
    seed: int,
    settings: list[str] | None,
    *,
    tuned: bool = True,
    file: Path | None = None,
    published: bool = False,
) -> Recommendation[MethodConfig]:
    """As `method_config`, with the layers that were tuned, and with where all of them come from.

    Args:
        method: name of the method.
        model: for which they are.
        seed: of the settings.
        settings: name=value of each setting that the user chose.
        tuned: whether to look for tuned settings.
        file: of tuned settings, in place of those found beside the checkpoint or in the folder of tuned settings.
        published: take layers and settings that were published for the model, in place of all files.
    """
    check_choice("the method", method, METHODS)
    recommended = METHODS[method].recommendation(model, tuned=tuned, file=file, published=published)
    config = recommended.config
    hints = {field.name: get_type_hints(type(config))[field.name] for field in dataclasses.fields(config)}
    changes: dict[str, Any] = {"seed": seed}
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        if not equals or name not in hints:
            raise InputError(
                f"--set {brief(setting)} cannot be read, expected name=value with one of {', '.join(hints)}"
            )
        changes[name] = _read(value, hints[name], setting)
    changed = recommended.changed(changes)
    config, of_files = changed.config.suited(model)
    return dataclasses.replace(changed, config=config, layers=changed.layers if of_files is None else of_files)


def _read(value: str, hint: Any, setting: str) -> Any:
    """A setting's value as its type is annotated; `float | int` takes numbers, a Literal its strings, `None` none.

    Raises:
        InputError: it cannot be read so.
    """
    kinds = get_args(hint) or (hint,)
    if type(None) in kinds and value.lower() == "none":
        return None
    if bool in kinds:
        kind, read = "bool (true or false)", {"true": True, "false": False}.__getitem__
        value = value.lower()
    elif float in kinds:
        kind, read = "number", float
    else:
        kind, read = ("int", int) if int in kinds else ("text", str)
    try:
        return read(value)
    except (ValueError, KeyError) as error:
        raise InputError(f"--set {brief(setting)}: {brief(value)} is not a {kind}") from error
