"""Tidy tables: read one from parquet, whole or in pieces, and choose rows by value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from mechedit.bounds import LARGEST
from mechedit.errors import InputError, brief
from mechedit.files import parquet_errors, parse_json, read_parquet
from mechedit.paths import readable_path
from mechedit.unpacked_size import check_rows

NUMERIC = frozenset(
    ("layer", "position", "score", "corrupted", "clean", "effect", "samples", "value", "first", "last", "mean", "low",
     "high", "window")
)  # fmt: skip
"""Columns that hold numbers in every table in which they stand."""
PLACES = frozenset(("layer", "position", "first", "last", "samples", "window"))
"""Those of them that hold a whole number in every row; they are read as integers."""
LABELS = frozenset(("fact", "kind", "sever", "role", "metric"))
"""Columns that say in every row what it is of."""


def read_table(path: str | Path, columns: Sequence[str] = (), **equal: Any) -> pd.DataFrame:
    """Read a parquet file, or only its rows whose columns hold the given values.

    Args:
        path: of the file.
        columns: that it must have.
        **equal: values by column.

    Raises:
        InputError: there is no such file, or it is not parquet or was cut short; it lacks a column; a column holds
            values of another type, or numbers that no mean could be taken of.
    """
    with parquet_errors(path):
        path = readable_path(path)
        schema = ParquetFile(path).schema_arrow
        _checked_attrs(schema, path)
        _check_schema(schema, path, [*columns, *equal])
        frame = read_parquet(path, filters=[(column, "==", value) for column, value in equal.items()] or None)
        return _checked_values(frame, path)


def iter_table(path: str | Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[pd.DataFrame]:
    """Read some columns of a parquet file in pieces small enough for memory, each with the file's attrs.

    Args:
        path: of the file.
        columns: that it must have.
        optional: read where the file has them.

    Raises:
        InputError: as `read_table`; or the file lacks a column.
    """
    with parquet_errors(path), ParquetFile(readable_path(path), page_checksum_verification=True) as file:
        check_rows(path, file.metadata.num_rows)
        attrs = _checked_attrs(file.schema_arrow, path)
        _check_schema(file.schema_arrow, path, columns)
        present = [column for column in optional if column in file.schema_arrow.names]
        for batch in file.iter_batches(columns=[*columns, *present]):
            frame: Any = _checked_values(batch.to_pandas(), path)
            frame.attrs = attrs
            yield frame
            del frame, batch  # before the next ones are read


def _checked_attrs(schema: pa.Schema, path: str | Path) -> dict[str, Any]:
    """The attributes of a table.

    Raises:
        InputError: they are no object.
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
    return attrs


def _check_schema(schema: pa.Schema, path: str | Path, columns: Sequence[str]) -> None:
    """Refuse a table that lacks columns, or has text in one of numbers, or lists, objects or bytes in any.

    Raises:
        InputError: names the column.
    """
    if missing := [column for column in columns if column not in schema.names]:
        raise InputError(
            f"the table {str(path)!r} lacks {', '.join(missing)}; expected the columns {', '.join(columns)}: "
            f"check the path"
        )
    for name in schema.names:
        kind = schema.field(name).type
        if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            raise InputError(
                f"the column {name!r:.80} of the table {str(path)!r} holds {kind!s:.80}, expected text or numbers; "
                f"make the table again"
            )
    for name in NUMERIC.intersection(schema.names):
        kind = schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
            raise InputError(
                f"the column {name!r} of the table {str(path)!r} holds {kind}, expected numbers; make the table again"
            )


def _checked_values(frame: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """The table with places as integers; refuse numbers too large to add, places with fractions, rows without a label.

    Raises:
        InputError: names the column.
    """
    for name in LABELS.intersection(map(str, frame.columns)):
        if frame[name].isna().to_numpy().any():
            raise InputError(
                f"the column {name!r} of the table {str(path)!r} has gaps, expected a value in each row; make the "
                f"table again"
            )
    for name in NUMERIC.intersection(map(str, frame.columns)):
        values = frame[name].to_numpy(dtype=float, na_value=np.nan)
        if (np.abs(values) > LARGEST).any():
            raise InputError(
                f"the column {name!r} of the table {str(path)!r} holds numbers beyond {LARGEST:g}, or infinite ones, "
                f"expected finite ones; make the table again"
            )
        if name in PLACES and not (values == np.floor(values)).all():  # NaN is none either
            raise InputError(
                f"the column {name!r} of the table {str(path)!r} has gaps or fractions, expected a whole number in "
                f"each row; make the table again"
            )
        if name in PLACES and not pd.api.types.is_integer_dtype(frame[name]):
            frame[name] = values.astype(np.int64)
    return frame


def where(frame: pd.DataFrame, **equal: Any) -> pd.DataFrame:
    """The rows whose columns hold the given values."""
    for column, value in equal.items():
        frame = frame.loc[np.asarray(frame[column] == value, dtype=bool), :]
    return frame
