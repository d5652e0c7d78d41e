"""Tables that finished before an interrupt, kept by what determines them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from mechedit.files import write_parquet
from mechedit.provenance import value_hash


def kept(parts: str | Path | None, key: Any, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """The table of `key`: read from its file in `parts` when it is there, else made and left there.

    Args:
        parts: folder of tables that finished before an interrupt; None keeps none.
        key: all that determines the table, as JSON can hold it; its hash is the file's name.
        make: makes the table.
    """
    if parts is None:
        return make()
    file = Path(parts) / f"{value_hash(key)[:32]}.parquet"
    if file.is_file():
        return pd.read_parquet(file)
    frame = make()
    write_parquet(file, frame)
    return frame
