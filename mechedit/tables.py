"""Tidy tables: read one from parquet, whole or in pieces, and choose rows by value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from mechedit.errors import InputError, brief
from mechedit.files import parquet_errors, parse_json, read_parquet

NUMERIC = frozenset(
    ("layer", "position", "score", "corrupted", "clean", "effect", "samples", "value", "first", "last", "mean", "low",
     "high")
)  # fmt: skip
"""Columns that hold numbers in every table in which they stand."""


def read_table(path: str | Path, **equal: Any) -> pd.DataFrame:
    """Read a parquet file, or only its rows whose columns hold the given values.

    Raises:
        InputError: there is no such file, or it is not parquet or was cut short.
    """
    with parquet_errors(path):
        _check_schema(ParquetFile(path).schema_arrow, path)
        return read_parquet(path, filters=[(column, "==", value) for column, value in equal.items()] or None)


def iter_table(path: str | Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[pd.DataFrame]:
    """Read some columns of a parquet file in pieces small enough for memory, each with the file's attrs.

    Args:
        path: of the file.
        columns: that it must have.
        optional: read where the file has them.

    Raises:
        InputError: as `read_table`; or the file lacks a column.
    """
    with parquet_errors(path), ParquetFile(path, page_checksum_verification=True) as file:
        if missing := [column for column in columns if column not in file.schema_arrow.names]:
            raise InputError(
                f"the table {str(path)!r} lacks {', '.join(missing)}; expected the columns {', '.join(columns)}: "
                f"check the path"
            )
        _check_schema(file.schema_arrow, path)
        attrs = json.loads((file.schema_arrow.metadata or {}).get(b"PANDAS_ATTRS", b"{}"))
        present = [column for column in optional if column in file.schema_arrow.names]
        for batch in file.iter_batches(columns=[*columns, *present]):
            frame = batch.to_pandas()
            frame.attrs = attrs
            yield frame
            del frame, batch  # before the next ones are read


def _check_schema(schema: pa.Schema, path: str | Path) -> None:
    """Refuse text in a column of numbers, and attributes that are no object.

    Raises:
        InputError: names the column or the attributes.
    """
    attrs = parse_json(
        (schema.metadata or {}).get(b"PANDAS_ATTRS", b"{}").decode(),
        f"the attributes of {str(path)!r}",
        "make the table again",
        finite=False,  # a correlation that is not defined is NaN there
    )
    if not isinstance(attrs, dict):
        raise InputError(
            f"the attributes of the table {str(path)!r} are {brief(attrs)}, expected an object; make it again"
        )
    for name in NUMERIC.intersection(schema.names):
        kind = schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
            raise InputError(
                f"the column {name!r} of the table {str(path)!r} holds {kind}, expected numbers; make the table again"
            )


def where(frame: pd.DataFrame, **equal: Any) -> pd.DataFrame:
    """The rows whose columns hold the given values."""
    for column, value in equal.items():
        frame = frame.loc[np.asarray(frame[column] == value, dtype=bool), :]
    return frame
