"""A folder of finished steps: each is made once, and reused when nothing that determines it has changed.

`config.json` holds a stamp for every finished step: the number of its algorithm and what went in (model, hashes of
the input, settings). A step with the same stamp is read from its files; another stamp is an error, unless the step may
be overwritten. A stamp is written after the step's files, so an interrupted step is made again. Stamps from before
there were algorithm numbers count as of algorithm 1.

A stamp also holds the size and the SHA-256 of each of the step's files, which are held against it before they are read.
Stamps from before there were checksums have none, and their files are read unchecked.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechedit import ranks
from mechedit.cache import Cache, Codec, Value
from mechedit.checksums import checks_content
from mechedit.errors import InputError, brief
from mechedit.files import plain_copy, read_object, write_json
from mechedit.locks import locked, remove_free_locks
from mechedit.paths import writable_file, writable_folder
from mechedit.provenance import (
    ALGORITHMS,
    DEFAULTS,
    RECORDED,
    VERSION,
    check_provenance,
    file_hash,
    value_hash,
)
from mechedit.records import ModelRecord, check_record
from mechedit.temporary_names import remove, remove_folder, sweep

_FOLDERS = (
    ".", "figures", "moments", "moments/parts", "targets", "trace_parts", "sweep_parts", "finals", "baseline",
    "baseline_zsre",
)  # fmt: skip
"""Folders of a run folder in which files are written."""


def sweep_run_folder(folder: str | Path) -> None:
    """Remove what killed processes left half-written in a run folder, and their locks; a living one's stays."""
    sweep(Path(folder) / name for name in _FOLDERS)
    remove_free_locks(folder, "*")


def check_seen_by_all(folder: Path) -> None:
    """Refuse a folder that is not the same one for all processes of the command.

    Raises:
        InputError: names a process that sees another one.
    """
    group = ranks.current()
    if group.world_size == 1:
        return
    name = group.from_first(lambda: f".seen_{uuid.uuid4().hex}", "the look at the folder")
    file = folder / name
    try:
        group.from_first(file.touch, "the look at the folder")
        seen = group.gather(file.exists(), "the look at the folder")
    finally:
        if group.is_first:
            remove(file)
    if not all(seen):
        raise InputError(
            f"the process of rank {seen.index(False)} does not see what that of rank 0 writes to {str(folder)!r}, "
            f"expected one folder for all; choose an --out that all machines share"
        )


@dataclass(frozen=True)
class RunFolder:
    """A folder of results and the stamps of the steps that made them."""

    path: Path
    overwrite: bool = False
    """Replace steps that were made from other input instead of refusing."""

    @staticmethod
    def at(path: str | Path, *, overwrite: bool = False) -> RunFolder:
        """Open or make a folder to write to.

        Raises:
            InputError: it cannot be made or written to.
        """
        folder = writable_folder(path)
        check_seen_by_all(folder)
        return RunFolder(folder, overwrite)

    def step(
        self,
        name: str,
        stamp: Mapping[str, Any],
        make: Callable[[], Value],
        codec: Codec[Value],
        at: str = "",
        *,
        parts: str | None = None,
    ) -> Value:
        """Read the step's result when it was made from the same input, else make it and keep it.

        Args:
            name: of the step, one of `ALGORITHMS`.
            stamp: what goes in. Of a model's provenance only what decides results is compared (`RECORDED`).
            make: makes the result.
            codec: reads and writes it.
            at: where in the folder: a file, or a folder for the codec's files.
            parts: folder of what an interrupted step goes on from; it is removed once the step has its stamp.

        Raises:
            InputError: the folder holds this step made from other input, or a file of it is not as it was written, and
                `overwrite` is off; another process is making it from other input.
        """
        group = ranks.current()
        stamp = plain_copy({"algorithm": ALGORITHMS[name], **stamp})
        what, made_with = f"the {_noun(name)} in {str(self.path)!r}", value_hash([name, at, _deciding(stamp)])
        group.agree(what, _deciding(stamp))
        if not group.is_first:
            return self._read_or_make(name, stamp, make, codec, at)
        sweep_run_folder(self.path)
        with locked(self.path / name, what, made_with=made_with):
            value = self._read_or_make(name, stamp, make, codec, at)
            if parts is not None:
                remove_folder(self.path / parts)
            return value

    def _read_or_make(
        self, name: str, stamp: Mapping[str, Any], make: Callable[[], Value], codec: Codec[Value], at: str
    ) -> Value:
        path, group = self.path / at, ranks.current()
        files = [path / file for file in codec.files] or [path]
        before = self.stamps()

        def begin() -> bool:
            if codec.finished(path) and self._made_from(name, stamp) and self._is_intact(name):
                return True
            for file in [self.path / "config.json", *files]:
                writable_file(file)  # before the work that it takes, and before its neighbors are replaced
            # Without its stamp a half-replaced result cannot be mistaken for a whole one.
            self._replace_stamp(name, None)
            return False

        def end() -> None:
            if codec.write is not None:
                codec.write(path, value)
            records = {str(file.relative_to(self.path)): _record(file) for file in files}
            self._replace_stamp(name, {**stamp, "files": records})

        if group.from_first(begin, f"the beginning of the {_noun(name)}"):
            return group.from_first(lambda: codec.read(path), f"the {_noun(name)} as it was made before")
        try:
            value = make()
        except InputError:
            if group.is_first:
                self._restore_stamp(name, before)
            raise
        group.from_first(end, f"the end of the {_noun(name)}")
        return value

    def refuse_other(self, name: str, stamp: Mapping[str, Any]) -> None:
        """Refuse to begin a step that the folder holds, made from other input, unless it may be overwritten.

        Args:
            name: of the step.
            stamp: what would go in.

        Raises:
            InputError: names the first field that differs.
        """
        sweep_run_folder(self.path)
        self._made_from(name, plain_copy({"algorithm": ALGORITHMS[name], **stamp}))

    def cache(self, name: str) -> Cache:
        """A folder in this one for results that are known by a hash of their input."""
        return Cache(self.path / name)

    def stamps(self) -> dict[str, Any]:
        """The finished steps and what went into them."""
        return read_stamps(self.path)

    def _made_from(self, name: str, stamp: Mapping[str, Any]) -> bool:
        """Whether a step has the stamp; one with another stamp is refused, unless it may be overwritten."""
        stamps = self.stamps()
        if name not in stamps:
            return False
        recorded, expected = _deciding(stamps[name]), _deciding(stamp)
        if recorded != expected and not self.overwrite:
            what = f"the {_noun(name)} in {str(self.path)!r}"
            check_provenance(recorded, expected, what, "choose another --out, or pass --overwrite")
        return recorded == expected

    def _is_intact(self, name: str) -> bool:
        """Whether the files of a step are as they were written; others are refused, unless they may be overwritten."""
        try:
            check_step(self.path, name)
        except InputError:
            if not self.overwrite:
                raise
            return False
        return True

    def _replace_stamp(self, name: str, stamp: Mapping[str, Any] | None) -> None:
        """Put a stamp after those of the other steps, which other processes may write meanwhile, or remove it."""
        file = self.path / "config.json"
        with locked(file, repr(str(file)), wait=True):
            before = self.stamps()
            if stamp is None and name not in before:
                return  # a step that is refused before it began writes nothing
            stamps = {step: recorded for step, recorded in before.items() if step != name}
            if stamp is not None:
                stamps[name] = dict(stamp)
            write_json(file, {"mechedit": VERSION, "steps": stamps})

    def _restore_stamp(self, name: str, before: Mapping[str, Any]) -> None:
        """Put back the stamp of a step whose files nothing has replaced, where making it again was refused."""
        if not before.get(name, {}).get("files"):
            return
        file = self.path / "config.json"
        with locked(file, repr(str(file)), wait=True):
            stamps = {**before, **self.stamps()}
            write_json(file, {"mechedit": VERSION, "steps": stamps})
        try:
            check_step(self.path, name)
        except InputError:
            self._replace_stamp(name, None)


@contextlib.contextmanager
def as_written(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Say of which file or folder it is that its parts do not fit each other, where no check of each part could tell.

    Args:
        path: of the file or folder.
        *errors: that tell it, besides Python's own.

    Raises:
        InputError: the block ended in one of these errors.
    """
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, *errors) as error:
        raise InputError(
            f"{str(path)!r} cannot be shown ({type(error).__name__}: {error!s:.200}); expected what mechedit wrote, "
            f"as it wrote it: make it again"
        ) from error


def check_step(folder: str | Path, *steps: str) -> None:
    """Hold the files of some steps against the checksums in their stamps; files without one are not checked.

    Args:
        folder: a run folder.
        *steps: names of steps; those that the folder does not have are passed over.

    Raises:
        InputError: names the file that is not as its step wrote it, and says how to make it again.
    """
    folder, stamps = Path(folder), read_stamps(Path(folder))
    for step in steps:
        for name, record in stamps.get(step, {}).get("files", {}).items():
            _check_file(folder / name, record, step)


def _check_file(path: Path, record: Any, step: str) -> None:
    expected = record if isinstance(record, dict) else {}
    if not path.is_file():
        return  # a step without its files is made again
    size = path.stat().st_size
    if size != expected.get("size"):
        problem = f"it has {size} bytes, expected {brief(expected.get('size'))}"
    elif checks_content(size) and (actual := file_hash(path)) != expected.get("sha256"):
        problem = f"its SHA-256 is {actual[:16]}…, expected {brief(str(expected.get('sha256'))[:16])}…"
    else:
        return
    raise InputError(
        f"{str(path)!r} is not as the {_noun(step)} wrote it ({problem}): it was damaged or changed; remove it, "
        f"or pass --overwrite, and {_COMMANDS.get(step, 'the same command')} makes it again"
    )


def _record(path: Path) -> dict[str, Any]:
    """The size and checksum of a file, as a stamp holds them."""
    return {"size": path.stat().st_size, "sha256": file_hash(path)}


def _noun(step: str) -> str:
    """What a step is called in a message: those whose name is no noun have another one."""
    return _NOUNS.get(step, step)


_NOUNS = {
    "evaluate": "evaluation",
    "baseline_zsre": "baseline of zsRE's protocol",
    "finals": "last round of the sweep",
}
_COMMANDS = {
    **{name: f"mechedit {name}" for name in ("trace", "edit", "evaluate")},
    **dict.fromkeys(("baseline", "baseline_zsre"), "mechedit evaluate"),
    "sweep": "mechedit select --validate",
}
"""What makes the files of a step."""


def read_stamps(folder: Path) -> dict[str, Any]:
    """The finished steps of a folder and what went into them, by config.json; none without that file.

    Raises:
        InputError: config.json is not JSON, or it, its steps or one of them is no object.
    """
    file = folder / "config.json"
    if not file.is_file():
        return {}
    steps = read_object(file, "steps").get("steps") or {}
    for name, stamp in steps.items():
        parts = {name: stamp}
        if isinstance(stamp, dict):
            parts |= {f"{name}.{part}": stamp.get(part, {}) for part in ("model", "settings", "files")}
        for part, value in parts.items():
            if not isinstance(value, dict):
                raise InputError(
                    f"the step {brief(part)} in {str(file)!r} is {brief(value)}, expected an object; remove the "
                    f"file, and "
                    f"make the steps again"
                )
        what = f"the model of the step {brief(name)} in {str(file)!r}"
        check_record(stamp.get("model", {}), ModelRecord, what, "remove the file, and make the steps again")
    return steps


def inputs_of(stamp: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stamp that say what went into its step."""
    return {name: value for name, value in stamp.items() if name != "files"}


def _deciding(stamp: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stamp that decide whether its step may be reused, by dotted names; see `RECORDED`."""
    recorded = {f"model.{name}" for name in RECORDED}
    deciding = {name: value for name, value in _flat(inputs_of(stamp)).items() if name not in recorded}
    return {"algorithm": DEFAULTS["algorithm"], "model.module": DEFAULTS["module"], **deciding}


def _flat(stamp: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, so that an error can name the one that differs."""
    flat: dict[str, Any] = {}
    for key, value in stamp.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
