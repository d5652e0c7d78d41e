"""The convergence curves of a results folder, in one file: moments/convergence.parquet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechedit.files import write_parquet
from mechedit.locks import locked
from mechedit.moments.convergence import COLUMNS
from mechedit.tables import read_table, where


@dataclass(frozen=True, eq=False)
class ConvergenceFile:
    """The curves in a folder that have the same provenance and settings; a file with others counts as absent."""

    folder: Path
    """The results folder."""
    attrs: Mapping[str, Any]
    """Provenance and settings that the curves have in common."""

    def load(self, layer: int) -> pd.DataFrame | None:
        """The curve of one layer; None if there is none."""
        curves = self._read()
        if curves is None or layer not in set(curves["layer"]):
            return None
        return where(curves, layer=layer).reset_index(drop=True)

    def save(self, curve: pd.DataFrame, layer: int) -> None:
        """Add the curve of one layer to the file, or replace it there."""
        with locked(curve_path(self.folder), repr(str(curve_path(self.folder))), wait=True):
            self._replace(curve, layer)

    def _replace(self, curve: pd.DataFrame, layer: int) -> None:
        curves = self._read()
        others = [] if curves is None else [curves.loc[curves["layer"] != layer, :]]
        frame = pd.concat([*others, curve]).sort_values(by=["layer", "tokens"], ignore_index=True)
        frame.attrs = {**self.attrs}
        write_parquet(curve_path(self.folder), frame)

    def _read(self) -> pd.DataFrame | None:
        path = curve_path(self.folder)
        curves = read_table(path, COLUMNS) if path.is_file() else None
        return curves if curves is not None and curves.attrs == self.attrs else None


def curve_path(folder: str | Path) -> Path:
    """Path of the convergence curves in a results folder."""
    return Path(folder) / "moments" / "convergence.parquet"
