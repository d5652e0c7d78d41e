"""The files of a session: session.json with its settings, and batches/0001.safetensors … with its batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from mechedit.errors import InputError
from mechedit.files import read_object, write_json
from mechedit.locks import locked, remove_free_locks
from mechedit.provenance import VERSION, check_provenance, value_hash
from mechedit.records import check_record
from mechedit.session.edited_batch import EditedBatch
from mechedit.session.metrics import HistoryEntry
from mechedit.temporary_names import remove_folder, sweep


class SessionRecord(TypedDict):
    """The content of session.json."""

    made_with: dict[str, Any]
    unedited: list[HistoryEntry]


@dataclass(frozen=True, kw_only=True)
class SessionFolder:
    """Where a session saves its batches; without a path, nothing is saved."""

    path: Path | None

    def targets(self, number: int) -> Path | None:
        """Folder in which the search for z caches its results while the batch of this number is written."""
        return None if self.path is None else self.path / "targets" / f"{number:04}"

    def remove_targets(self, n_batches: int) -> None:
        """Remove what the searches for the first batches left, which are finished."""
        if self.path is None:
            return
        folder = self.path / "targets"
        for path in folder.glob("[0-9]*"):
            if path.name.isdecimal() and int(path.name) <= n_batches:
                remove_folder(path)
        with contextlib.suppress(OSError):  # it is not there, or holds those of the next batch
            folder.rmdir()

    def save_settings(self, settings: Mapping[str, Any], unedited: Sequence[HistoryEntry]) -> None:
        """Write session.json.

        Args:
            settings: all that determines the session's results, except its batches.
            unedited: numbers measured on the unedited model.

        Raises:
            InputError: another process has begun a session with other settings there.
        """
        if self.path is None:
            return
        with locked(self.path / "session.json", f"the session in {str(self.path)!r}", wait=True):
            # Another process may have begun one meanwhile.
            if (saved := self.load_settings()) is not None:
                self.check_settings(saved[0], settings)
                return
            # Settings need no checksum: they are held against those that are given.
            content = {"mechedit": VERSION, "made_with": settings, "unedited": unedited, "sha256": value_hash(unedited)}
            write_json(self.path / "session.json", content)

    def load_settings(self) -> tuple[dict[str, Any], tuple[HistoryEntry, ...]] | None:
        """Read session.json: the settings, and the unedited model's numbers; None if the folder holds no session.

        Raises:
            InputError: session.json is damaged, or batches lie there without it.
        """
        if self.path is None or not (file := self.path / "session.json").is_file():
            if self.path is not None and self._batch_files():
                raise InputError(
                    f"{str(self.path)!r} holds batches but no session.json, expected both or neither; choose "
                    f"another folder, or remove the batches"
                )
            return None
        content = read_object(file, "made_with")
        checksum = content.get("sha256")  # older sessions have none
        if checksum is not None and checksum != value_hash(content.get("unedited")):
            raise InputError(
                f"{str(file)!r} is not as it was written (it does not match its SHA-256), expected an undamaged file; "
                f"copy it again, or choose another folder and write the batches again"
            )
        check_record(content, SessionRecord, repr(str(file)), "choose another folder")
        return content["made_with"], tuple(HistoryEntry(*entry) for entry in content["unedited"])

    def check_settings(self, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Refuse to resume a session with other settings.

        Raises:
            InputError: names the first field that differs.
        """
        what, remedy = f"the session in {str(self.path)!r}", "go on with that, or choose another folder"
        check_provenance(saved, settings, what, remedy=remedy)

    @contextlib.contextmanager
    def locked(self, n_batches: int) -> Iterator[None]:
        """Be the only process that writes batches until the block ends.

        Args:
            n_batches: number of batches that were read.

        Raises:
            InputError: another process writes batches, or has done so since they were read.
        """
        if self.path is None:
            yield
            return
        what = f"the session in {str(self.path)!r}"
        with locked(self.path / "session", what):
            if len(self._batch_files()) != n_batches:
                raise InputError(
                    f"{what} has {len(self._batch_files())} batches, expected the {n_batches} that it had when it was "
                    f"read: another process wrote to it; create the session again"
                )
            yield

    def load_batches(self, weights_hash: str) -> tuple[EditedBatch, ...]:
        """Read the finished batches, oldest first; temporary files of a killed process are removed.

        Args:
            weights_hash: hash of the unedited weights.

        Raises:
            InputError: a batch is damaged or missing, or was not made on the weights that those before it left.
        """
        if self.path is None:
            return ()
        targets = self.path / "targets"
        remove_free_locks(self.path, "*")
        sweep([self.path, self.path / "batches", targets, *targets.glob("[0-9]*")])
        for temporary in (self.path / "batches").glob(".*.safetensors"):
            if temporary.is_file():  # by a name without a process
                temporary.unlink()
        batches: list[EditedBatch] = []
        for number, file in enumerate(self._batch_files(), 1):
            batch = EditedBatch.load(file)
            chain = {"number": batch.number, "made_on": batch.edit.manifest["model"]["weights_hash"]}
            remedy = "a batch before it is missing or was replaced: remove it and all later ones"
            check_provenance(chain, {"number": number, "made_on": weights_hash}, repr(str(file)), remedy=remedy)
            batches.append(batch)
            weights_hash = batch.weights_hash
        self.remove_targets(len(batches))  # of a process that was killed as it had saved the last one
        return tuple(batches)

    def save_batch(self, batch: EditedBatch) -> None:
        """Write one finished batch, atomically."""
        if self.path is not None:
            batch.save(self.path / "batches" / f"{batch.number:04}.safetensors")

    def _batch_files(self) -> list[Path]:
        return sorted((self.path / "batches").glob("[0-9]*.safetensors")) if self.path else []
