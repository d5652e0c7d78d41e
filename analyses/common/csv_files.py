"""Tables as CSV files, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mechedit.atomic import atomic


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table's columns, without its index."""
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)
