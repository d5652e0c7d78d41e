"""Damaged copies of files: JSON values of another type, bytes cut and flipped, other encodings, other headers."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mechedit import InputError

OTHER_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 7, 2**63, 10**400, 0.5, -1e308, 1e308, float("nan"), float("inf"), "", "text", "\ud83d",
    "a\0b", "\u202eRome", "x" * 20_000, [], [[]], [None], ["a", 1], [1e308], {}, {"a": 1}, {"layer": []},
)  # fmt: skip
"""Values of every type that JSON has, with the extremes of each."""
OTHER_DTYPES = ("F8_E4M3", "F8_E5M2", "BOOL", "U8", "I64", "I32", "F16", "BF16", "F32", "F64", "C64", "F4", "none")
"""Names of dtypes in headers of safetensors files, one of which does not exist."""


def refusal(call: Callable[[], Any]) -> str | None:
    """The message of the InputError that a call ends in; None where it returns."""
    try:
        call()
    except InputError as error:
        return str(error)
    return None


def mutated_json(content: Any, generator: random.Random) -> Any:
    """A copy of a JSON value with one part of it replaced, removed, doubled or wrapped."""
    content = copy.deepcopy(content)
    places = list(_places(content))
    if not places or generator.random() < 0.03:
        return generator.choice(OTHER_VALUES)
    # Each depth is as likely as the next: most values of a large file are deep inside of lists.
    depth = generator.choice(sorted({depth for _, _, depth in places}))
    parent, key, _ = generator.choice([place for place in places if place[2] == depth])
    value = parent[key]
    match generator.randrange(8):
        case 0:
            del parent[key]
        case 1:
            parent[key] = [value]
        case 2:
            parent[key] = {"text": value}
        case 3 if isinstance(value, list) and value:
            parent[key] = value + value[:1]
        case 4 if isinstance(value, list) and value:
            parent[key] = value[:-1]
        case 5 if isinstance(value, dict) and value:
            parent[key] = {**value, generator.choice(["x", "", "{}", "layer", "id"]): generator.choice(OTHER_VALUES)}
        case _:
            parent[key] = generator.choice(OTHER_VALUES)
    return content


def json_text(content: Any) -> str:
    """JSON, with NaN, infinities and halves of characters as Python writes them."""
    return json.dumps(content)


def mutated_bytes(data: bytes, generator: random.Random) -> bytes:
    """A copy of a file that was cut, overwritten, flipped in some bits or encoded otherwise."""
    if not data:
        return b"\0"
    start = generator.randrange(len(data))
    match generator.randrange(9):
        case 0:
            return data[:start]
        case 1:
            return b""
        case 2:
            return data[:start] + bytes(generator.randrange(256) for _ in range(8)) + data[start + 8 :]
        case 3 | 4:
            damaged = bytearray(data)
            for _ in range(generator.choice([1, 1, 1, 4, 32])):
                # Headers are at the two ends.
                near = min(len(data), generator.choice([16, 256, len(data)]))
                index = generator.choice([generator.randrange(near), -1 - generator.randrange(near)])
                damaged[index] ^= 1 << generator.randrange(8)
            return bytes(damaged)
        case 5:
            return data[start:] + data[:start]
        case 6:
            return data[: start // 2] + data[start:]
        case 7:
            return generator.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"\n\n", b"[" * 5000]) + data
        case _:
            encoding = generator.choice(["utf-16", "utf-32", "utf-16-le", "utf-32-be", "utf-7", "utf-8-sig"])
            return data.decode("latin-1").encode(encoding)


def mutated_safetensors(data: bytes, generator: random.Random) -> bytes:
    """A copy of a safetensors file with another header: its metadata, or a tensor's dtype or shape."""
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    match generator.randrange(8):
        case 0:
            return mutated_bytes(data, generator)
        case 1:
            header = mutated_json(header, generator)
        case 2 if names:
            header, body = _retyped(header, body, generator.choice(names), generator)
        case 3 if names:
            header[generator.choice(names)]["shape"] = generator.choice([[], [0], [1], [2, 2], [2**40, 2**40], [-1]])
        case 4 if names:
            name = generator.choice(names)
            header[generator.choice(["x", "layer.0.left", f"{name}.left", "layer.1e3.left"])] = header.pop(name)
        case _:
            metadata = header.get("__metadata__") or {}
            for key in metadata:
                with contextlib.suppress(json.JSONDecodeError):  # others than ours hold text
                    metadata[key] = json_text(mutated_json(json.loads(metadata[key]), generator))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def mutated_parquet(path: Any, target: Any, generator: random.Random) -> None:
    """Write a damaged copy of a parquet file: other attributes, columns, values, rows or bytes."""
    table = pq.read_table(path)
    name = generator.choice(table.column_names)
    index = table.column_names.index(name)
    size = len(table)
    match generator.randrange(8):
        case 0:
            target.write_bytes(mutated_bytes(path.read_bytes(), generator))
            return
        case 1 | 2:
            metadata = dict(table.schema.metadata or {})
            attrs = json.loads(metadata.get(b"PANDAS_ATTRS", b"{}"))
            metadata[b"PANDAS_ATTRS"] = json_text(mutated_json(attrs, generator)).encode()
            table = table.replace_schema_metadata(metadata)
        case 3:
            table = table.remove_column(index)
        case 4:
            values: Any = generator.choice(
                [["text"] * size, [None] * size, [1e308] * size, [float("nan")] * size, [-1] * size, [b"\xff"] * size,
                 [[1]] * size, [{"a": 1}] * size, [1 + 2**40] * size, [True] * size, [0.5] * size]
            )  # fmt: skip
            table = table.set_column(index, name, pa.array(values))
        case 5:
            column = table.column(name).to_pylist()
            kind = table.column(name).type
            for _ in range(3):
                column[generator.randrange(size)] = None
            table = table.set_column(index, name, pa.array(column, type=kind))
        case 6:
            rows = [generator.randrange(size) for _ in range(generator.choice([0, 1, size // 2, size]))]
            table = table.take(pa.array(rows, type=pa.int64()))
        case _:
            column = table.column(name)
            if pa.types.is_floating(column.type):
                array = np.asarray(column.to_numpy(zero_copy_only=False)).copy()
                array[generator.randrange(size)] = generator.choice([1e308, -1e308, np.inf, np.nan, 0.0])
                table = table.set_column(index, name, pa.array(array))
            else:
                table = table.rename_columns([f"{n}x" if n == name else n for n in table.column_names])
    pq.write_table(table, target)


def _retyped(header: Any, body: bytes, name: str, generator: random.Random) -> tuple[Any, bytes]:
    """A header with one tensor of another dtype and of as many bytes as that takes, behind the others."""
    sizes = {"F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "U8": 1, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "C64": 8}
    dtype = generator.choice(OTHER_DTYPES)
    shape = generator.choice([header[name]["shape"], [], [3], [2, 3], [2, 2], [0, 0]])
    count = int(np.prod(shape)) * sizes.get(dtype, 8)
    values = bytes(count) if generator.random() < 0.5 else bytes(generator.randrange(256) for _ in range(count))
    others = {other: dict(entry) for other, entry in header.items() if other != name}
    parts, offset = [], 0
    for entry in (entry for other, entry in others.items() if other != "__metadata__"):
        first, last = entry["data_offsets"]
        parts.append(body[first:last])
        entry["data_offsets"] = [offset, offset + last - first]
        offset += last - first
    others[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + count]}
    return others, b"".join([*parts, values])


def _places(content: Any, depth: int = 0) -> Iterator[tuple[Any, Any, int]]:
    """Every container with a key or index in it, and its depth."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield content, key, depth
        yield from _places(content[key], depth + 1)
