"""Checksums by which a file is known to be as it was written: how they are made, and when contents are read for them.

A file of tensors holds two in its header: `header_sha256`, over the header's fields and each tensor's name, dtype and
shape, and `sha256`, over that and the tensors' bytes. `selection.json` and `summary.json` hold `sha256`, over their
other fields. The stamps of a run folder hold the size and the SHA-256 of each
file of a step (`mechedit.run_folder`). Contents are always checked below `LARGE` bytes; above, only within
`verify_contents`. What was written before there were checksums is read unchecked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from mechedit.arguments import checked
from mechedit.errors import InputError

LARGE = 256 * 2**20
"""Bytes from which on a file's content is read for its checksum only on demand."""
HEADER, CONTENT = "header_sha256", "sha256"
"""Fields of a header that hold its checksums."""
_verifying: ContextVar[bool] = ContextVar("verifying", default=False)


@checked
@contextlib.contextmanager
def verify_contents(enabled: bool = True) -> Iterator[None]:
    """Check, within the `with` block, also the contents of files of 256 MB and more whenever they are read.

    Example:
        >>> with verify_contents():
        ...     moments = load_moments("run", layers=[3, 4, 5])
    """
    token = _verifying.set(enabled)
    try:
        yield
    finally:
        _verifying.reset(token)


def checks_content(size: int) -> bool:
    """Whether the content of so many bytes is checked."""
    return size < LARGE or _verifying.get()


def tensor_checksums(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, str]:
    """Both checksums of a file of tensors.

    Args:
        tensors: on the CPU, contiguous.
        header: as JSON reads it back, without checksums.
    """
    outer = header_checksum(tensors, header)
    return {HEADER: outer, CONTENT: content_checksum(tensors, outer)}


def header_checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """SHA-256 over the header and the tensors' names, dtypes and shapes, in hex."""
    shapes = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps([header, shapes], sort_keys=True).encode()).hexdigest()


def content_checksum(tensors: Mapping[str, Tensor], outer: str) -> str:
    """SHA-256 over a header's checksum and the tensors' bytes, in hex."""
    digest = hashlib.sha256(outer.encode())
    for _, tensor in sorted(tensors.items()):
        bytes_of: Any = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        digest.update(memoryview(bytes_of))
    return digest.hexdigest()


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its SHA-256 as its last field, `sha256`.

    Args:
        content: as JSON reads it back, without a checksum.
    """
    return {**content, CONTENT: object_checksum(content)}


def without_checksum(content: Mapping[str, Any], what: str, remedy: str) -> dict[str, Any]:
    """A JSON object without its checksum, once it was held against it; older ones have none.

    Args:
        content: as it was read.
        what: names the file in messages.
        remedy: how it is made again.

    Raises:
        InputError: it is not as it was written.
    """
    fields = {name: value for name, value in content.items() if name != CONTENT}
    if CONTENT in content and content[CONTENT] != object_checksum(fields):
        raise InputError(
            f"{what} is not as it was written (it does not match its SHA-256), expected an undamaged file; {remedy}"
        )
    return fields


def object_checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 over a JSON object's fields in the order of their names, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
