"""What an interrupted search for settings needs to go on alike: the edits that minutes became, and what trials took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from typing_extensions import TypedDict

from mechedit.errors import brief, check_at_least, check_positive
from mechedit.files import read_checked_object, write_checked_json
from mechedit.provenance import value_hash
from mechedit.records import Number, check_record
from mechedit.tuning.plan import Speed


class SpeedRecord(TypedDict):
    """The fields of a `Speed`."""

    edit: Number
    low_edit: Number
    trial: Number
    fact: Number


class LedgerRecord(TypedDict):
    """The content of a ledger's file."""

    speed: SpeedRecord | None
    seconds: dict[str, Number]


@dataclass
class Ledger:
    """Seconds by trial, and the speed that was measured first, in a file."""

    file: Path
    speed: Speed | None = None
    """The speed by which minutes became edits; None before it is measured."""
    seconds: dict[str, float | int] = field(default_factory=dict)
    """Time per trial, over all calls that worked on it."""

    @staticmethod
    def at(folder: Path, key: Mapping[str, Any]) -> Ledger:
        """The ledger of a search in a folder; a new one where there is none.

        Args:
            folder: folder of the search.
            key: all that determines the search.

        Raises:
            InputError: its file is damaged.
        """
        file = folder / "ledger" / f"{value_hash(key)[:32]}.json"
        if not file.is_file():
            return Ledger(file)
        remedy = "remove it, and the search measures its speed again"
        content = read_checked_object(file, remedy=remedy)
        check_record(content, LedgerRecord, repr(str(file)), remedy)
        speed = content["speed"]
        for name, value in [*(speed or {}).items(), *content["seconds"].items()]:
            check_at_least(f"{brief(name)} in {str(file)!r}", value, 0, remedy)
        for name in ("edit", "low_edit"):
            check_positive(f"{name!r} in {str(file)!r}", speed and speed[name], remedy, optional=True)
        measured = speed and Speed(**{name: speed[name] for name in SpeedRecord.__annotations__})
        return Ledger(file, measured, content["seconds"])

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time that a block takes to a trial's, also where it is interrupted."""
        begin = monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + monotonic() - begin
            self.save()

    def save(self) -> None:
        """Write the file."""
        write_checked_json(self.file, {"speed": self.speed, "seconds": self.seconds})
