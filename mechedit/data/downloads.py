"""Files from the web: downloaded once, with progress; resumed after an interruption; checked at each use.

In: a URL, with the file's size and SHA-256 where they are known. Out: a path in the cache folder. A file whose hash is
not known is trusted on first use, once it could be read: its hash is then written beside it, and every later use is
checked against that.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from mechedit.cache import cache_folder
from mechedit.data.json_records import UnclearRecordError
from mechedit.errors import InputError, brief
from mechedit.files import read_json, read_object, write_json
from mechedit.locks import locked
from mechedit.progress import progress_bar
from mechedit.provenance import VERSION, file_hash
from mechedit.records import Whole, check_record

READ_BYTES = 1 << 18
"""Most bytes read from the server at a time."""
SLOWEST = 1000
"""Bytes per second below which a download is given up: a server that sends a byte now and then never ends."""

LARGEST = 1 << 35
"""Bytes above which a file of unknown size is given up: a server that never ends would fill the disk."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file on the web."""

    url: str
    sha256: str | None = None
    """Expected hash in hex; None if it is not known: then the first download is trusted."""
    size: int | None = None
    """Expected size in bytes; None if it is not known."""

    @property
    def name(self) -> str:
        """The file's name in the cache folder."""
        return self.url.rpartition("/")[2]


class PinRecord(TypedDict):
    """The content of the file beside a download."""

    size: Whole
    sha256: str


@dataclass(frozen=True)
class _Response:
    """Headers of a server's answer."""

    offset: int
    """Byte of the file at which the answer begins."""
    total: int | None
    """Size of the complete file in bytes; None if the server does not say."""
    validator: str | None
    """The server's name for this version of the file; the rest is requested only if it has not changed."""


Check = Callable[[Path], object]
"""Reads a file, and raises InputError where it is not what was expected."""


def fetch(
    remote: RemoteFile, cache: str | Path | None = None, *, check: Check | None = None, timeout: float = 30.0
) -> Path:
    """Path of a file in the cache, downloaded if it is not there; if it is, no network is needed.

    Bytes read before an interruption are kept as NAME.part, and the next call requests only the rest. If the server
    does not support that, or has another version by then, the download starts again. Several processes may fetch the
    same file at once.

    Args:
        remote: the file.
        cache: folder for downloads; `cache_folder()` by default.
        check: reads the file before its hash is trusted; that of a login page or of half a file is never.
        timeout: seconds without an answer, or with fewer than `SLOWEST` bytes in each of them, after which the download
            fails.

    Raises:
        InputError: the server cannot be reached, refuses, is too slow, ends early or sends too much; what it sent is
            empty or cannot be read; the file's size or hash is not the expected one, or not that of the first download;
            the folder cannot be written to.
    """
    path = Path(cache or cache_folder()) / remote.name
    expected = _expected(remote, path)
    if path.is_file() and expected.sha256:
        _check(path, expected, f"remove {str(path)!r} and download it again")
        return path
    with locked(path, f"the download {str(path)!r}", wait=True):
        if not path.is_file():
            _download_and_check(remote, path, check, timeout)
        _check(path, _expected(remote, path), f"remove {str(path)!r} and download it again")
        if not hash_file(path).is_file():
            _read_first(path, check, f"{str(path)!r} is not the file {remote.url}", "remove it and download it again")
            content = {"url": remote.url, "size": path.stat().st_size, "sha256": file_hash(path)}
            write_json(hash_file(path), content)
    return path


def _download_and_check(remote: RemoteFile, path: Path, check: Check | None, timeout: float) -> None:
    """Download a file, check it, and move it to its path."""
    partial = _download(remote, path, timeout)
    try:
        _check(
            partial, _expected(remote, path),
            f"what was read is removed: try again. If that does not help, the published file has changed: to "
            f"trust the new one, remove {str(hash_file(path))!r}",
        )  # fmt: skip
        _read_first(
            partial, check, f"{remote.url} sent what is not {path.name}, such as a login page or a part of it",
            f"what was read is removed: try again, {_by_hand(path)}",
        )  # fmt: skip
    except InputError:
        _remove_partial(partial)
        raise
    partial.replace(path)


def _read_first(path: Path, check: Check | None, what: str, remedy: str) -> None:
    """Raise InputError when a file that nothing vouches for is empty, or cannot be read."""
    reason = "" if path.stat().st_size else "it is empty"
    if not reason and check is not None:
        try:
            check(path)
        except InputError as error:
            reason = str(error)
    if reason:
        raise InputError(f"{what} ({reason:.300}); {remedy}")


@contextlib.contextmanager
def starting_over(path: Path) -> Iterator[None]:
    """Say how a download that cannot be read is made again, where an earlier release has kept it."""
    try:
        yield
    except UnclearRecordError:
        raise
    except InputError as error:
        if not os.path.isfile(hash_file(path)):
            raise
        raise InputError(
            f"{error}. It was downloaded: to do that again, remove {str(path)!r} and {str(hash_file(path))!r}"
        ) from error


def hash_file(path: Path) -> Path:
    """The file beside a download that holds its size and hash."""
    return path.parent / f"{path.name}.sha256.json"  # a folder such as . has no name


def _expected(remote: RemoteFile, path: Path) -> RemoteFile:
    """The file with its size and hash: as given, else those of the first download, if there was one."""
    file = hash_file(path)
    if remote.sha256 or not file.is_file():
        return remote
    content = read_json(file)
    check_record(content, PinRecord, repr(str(file)), f"remove it, to trust {path.name} as it is")
    return replace(remote, sha256=content["sha256"], size=content["size"])


def _check(path: Path, expected: RemoteFile, remedy: str) -> None:
    """Raise InputError when a file does not have the expected size and hash."""
    for what, actual, value in (
        ("bytes", path.stat().st_size, expected.size),
        ("SHA-256", file_hash(path) if expected.sha256 else None, expected.sha256),
    ):
        if value is not None and actual != value:
            raise InputError(f"{expected.name} from {expected.url} has {what} {actual}, expected {value}; {remedy}")


def _remove_partial(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _version_file(partial).unlink(missing_ok=True)


def _version_file(partial: Path) -> Path:
    """The file beside a partial download that says of which version it is."""
    return partial.with_name(f"{partial.name}.json")


def _download(remote: RemoteFile, path: Path, timeout: float) -> Path:
    """Read the file, or the rest of it, to PATH.part, and return that path."""
    partial = path.with_name(f"{path.name}.part")
    try:
        with _open(remote, partial, timeout) as stream:
            response = _read_headers(stream)
            size = response.total if response.total is not None else remote.size
            if remote.size is not None and size != remote.size:
                _remove_partial(partial)
                raise InputError(
                    f"{remote.url} has {size} bytes, expected {remote.size}; the published file has changed: "
                    f"give the path of the one you want"
                )
            if not response.offset:
                # Before the new version is noted, since the bytes here may be of another one.
                partial.unlink(missing_ok=True)
            write_json(_version_file(partial), {"url": remote.url, "validator": response.validator})
            _append(_in_time(_blocks(stream), timeout), partial, response.offset, size, path.name)
    except urllib.error.HTTPError as error:
        raise InputError(f"{remote.url} answers {error.code} ({error.reason!s:.200}); {_by_hand(path)}") from error
    except InputError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:  # a redirect to what is no address
        reason = str(getattr(error, "reason", None) or error or type(error).__name__)[:200]
        raise InputError(
            f"cannot download {remote.url} ({reason}); try again, which goes on from what was read; {_by_hand(path)}"
        ) from error
    n_read = partial.stat().st_size
    if size is not None and n_read < size:
        raise InputError(
            f"{remote.url} ended after {n_read} of {size} bytes; try again, which goes on from there; {_by_hand(path)}"
        )
    _version_file(partial).unlink(missing_ok=True)
    return partial


def _by_hand(path: Path) -> str:
    return f"or put the file at {str(path)!r} yourself"


def _open(remote: RemoteFile, partial: Path, timeout: float) -> Any:
    """Request the rest of the file if a part of this version is here, else the complete file."""
    headers = {"User-Agent": f"mechedit/{VERSION}", "Accept-Encoding": "identity"}
    range_headers = _range_headers(remote, partial)
    request = urllib.request.Request(remote.url, headers=headers | range_headers)
    try:
        return _answer(request, timeout)
    except urllib.error.HTTPError as error:
        # 416: the file has no such rest, so the part that is here is of no use.
        if error.code != 416 or not range_headers:
            raise
    return _answer(urllib.request.Request(remote.url, headers=headers), timeout)


def _answer(request: urllib.request.Request, timeout: float) -> Any:
    """The answer, once its headers are there.

    Raises:
        TimeoutError: they did not come within four times `timeout`, which itself only limits each wait for a byte.
    """
    answer: Future[Any] = Future()

    def ask() -> None:
        try:
            answer.set_result(urllib.request.urlopen(request, timeout=timeout))
        except BaseException as error:
            answer.set_exception(error)

    # Nothing can end a thread that waits for a server; as a daemon it does not keep the process from ending.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(4 * timeout)
    except FutureTimeoutError as error:
        if answer.done():
            raise
        raise TimeoutError(f"its answer did not begin within {4 * timeout:g} seconds") from error


def _range_headers(remote: RemoteFile, partial: Path) -> dict[str, str]:
    """Headers that request the rest; a server whose file has changed sends the complete file (RFC 9110, 13.1.5)."""
    if not partial.is_file() or not partial.stat().st_size or not _version_file(partial).is_file():
        return {}
    try:
        version = read_object(_version_file(partial))
    except InputError:  # damaged, so that nothing is known of the part
        return {}
    if version.get("url") != remote.url or not _is_header(version.get("validator")):
        return {}
    return {"Range": f"bytes={partial.stat().st_size}-", "If-Range": version["validator"]}


def _is_header(value: Any) -> bool:
    """Whether a value can be sent as a header."""
    return isinstance(value, str) and bool(value) and value.isascii() and value.isprintable()


def _read_headers(stream: Any) -> _Response:
    """Where an answer begins in the file, how long the complete file is, and which version it is."""
    headers = stream.headers
    tag = headers.get("ETag")
    validator = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
    length = headers.get("Content-Length")
    if stream.status != 206:
        return _Response(0, _size(length), validator)
    # Content-Range: bytes FIRST-LAST/TOTAL
    span, _, total = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    first = _size(span.partition("-")[0])
    if first is None:
        raise http.client.HTTPException(f"a part without its place: {brief(headers.get('Content-Range'))}")
    if (size := _size(total)) is None:  # nothing would tell that more is missing
        raise http.client.HTTPException(f"a part of a file of unknown size: {brief(headers.get('Content-Range'))}")
    return _Response(first, size, validator)


def _size(text: str | None) -> int | None:
    """A number of bytes in a header; None where there is none that a file could have."""
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 19 else None


def _append(blocks: Iterable[bytes], partial: Path, offset: int, size: int | None, name: str) -> None:
    """Append the answer's body to the partial download.

    Args:
        blocks: the body, piece by piece.
        partial: path of the partial download.
        offset: byte of the file at which the body begins.
        size: size of the complete file.
        name: name of the file, for the progress bar.

    Raises:
        InputError: more came than the file has, or than `LARGEST` where its size is not known.
    """
    n_present = partial.stat().st_size if offset else 0
    if offset != n_present:
        _remove_partial(partial)
        raise http.client.HTTPException(f"what was sent begins at byte {offset}, expected {n_present}")
    most = LARGEST if size is None else size
    with partial.open("ab" if n_present else "wb") as file:
        bar = {"total": size, "initial": offset, "unit": "B", "unit_scale": True, "desc": f"downloading {name}"}
        with progress_bar(**bar, leave=False) as progress:
            for data in blocks:
                if file.tell() + len(data) > most:
                    _remove_partial(partial)
                    raise InputError(
                        f"the server sent more than {most:,} bytes of {name}, expected no more; what was read is "
                        f"removed: try again"
                    )
                file.write(data)
                progress.update(len(data))
        os.fsync(file.fileno())


def _in_time(blocks: Iterable[bytes], seconds: float) -> Iterator[bytes]:
    """The pieces, as long as they come fast enough.

    Raises:
        TimeoutError: within so many seconds there were fewer than `SLOWEST` bytes for each.
    """
    begin, n_bytes = time.monotonic(), 0
    for data in blocks:
        yield data
        n_bytes += len(data)
        passed = time.monotonic() - begin
        if passed >= seconds:
            if n_bytes < SLOWEST * passed:
                raise TimeoutError(f"it sent {n_bytes} bytes in {passed:.2g} seconds")
            begin, n_bytes = time.monotonic(), 0


def _blocks(stream: Any) -> Iterator[bytes]:
    """Yield the body piece by piece, including the bytes that came before the connection broke.

    Raises:
        HTTPException: an answer in chunks broke off, of which nothing else tells that it has no end.
    """
    while True:
        try:
            data = stream.read1(READ_BYTES)
        except http.client.IncompleteRead as error:
            yield error.partial
            raise http.client.HTTPException("the answer broke off before its last chunk") from error
        if not data:
            return
        yield data
