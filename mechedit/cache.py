"""Finished work, kept in files under the hash of all that determines it.

What is interrupted finds again what was finished: `Cache.get` reads a result when its file is there, and else makes it
and leaves it there. Files appear whole or not at all. A `Codec` knows how one kind of result is written and read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import pandas as pd
from platformdirs import user_cache_dir

from mechedit.files import read_parquet, write_parquet
from mechedit.paths import checked_path, expanded_path
from mechedit.provenance import value_hash
from mechedit.temporary_names import sweep_once

Value = TypeVar("Value")

CACHE_VARIABLE = "MECHEDIT_CACHE"
"""Environment variable with the path of the cache folder."""


def cache_folder() -> Path:
    """The folder for downloads and converted models: $MECHEDIT_CACHE, else the operating system's.

    On Linux that is ~/.cache/mechedit.
    """
    if configured := os.environ.get(CACHE_VARIABLE):
        return expanded_path(configured)
    return Path(user_cache_dir("mechedit"))


@dataclass(frozen=True)
class Codec(Generic[Value]):
    """How one kind of result is written to a path and read back: a file, or some files of a folder."""

    read: Callable[[Path], Value]
    write: Callable[[Path, Value], object] | None = None
    """None when making a result writes its files too, because it is too large for memory."""
    suffix: str = ""
    """Suffix of the file's name."""
    files: tuple[str, ...] = ()
    """The files that a finished result has in its folder; empty when a result is one file."""

    def finished(self, path: Path) -> bool:
        """Whether the whole result is at a path."""
        return all((path / name).is_file() for name in self.files) if self.files else path.is_file()


def codec_of(kind: Any, suffix: str = "", files: tuple[str, ...] = ()) -> Codec[Any]:
    """The codec of a class whose values write themselves by `save(path)`, and which reads them by `load(path)`."""
    return Codec(read=kind.load, write=lambda path, value: value.save(path), suffix=suffix, files=files)


PARQUET: Codec[pd.DataFrame] = Codec(read=read_parquet, write=write_parquet, suffix=".parquet")
"""Tables with their attrs."""


@dataclass(frozen=True)
class Cache:
    """A folder of finished results, each in a file named by the hash of its key; without a folder nothing is kept."""

    folder: Path | None

    @staticmethod
    def at(folder: str | Path | None) -> Cache:
        """The cache in a folder, which is made with the first result.

        Raises:
            InputError: it cannot be a path.
        """
        return Cache(None if folder is None else checked_path(folder))

    def get(self, key: Any, make: Callable[[], Value], codec: Codec[Value]) -> Value:
        """Read the result of a key, or make it and keep it.

        Args:
            key: all that determines the result, as JSON can hold it.
            make: makes the result.
            codec: reads and writes it.
        """
        cached = self.read(key, codec)
        if cached is not None:
            return cached
        value = make()
        self.write(key, value, codec)
        return value

    def read(self, key: Any, codec: Codec[Value]) -> Value | None:
        """The result of a key; None when it is not finished."""
        path = self.path(key, codec)
        if path is not None:
            sweep_once(path.parent)
        return codec.read(path) if path is not None and codec.finished(path) else None

    def write(self, key: Any, value: Value, codec: Codec[Value]) -> None:
        """Keep the result of a key."""
        path = self.path(key, codec)
        if path is not None and codec.write is not None:
            codec.write(path, value)

    def path(self, key: Any, codec: Codec[Any]) -> Path | None:
        """The file of a key's result; None without a folder."""
        return None if self.folder is None else self.folder / f"{value_hash(key)[:32]}{codec.suffix}"
