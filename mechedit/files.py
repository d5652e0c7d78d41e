"""Atomic files: JSON, parquet and safetensors that appear whole or not at all."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import re
import shutil
import stat
import tempfile
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

from mechedit.checksums import (
    CONTENT,
    HEADER,
    checks_content,
    content_checksum,
    header_checksum,
    tensor_checksums,
)
from mechedit.errors import InputError, brief
from mechedit.temporary_names import sweep, sweep_once, temporary_name

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; on success fsync what was written there and rename it to `path`, else remove it.

    The temporary path has the name of `path`, in a hidden folder beside it whose name says which process writes there
    (`mechedit.temporary_names`): what writers leave beside their files is removed with it.

    Raises:
        InputError: the folder cannot be made or written to, or the disk does not take the file.
    """
    path = Path(path)
    writable_folder(path.parent)
    sweep_once(path.parent)
    folder = path.parent / temporary_name(path.stem)
    try:
        with writing(path):
            folder.mkdir(mode=0o700)
            temporary = folder / path.name
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            # Some writers make files private; results get the permissions any other new file would have.
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(folder: str | Path, *, replaces: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on success rename it to `folder`, else remove it.

    Args:
        folder: path of the folder that appears on success; where it is a link, the folder that the link leads to.
        replaces: name of a file that marks a folder as replaceable; a folder without it is never replaced.

    Raises:
        InputError: `folder` exists and is not an empty folder, or cannot be made; the disk does not take its files.
    """
    folder = checked_path(folder).resolve()
    replaced = replaces is not None and (folder / replaces).is_file()
    if folder.exists() and not replaced and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"{str(folder)!r} exists already, expected a new or an empty folder; choose another or remove it"
        )
    writable_folder(folder.parent)
    sweep([folder.parent])
    temporary = folder.parent / temporary_name(folder.name)
    try:
        with writing(folder):
            temporary.mkdir(mode=0o700)
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            if replaced:
                folder.rename(temporary.with_name(temporary.name + ".old"))
            temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(temporary.with_name(temporary.name + ".old"), ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of a disk that does not take a file, whichever library writes it, into an InputError.

    Raises:
        InputError: names the path and the reason.
    """
    try:
        yield
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        raise InputError(
            f"cannot write {str(path)!r} ({reason}), and left nothing of it there; free space, or choose another "
            f"folder, and run the same again, which goes on from what is finished"
        ) from error


def disk_error(error: BaseException) -> str | None:
    """Why the operating system did not read or write a file; None for an error of another kind.

    Libraries in Rust tell the error's number only in their message, and those that clean up after it raise another one.
    """
    reasons: list[str] = []
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, InputError):
        number = seen.errno if isinstance(seen, OSError) else None
        if number is None and (match := _RUST_ERROR.search(str(seen))):
            number = int(match[1])
        if number in _DISK_ERRORS:
            reasons.append(os.strerror(number))
        elif number is None and isinstance(seen, OSError) and "writ" in str(seen):  # Pillow, NumPy
            reasons.append(str(seen))
        seen = seen.__cause__ or seen.__context__
    return reasons[-1] if reasons else None


_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_DISK_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EBUSY,
     errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.EMFILE,
     errno.ENFILE, errno.EXDEV, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EMLINK, errno.ETXTBSY)
)  # fmt: skip
"""Errors that say something about a disk or a folder, and nothing about a program."""


def checked_path(path: str | Path) -> Path:
    """The path, unless no file system could hold it.

    Raises:
        InputError: it is too long, or has a null character in it.
    """
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.stat(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{str(path)!r:.80} cannot be a path ({reason}); expected that of a file or folder: check it"
        ) from error
    return Path(path)


def readable_path(path: str | Path) -> Path:
    """The path, unless reading from it might never end: what is there is a pipe, a socket or a device.

    Raises:
        InputError: it is one of these, or as `checked_path`.
    """
    path = checked_path(path)
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(
                f"{brief(str(path))} is a pipe, a socket or a device, expected a file, which can be read twice; "
                f"write its content to a file first"
            )
    return path


def writable_folder(folder: str | Path) -> Path:
    """Make `folder` when absent and return it.

    Raises:
        InputError: it is a file, or cannot be made or written to.
    """
    folder = checked_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InputError(
            f"cannot write to the folder {str(folder)!r} ({error.strerror}); expected a folder that can be "
            f"written to: choose another with --out"
        ) from error


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically; dataclasses become objects, NaN is refused."""
    text = json.dumps(content, indent=2, default=plain, allow_nan=False, ensure_ascii=False)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


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
            f"cannot read the table {str(path)!r} ({str(error).partition(chr(10))[0]}); expected a parquet "
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
            return {name: archive[name] for name in archive.files}
    except InputError:
        raise
    except (Exception, MemoryError) as error:  # a damaged header fails with any error, or asks for any memory
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{str(path)!r} cannot be read as a NumPy file ({reason:.200}); expected arrays of numbers in .npy or "
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
        with safe_open(readable_path(path), framework="pt") as reader:
            yield reader
    except (SafetensorError, AttributeError) as error:  # torch may lack the dtype that a header names
        raise InputError(
            f"{str(path)!r} is not a safetensors file, or was cut short ({error}); expected one that "
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
