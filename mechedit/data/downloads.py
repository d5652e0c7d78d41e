"""Files from the web: downloaded once, with progress; resumed when cut off; checked each time they are used.

In: an address, with the file's size and SHA-256 where they are known. Out: a path in the cache folder. A file whose
hash is not known is trusted on first use: its hash is then written beside it, and later uses are held against that.
"""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from mechedit.errors import InputError
from mechedit.files import read_json, writable_folder, write_json
from mechedit.provenance import VERSION, file_hash

CACHE_VARIABLE = "MECHEDIT_CACHE"
CHUNK = 1 << 18
"""Bytes read at a time."""


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file on the web."""

    url: str
    sha256: str | None = None
    """None when it is not known: then the first download is trusted."""
    size: int | None = None
    """In bytes; None when it is not known."""

    @property
    def name(self) -> str:
        """The file's name in the cache folder."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class _Start:
    """Where a download begins, and what the server says of the file."""

    offset: int
    """Bytes that need not be sent again."""
    total: int | None
    """Bytes of the whole file; None when the server does not say."""
    validator: str | None
    """The server's name for this version of the file; a rest is asked for only while it is the same."""


def cache_folder() -> Path:
    """$MECHEDIT_CACHE, else mechedit in $XDG_CACHE_HOME, else ~/.cache/mechedit."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "mechedit"


def fetch(remote: Remote, cache: str | Path | None = None, *, timeout: float = 30.0) -> Path:
    """Path of a file, downloaded first when it is not in the cache; no network is needed when it is.

    What was read before an interrupt is kept as NAME.part, and the next call asks for the rest alone. A server that
    does not send parts, or has another version by now, makes it start again. Several processes may ask at once.

    Args:
        remote: the file.
        cache: where it is kept; `cache_folder()` by default.
        timeout: seconds without an answer after which the server is given up.

    Raises:
        InputError: the server cannot be reached, refuses, or ends early; the file's size or hash is not what it
            should be, now or since it was downloaded; the folder cannot be written to.
    """
    path = Path(cache or cache_folder()) / remote.name
    known = _known(remote, path)
    if path.is_file() and known.sha256:
        _check(path, known, f"remove {str(path)!r} and download it again")
        return path
    with FileLock(writable_folder(path.parent) / f".{path.name}.lock"):
        if not path.is_file():
            _read_anew(remote, path, timeout)
        _check(path, _known(remote, path), f"remove {str(path)!r} and download it again")
        if not _record(path).is_file():
            about = {"url": remote.url, "size": path.stat().st_size, "sha256": file_hash(path)}
            write_json(_record(path), about)
    return path


def _read_anew(remote: Remote, path: Path, timeout: float) -> None:
    """Download a file and put it in its place when it is what it should be."""
    part = _download(remote, path, timeout)
    try:
        _check(
            part, _known(remote, path),
            f"what was read is removed: try again. If that does not help, the published file has changed: to "
            f"trust the new one, remove {str(_record(path))!r}",
        )  # fmt: skip
    except InputError:
        _drop(part)
        raise
    part.replace(path)


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256.json")


def _known(remote: Remote, path: Path) -> Remote:
    """What is known of a file: as registered, else as it was when first seen."""
    file = _record(path)
    if remote.sha256 or not file.is_file():
        return remote
    seen = read_json(file)
    if not isinstance(seen, dict) or not {"size", "sha256"} <= set(seen):
        raise InputError(f"{str(file)!r} does not say a size and sha256: remove it, to trust {path.name} as it is")
    return replace(remote, sha256=seen["sha256"], size=seen["size"])


def _check(content: Path, known: Remote, remedy: str) -> None:
    """Hold a file's size and hash against what is known of it."""
    for what, found, expected in (
        ("bytes", content.stat().st_size, known.size),
        ("SHA-256", file_hash(content) if known.sha256 else None, known.sha256),
    ):
        if expected is not None and found != expected:
            raise InputError(f"{known.name} from {known.url} has {what} {found}, expected {expected}; {remedy}")


def _drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    _about(part).unlink(missing_ok=True)


def _about(part: Path) -> Path:
    """Which version of the remote file a part is of."""
    return part.with_name(f"{part.name}.json")


def _download(remote: Remote, path: Path, timeout: float) -> Path:
    """Read the file, or the rest of it, to PATH.part."""
    part = path.with_name(f"{path.name}.part")
    try:
        with _open(remote, part, timeout) as response:
            start = _start(response)
            expected = start.total if start.total is not None else remote.size
            if remote.size is not None and expected != remote.size:
                _drop(part)
                raise InputError(
                    f"{remote.url} has {expected} bytes, expected {remote.size}; the published file has changed: "
                    f"give the path of the one you want"
                )
            if not start.offset:
                part.unlink(missing_ok=True)  # before the new version is noted: what is here may be of another
            write_json(_about(part), {"url": remote.url, "validator": start.validator})
            _write(response, part, start, expected, path.name)
    except urllib.error.HTTPError as error:
        raise InputError(f"{remote.url} answers {error.code} ({error.reason}); {_by_hand(path)}") from error
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            f"cannot download {remote.url} ({getattr(error, 'reason', None) or error or type(error).__name__}); "
            f"try again, which goes on from what was read; {_by_hand(path)}"
        ) from error
    size = part.stat().st_size
    if expected is not None and size < expected:
        raise InputError(
            f"{remote.url} ended after {size} of {expected} bytes; try again, which goes on from there; "
            f"{_by_hand(path)}"
        )
    _about(part).unlink(missing_ok=True)
    return part


def _by_hand(path: Path) -> str:
    return f"or put the file at {str(path)!r} yourself"


def _open(remote: Remote, part: Path, timeout: float) -> Any:
    """Ask for the rest of a file when some of this version of it is here, else for all of it."""
    headers = {"User-Agent": f"mechedit/{VERSION}", "Accept-Encoding": "identity"}
    resumed = _resumed(remote, part)
    try:
        return urllib.request.urlopen(urllib.request.Request(remote.url, headers=headers | resumed), timeout=timeout)
    except urllib.error.HTTPError as error:
        # 416: there is no such rest, so what is here is of no use.
        if error.code != 416 or not resumed:
            raise
    return urllib.request.urlopen(urllib.request.Request(remote.url, headers=headers), timeout=timeout)


def _resumed(remote: Remote, part: Path) -> dict[str, str]:
    """Headers that ask for the rest; a server whose file has changed since sends the whole (RFC 9110, 13.1.5)."""
    if not part.is_file() or not part.stat().st_size or not _about(part).is_file():
        return {}
    about = read_json(_about(part))
    if about.get("url") != remote.url or not about.get("validator"):
        return {}
    return {"Range": f"bytes={part.stat().st_size}-", "If-Range": about["validator"]}


def _start(response: Any) -> _Start:
    """Read from an answer's headers where it begins and how long the whole file is."""
    headers = response.headers
    tag = headers.get("ETag")
    validator = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
    length = headers.get("Content-Length")
    if response.status != 206:
        return _Start(0, int(length) if length and length.isdigit() else None, validator)
    # Content-Range: bytes FIRST-LAST/TOTAL
    span, _, total = headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    first = span.partition("-")[0]
    if not first.isdigit():
        raise http.client.HTTPException(f"a part without its place: {headers.get('Content-Range')!r}")
    return _Start(int(first), int(total) if total.isdigit() else None, validator)


def _write(response: Any, part: Path, start: _Start, total: int | None, name: str) -> None:
    """Append what the server sends to the part, from where it begins."""
    have = part.stat().st_size if start.offset else 0
    if start.offset != have:
        _drop(part)
        raise http.client.HTTPException(f"what was sent begins at byte {start.offset}, expected {have}")
    with part.open("ab" if have else "wb") as written:
        bar = {"total": total, "initial": start.offset, "unit": "B", "unit_scale": True, "desc": f"downloading {name}"}
        with tqdm(**bar, leave=False) as progress:
            for chunk in _chunks(response):
                written.write(chunk)
                progress.update(len(chunk))
        os.fsync(written.fileno())


def _chunks(response: Any) -> Iterator[bytes]:
    """The body in pieces; what came before a connection broke is given out too."""
    while True:
        try:
            chunk = response.read(CHUNK)
        except http.client.IncompleteRead as error:
            yield error.partial
            return
        if not chunk:
            return
        yield chunk
