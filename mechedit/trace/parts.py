"""The finished groups of a trace, each a table in trace_parts/, read with damage to their columns named."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mechedit.cache import Codec
from mechedit.errors import InputError, brief_list
from mechedit.files import read_parquet, write_parquet
from mechedit.tables import NUMERIC, PLACES
from mechedit.trace.columns import APPROXIMATE_COLUMNS, COLUMNS


def read_part(path: str | Path) -> pd.DataFrame:
    """The effects of a group.

    Raises:
        InputError: as `read_parquet`; or the columns are not those of effects, or hold numbers of another type.
    """
    frame = read_parquet(path)
    names = tuple(map(str, frame.columns))
    if names not in (COLUMNS, (*COLUMNS, *APPROXIMATE_COLUMNS)):
        unknown = [name for name in names if name not in (*COLUMNS, *APPROXIMATE_COLUMNS)]
        missing = [name for name in COLUMNS if name not in names]
        raise InputError(
            f"{str(path)!r} is damaged: it has the columns {brief_list(unknown)} and lacks {brief_list(missing)}, "
            f"expected those of effects; remove it, and the same command makes it again"
        )
    for name in NUMERIC.intersection(COLUMNS):
        kinds = "iu" if name in PLACES else "f"
        if getattr(frame[name].dtype, "kind", "O") not in kinds:
            raise InputError(
                f"{str(path)!r} is damaged: its column {name!r} holds {frame[name].dtype}, expected "
                f"{'whole numbers' if name in PLACES else 'numbers'}; remove it, and the same command makes it again"
            )
    return frame


PART: Codec[pd.DataFrame] = Codec(read=read_part, write=write_parquet, suffix=".parquet")
"""Effects of a group with their attrs."""
