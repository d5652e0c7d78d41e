"""Errors of a disk that does not take or give a file, whichever library meets them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mechedit.errors import DiskError, InputError, is_interrupt


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of a disk that does not take a file, whichever library writes it, into a DiskError.

    Raises:
        DiskError: names the path and the reason.
        KeyboardInterrupt: an interrupt led to the error.
    """
    try:
        yield
    except Exception as error:
        if is_interrupt(error):
            raise KeyboardInterrupt from error
        reason = disk_error(error)
        if reason is None:
            raise
        raise DiskError(
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
     errno.ENFILE, errno.EXDEV, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.EMLINK, errno.ETXTBSY, errno.ELOOP,
     errno.ENOLCK, errno.EOPNOTSUPP, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN)
)  # fmt: skip
"""Errors that say something about a disk or a folder, and nothing about a program."""
