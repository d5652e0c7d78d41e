"""The folder of a session: session.json says what it is of, batches/0001.safetensors … what was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechedit.errors import InputError
from mechedit.files import read_json, write_json
from mechedit.provenance import VERSION, check_provenance
from mechedit.session.metrics import Measure
from mechedit.session.record import Record


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Where a session keeps its batches; without a path, nowhere."""

    path: Path | None

    @property
    def targets(self) -> Path | None:
        """Where the search for z keeps what it has found of the batch in hand."""
        return None if self.path is None else self.path / "targets"

    def start(self, made_with: Mapping[str, Any], unedited: Sequence[Measure]) -> None:
        """Note what the session is of."""
        if self.path is not None:
            about = {"mechedit": VERSION, "made_with": made_with, "unedited": unedited}
            write_json(self.path / "session.json", about)

    def found(self) -> tuple[dict[str, Any], tuple[Measure, ...]] | None:
        """What the session that is kept here is of, and the measures of its unedited model; None when there is none.

        Raises:
            InputError: session.json is damaged, or batches lie there without it.
        """
        if self.path is None or not (file := self.path / "session.json").is_file():
            if self.path is not None and self._files():
                raise InputError(
                    f"{str(self.path)!r} holds batches but no session.json, expected both or neither; choose "
                    f"another folder, or remove the batches"
                )
            return None
        about = read_json(file)
        try:
            return dict(about["made_with"]), tuple(Measure(*one) for one in about["unedited"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{str(file)!r} does not describe a session ({error}); expected what EditSession wrote: choose "
                f"another folder"
            ) from error

    def check(self, found: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
        """Refuse to go on with a session of something else.

        Raises:
            InputError: names the first field that differs.
        """
        what, remedy = f"the session in {str(self.path)!r}", "go on with that, or choose another folder"
        check_provenance(found, made_with, what, remedy=remedy)

    def records(self, base: str) -> tuple[Record, ...]:
        """The finished batches, oldest first; what a killed process left half-written is removed.

        Args:
            base: the hash of the unedited weights.

        Raises:
            InputError: a batch is damaged, missing, or was not made on what those before it left.
        """
        if self.path is None:
            return ()
        for leftover in (self.path / "batches").glob(".*.safetensors"):
            leftover.unlink()
        found: list[Record] = []
        for place, file in enumerate(self._files(), 1):
            record = Record.load(file)
            chain = {"number": record.number, "made_on": record.edit.manifest["model"]["weights_hash"]}
            remedy = "a batch before it is missing or was replaced: remove it and all later ones"
            check_provenance(chain, {"number": place, "made_on": base}, repr(str(file)), remedy=remedy)
            found.append(record)
            base = record.weights_hash
        return tuple(found)

    def keep(self, record: Record) -> None:
        """Write one finished batch, atomically."""
        if self.path is not None:
            record.save(self.path / "batches" / f"{record.number:04}.safetensors")

    def _files(self) -> list[Path]:
        return sorted((self.path / "batches").glob("[0-9]*.safetensors")) if self.path else []
