"""A folder of finished steps: made once, reused when nothing that determines them has changed.

`config.json` holds a stamp for every finished step: what went in (model, input hashes, settings). A step
whose stamp is found again is read from its files; another stamp is an error, unless it may be overwritten.
A stamp is written after the step's files, so an interrupted step is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mechedit.files import plain_copy, read_json, writable_folder, write_json
from mechedit.provenance import VERSION, check_provenance

Result = TypeVar("Result")


@dataclass(frozen=True)
class RunFolder:
    """A folder of results and the stamps of the steps that made them."""

    path: Path
    overwrite: bool = False
    """Replace results with another stamp instead of refusing."""

    @staticmethod
    def at(path: str | Path, *, overwrite: bool = False) -> RunFolder:
        """Open or make a folder to write to.

        Raises:
            InputError: it cannot be made or written to.
        """
        return RunFolder(writable_folder(path), overwrite)

    def step(
        self,
        name: str,
        stamp: Mapping[str, Any],
        files: Sequence[str],
        make: Callable[[], Result],
        save: Callable[[Result], None],
        load: Callable[[], Result],
    ) -> Result:
        """Load the step's result when it was made with the same stamp, else make and save it.

        Raises:
            InputError: the folder holds this step with another stamp and `overwrite` is off.
        """
        stamp = plain_copy(stamp)
        stamps = self.stamps()
        if name in stamps and all((self.path / file).is_file() for file in files):
            if stamps[name] == stamp:
                return load()
            if not self.overwrite:
                check_provenance(
                    _flat(stamps[name]), _flat(stamp), f"the {name} in {str(self.path)!r}",
                    remedy="choose another --out, or pass --overwrite",
                )  # fmt: skip
        # Without its stamp a half-replaced result cannot be mistaken for a whole one.
        self._write({other: kept for other, kept in stamps.items() if other != name})
        result = make()
        save(result)
        self._write({**self.stamps(), name: stamp})
        return result

    def stamps(self) -> dict[str, Any]:
        """The finished steps and what went into them."""
        file = self.path / "config.json"
        return read_json(file).get("steps", {}) if file.is_file() else {}

    def _write(self, stamps: Mapping[str, Any]) -> None:
        write_json(self.path / "config.json", {"mechedit": VERSION, "steps": dict(stamps)})


def _flat(stamp: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, so that an error can name the one that differs."""
    flat: dict[str, Any] = {}
    for key, value in stamp.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
