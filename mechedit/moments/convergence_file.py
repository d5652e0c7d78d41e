"""The curves of a results folder: moments/convergence.parquet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechedit.files import write_parquet
from mechedit.tables import read_table, where


@dataclass(frozen=True, eq=False)
class CurveFile:
    """The curves in a folder that were made alike; others are as if they were not there."""

    folder: Path
    attrs: Mapping[str, Any]
    """What the curves have in common: provenance and settings."""

    def layer(self, layer: int) -> pd.DataFrame | None:
        """The curve of one layer."""
        found = self._found()
        if found is None or layer not in set(found["layer"]):
            return None
        return where(found, layer=layer).reset_index(drop=True)

    def save(self, curve: pd.DataFrame, layer: int) -> None:
        """Put the curve of one layer beside the others."""
        found = self._found()
        others = [] if found is None else [where(found, layer=other) for other in set(found["layer"]) - {layer}]
        frame = pd.concat([*others, curve]).sort_values(by=["layer", "tokens"], ignore_index=True)
        frame.attrs = {**self.attrs}
        write_parquet(curve_path(self.folder), frame)

    def _found(self) -> pd.DataFrame | None:
        path = curve_path(self.folder)
        found = read_table(path) if path.is_file() else None
        return found if found is not None and found.attrs == self.attrs else None


def curve_path(folder: str | Path) -> Path:
    """Where the curves lie in a results folder."""
    return Path(folder) / "moments" / "convergence.parquet"
