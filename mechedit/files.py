"""Files of results: JSON, parquet and safetensors, written whole or not at all, and read with their damage named."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechedit.atomic import atomic
from mechedit.checksums import (
    CONTENT,
    HEADER,
    checks_content,
    content_checksum,
    header_checksum,
    tensor_checksums,
    with_checksum,
    without_checksum,
)
from mechedit.errors import InputError, brief, first_line
from mechedit.paths import readable_path
from mechedit.unpacked_size import check_packed, check_rows

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically; dataclasses become objects, NaN is refused."""
    text = json.dumps(content, indent=2, default=plain, allow_nan=False, ensure_ascii=False)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_checked_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """As `write_json`, an object with its checksum (`sha256`)."""
    write_json(path, with_checksum(plain_copy(content)))


def write_parquet(path: str | Path, frame: pd.DataFrame) -> None:
    """Write a frame with its attrs, atomically, and with a checksum of each page."""
    with atomic(path) as temporary:
        frame.to_parquet(temporary, index=False, write_page_checksum=True)


def read_parquet(path: str | Path, **options: Any) -> pd.DataFrame:
    """Read a frame with its attrs; `options` are those of `pyarrow.parquet.read_table`.

    Raises:
        InputError: there is no such file; it is not parquet, was cut short or is damaged.
    """
    with parquet_errors(path):
        check_rows(path, pq.read_metadata(readable_path(path)).num_rows)
        return pd.read_parquet(path, page_checksum_verification=True, **options)


@contextlib.contextmanager
def parquet_errors(path: str | Path) -> Iterator[None]:
    """Turn the errors of reading a parquet file into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"cannot read the table {str(path)!r} ({first_line(error)}); expected a parquet "
            f"file that mechedit wrote: remove it, and make it again"
        ) from error


def write_parquet_parts(path: str | Path, frames: Iterable[pd.DataFrame], attrs: Mapping[str, Any]) -> None:
    """Write frames of the same columns one after another to one file with these attrs, atomically.

    One frame at a time is in memory.
    """
    with atomic(path) as temporary, contextlib.ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for frame in frames:
            table = pa.Table.from_pandas(frame, preserve_index=False)
            if writer is None:
                metadata = {b"PANDAS_ATTRS": json.dumps(dict(attrs)).encode(), **(table.schema.metadata or {})}
                schema = table.schema.with_metadata(metadata)
                writer = stack.enter_context(pq.ParquetWriter(temporary, schema, write_page_checksum=True))
            writer.write_table(table.replace_schema_metadata(writer.schema.metadata))


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: there is no such file, or it is not JSON (the message names the line).
    """
    path = Path(path)
    return parse_json(read_text(path), repr(str(path)), "fix the file or make it again")


def read_object(path: str | Path, *objects: str) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: path of the file.
        objects: names of fields that hold objects themselves, where they are there and not null.

    Raises:
        InputError: as `read_json`, or the file or one of these fields holds something else.
    """
    content = read_json(path)
    _check_object(content, repr(str(path)))
    for name in objects:
        if content.get(name) is not None:
            _check_object(content[name], f"{name!r} in {str(path)!r}")
    return content


def read_checked_object(path: str | Path, *objects: str, remedy: str) -> dict[str, Any]:
    """Read what `write_checked_json` wrote, without its checksum; a file of an earlier release has none.

    Args:
        path: path of the file.
        objects: as in `read_object`.
        remedy: how the file is made again.

    Raises:
        InputError: as `read_object`, or the file is not as it was written.
    """
    return without_checksum(read_object(path, *objects), repr(str(path)), remedy)


def parse_json(text: str, what: str, remedy: str, *, finite: bool = True) -> Any:
    """Read JSON.

    Args:
        text: to read.
        what: names the file or its part in messages.
        remedy: what to do about text that is not JSON.
        finite: refuse infinity and NaN, which JSON does not have and Python reads, and numbers beyond float64.

    Raises:
        InputError: it is not JSON (the message names the place), is nested too deep, or holds a number of thousands of
            digits.
    """
    read = functools.partial(_finite, what, remedy) if finite else float
    read_integer = functools.partial(_whole, what, remedy)
    try:
        return json.loads(text, parse_constant=read, parse_float=read, parse_int=read_integer)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{what} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}; {remedy}"
        ) from error
    except RecursionError as error:
        raise InputError(f"{what} holds lists or objects in each other, deeper than can be read; {remedy}") from error
    except InputError:
        raise
    except ValueError as error:  # Python reads no whole number of more than 4,300 digits
        raise InputError(f"{what} holds a number of thousands of digits; {remedy}") from error


def _finite(what: str, remedy: str, digits: str) -> float:
    """A number of JSON, which may be written larger than any float, or as the name of infinity or NaN."""
    if not math.isfinite(value := float(digits)):
        raise InputError(f"{what} holds the number {digits:.40}, expected finite ones; {remedy}")
    return value


def _whole(what: str, remedy: str, digits: str) -> int:
    """A whole number of JSON, which some reader may turn into a float."""
    value = int(digits)
    _finite(what, remedy, digits)
    return value


def _check_object(content: Any, what: str) -> None:
    if not isinstance(content, dict):
        raise InputError(
            f"{what} is {brief(content)}, expected a JSON object; fix the file, or remove it and make it again"
        )


def read_text(path: str | Path) -> str:
    """Read a UTF-8, UTF-16 or UTF-32 file, without its byte-order mark and with one line feed at the end of each line.

    Raises:
        InputError: there is no such file, it is a folder, or its encoding is another one.
    """
    path = readable_path(path)
    try:
        content = path.read_bytes()
        text = content.decode(_encoding(content)).removeprefix("\ufeff")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{str(path)!r} is not {_encoding(content).upper()} text (byte {error.start}: {error.reason}); save it as "
            f"UTF-8"
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot read the file {str(path)!r} ({error.strerror}); expected an existing file: check the path"
        ) from error


def _encoding(content: bytes) -> str:
    """That of the byte-order mark that a file begins with; UTF-16 where a null stands in its first character; UTF-8."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    first, second = (content[:2] + b"..")[:2]
    if second == 0:
        return "utf-16-le"
    return "utf-16-be" if first == 0 else "utf-8"


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file by name, or the one of an .npy file by the name "".

    Pickled objects are never loaded, since unpickling runs code.

    Raises:
        InputError: there is no such file, or it is no NumPy file, damaged, or pickled.
    """
    try:
        content = np.load(readable_path(path), allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"": content}
        with content as archive:
            check_packed(archive.zip.infolist(), path)
            return {name: archive[name] for name in archive.files}
    except InputError:
        raise
    except (Exception, MemoryError) as error:  # a damaged header fails with any error, or asks for any memory
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"{str(path)!r} cannot be read as a NumPy file ({reason}); expected arrays of numbers in .npy or "
            f".npz: check the path, or download it again"
        ) from error


def plain(value: Any) -> Any:
    """Convert a dataclass, path, tensor or NumPy value to a type that JSON can hold.

    A value that has a method `plain` says itself how it is held.

    Raises:
        TypeError: a value of another type.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        to_plain = getattr(value, "plain", None)
        return to_plain() if callable(to_plain) else dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    if callable(to_list := getattr(value, "tolist", None)):
        return to_list()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def plain_copy(value: Any) -> Any:
    """The value that JSON reads back after `value` was written to it: tuples become lists, keys become strings."""
    return json.loads(json.dumps(value, default=plain))


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], key: str, header: Any) -> None:
    """Write tensors as safetensors, with `header` as JSON under `key` in the file's metadata, atomically.

    A header that is an object also holds the file's checksums (`mechedit.checksums`), which no reader returns.
    """
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(header, default=plain, allow_nan=False, ensure_ascii=False)
    if isinstance(header, Mapping):
        fields = json.loads(text)
        text = json.dumps({**fields, **tensor_checksums(on_cpu, fields)}, ensure_ascii=False)
    with atomic(path) as temporary:
        save_file(on_cpu, temporary, metadata={key: text})


def read_tensors(path: str | Path, key: str, *, mapped: bool = False) -> tuple[dict[str, Tensor], Any]:
    """Read the tensors and the header that `write_tensors` wrote.

    Args:
        path: path of the file.
        key: key of the header in the file's metadata.
        mapped: leave the tensors in the file until they are needed. The file may then be replaced, but not written
            over.

    Raises:
        InputError: there is no such file; it is not safetensors or cut short; it lacks the header; it is not as it was
            written; a tensor is of another type than numbers of 16, 32 or 64 bits with a floating point.
    """
    with open_tensors(path) as reader:
        # Cloned, since safetensors maps the file: were it overwritten, reading it would end the process.
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        tensors = tensors if mapped else {name: tensor.clone() for name, tensor in tensors.items()}
        header = _checked(_header(reader, path, key), tensors, path, key, content=not mapped)
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                raise InputError(
                    f"{str(path)!r} holds the tensor {name!r:.80} in {str(tensor.dtype).removeprefix('torch.')}, "
                    f"expected float64, float32, bfloat16 or float16; make the file again"
                )
        return tensors, header


def read_header(path: str | Path, key: str) -> dict[str, Any]:
    """Read only the header that `write_tensors` wrote, an object.

    Raises:
        InputError: as `read_tensors`, or the header is no object.
    """
    with open_tensors(path) as reader:
        header = _header(reader, path, key)
        _check_object(header, f"the {key} in the header of {str(path)!r}")
        # Mapped, so that only names, dtypes and shapes are read.
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        return _checked(header, tensors, path, key, content=False)


_REMEDIES = {
    "manifest": "make the edit again with mechedit edit, or copy it again",
    "provenance": "remove it, and collect it again with mechedit moments",
    "editor": "train it again with mechedit train-mend, or copy it again",
    "targets": "remove it, and the same command finds these targets again",
    "batch": "the batches are not as the session left them: remove it and all later ones, and write them again",
}
"""How a file is made again, by the key of its header."""


def _checked(header: Any, tensors: Mapping[str, Tensor], path: str | Path, key: str, *, content: bool) -> Any:
    """The header without its checksums, once the file was held against them; older files have none.

    Raises:
        InputError: the file is not as it was written.
    """
    if not isinstance(header, dict) or not {HEADER, CONTENT} & header.keys():
        return header
    fields = {name: value for name, value in header.items() if name not in (HEADER, CONTENT)}
    outer, size = header_checksum(tensors, fields), sum(tensor.nbytes for tensor in tensors.values())
    intact = {
        "header": outer == header.get(HEADER),
        "content": not (content and checks_content(size)) or content_checksum(tensors, outer) == header.get(CONTENT),
    }
    for part, holds in intact.items():
        if not holds:
            raise InputError(
                f"{str(path)!r} is not as it was written (its {part} does not match its SHA-256), expected an "
                f"undamaged file; {_REMEDIES.get(key, 'remove it, and make it again')}"
            )
    return fields


@contextlib.contextmanager
def open_tensors(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        InputError: there is no such file, or it is not safetensors or cut short.
    """
    try:
        with readable_path(path).open("rb"):
            pass  # of a file that may not be read, safetensors says that it is not there
        with safe_open(path, framework="pt") as reader:
            yield reader
    except (SafetensorError, AttributeError) as error:  # torch may lack the dtype that a header names
        raise InputError(
            f"{str(path)!r} is not a safetensors file, or was cut short ({first_line(error)}); expected one that "
            f"mechedit wrote: make it again"
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot read the file {str(path)!r} ({error.strerror or error}); expected an existing file: check the path"
        ) from error


def _header(reader: Any, path: str | Path, key: str) -> Any:
    text = (reader.metadata() or {}).get(key)
    if text is None:
        raise InputError(
            f"{str(path)!r} has no {key!r} in its header; expected a file that mechedit wrote: check the path"
        )
    return parse_json(text, f"the {key} in the header of {str(path)!r}", "make the file again")
