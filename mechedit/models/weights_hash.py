"""SHA-256 of a model's weights, taken once for each state of the weights.

SHA-256 reads one or two GB per second, one after another, and weights on a GPU have to be copied to the CPU first. So
the hash is remembered under a checksum of the weights' bytes, which is taken each time where the weights are. Nothing
less would do: an in-place write raises a tensor's version counter, but a write through `.data` or a NumPy view does
not.

The same weights have another hash in each dtype. An edit records those that its model has in the usual dtypes, so that
it goes onto copies of the model that were loaded in them.
"""

from __future__ import annotations

import functools
import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from mechedit.split_tensors import gathered_objects, is_split, part_here, whole

Key = TypeVar("Key", bound=Hashable)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes that weights are loaded and written in, by name."""
_ROW = 4096
"""Words that go into one weighted sum."""
_BLOCK = 2**24
"""Words that are multiplied at a time, to bound the memory that it takes."""
_NUMBERS = 2**22
"""Numbers that are cast at a time, to bound the memory that it takes."""
_STATES = 8
"""States of the weights whose hashes are remembered."""


class WeightsHash:
    """Remembers the hashes of the last states of some weights."""

    def __init__(self) -> None:
        self._hashes: OrderedDict[bytes, str] = OrderedDict()
        self._cast_hashes: OrderedDict[tuple[bytes, torch.dtype], str] = OrderedDict()

    def of(self, parameters: Mapping[str, Tensor]) -> str:
        """SHA-256 over the parameters as they are now, in hex (`sha256_of`)."""
        return _remembered(self._hashes, checksum(parameters), lambda: sha256_of(parameters))

    def as_cast(self, parameters: Mapping[str, Tensor], dtypes: Collection[torch.dtype]) -> dict[torch.dtype, str]:
        """The hashes that the parameters as they are now have in other dtypes (`cast_sha256_of`)."""
        state = checksum(parameters)

        def cast_hash(dtype: torch.dtype) -> str:
            return _remembered(self._cast_hashes, (state, dtype), lambda: cast_sha256_of(parameters, dtype))

        # What is split over processes is gathered by all of them in one order.
        with ThreadPoolExecutor(1 if any(map(is_split, parameters.values())) else len(DTYPES)) as pool:
            return dict(zip(dtypes, pool.map(cast_hash, dtypes), strict=True))


def _remembered(hashes: OrderedDict[Key, str], key: Key, take: Callable[[], str]) -> str:
    """The hash under a key, taken if it is not remembered; only the last ones are."""
    digest = hashes[key] if key in hashes else take()
    hashes[key] = digest
    hashes.move_to_end(key)
    if len(hashes) > _STATES:
        hashes.popitem(last=False)
    return digest


def sha256_of(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in the order of the names, in hex."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        digest.update(_header(name, parameter))
        digest.update(_bytes(whole(parameter)))
    return digest.hexdigest()


@torch.no_grad()
def cast_sha256_of(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """`sha256_of` the parameters rounded to another dtype: the hash of the same weights loaded in that dtype."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        cast = dtype if parameter.is_floating_point() else parameter.dtype
        digest.update(_header(name, parameter, cast))
        for numbers in whole(parameter).detach().reshape(-1).split(_NUMBERS):
            digest.update(_bytes(numbers.to(cast)))
    return digest.hexdigest()


def _bytes(numbers: Tensor) -> memoryview:
    content: Any = numbers.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(content.numpy())


def checksum(parameters: Mapping[str, Tensor]) -> bytes:
    """A checksum that changes with every single number of the parameters, and practically with every other change.

    On a CPU it consists of CRC-32 and of the sum of the bytes read as words of 64 bits. A number that changes lies in
    one word, and so changes the sum; several that change leave CRC-32 alone with a probability of 2⁻³². Elsewhere it
    consists of weighted sums (`weighted_sums`), which a GPU takes as fast as it reads. Of weights that are split over
    processes it is the same in all of them, and changes with any part.
    """
    digest = hashlib.blake2b()
    ordered = sorted(parameters.items())
    # CRC-32 and sums both release Python's lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for (name, parameter), content in zip(
            ordered, pool.map(_checksum, (tensor for _, tensor in ordered)), strict=True
        ):
            digest.update(_header(name, parameter) + content)
    if any(is_split(parameter) for parameter in parameters.values()):
        digest.update(b"".join(gathered_objects(digest.digest())))
    return digest.digest()


def _checksum(parameter: Tensor) -> bytes:
    words = words_of(part_here(parameter))
    if words.device.type != "cpu":
        return weighted_sums(words).cpu().numpy().tobytes()
    content: Any = words.numpy()
    return f"{zlib.crc32(content)} {int(words.sum())}".encode()


def _header(name: str, parameter: Tensor, dtype: torch.dtype | None = None) -> bytes:
    return f"{name} {list(parameter.shape)} {dtype or parameter.dtype}\n".encode()


def words_of(parameter: Tensor) -> Tensor:
    """The bytes of a tensor as whole numbers of 64 bits; zeros fill up the last one."""
    content = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
    lacking = -len(content) % 8
    if lacking or content.storage_offset() % 8:
        content = torch.cat([content, content.new_zeros(lacking)])
    return content.view(torch.int64)


def weighted_sums(words: Int[Tensor, " word"]) -> Int[Tensor, " sum"]:
    """Two sums of each `_ROW` words x: Σⱼ kⱼ xⱼ and Σⱼ kⱼ ⌊xⱼ / 2³²⌋ mod 2⁶⁴, with random odd kⱼ.

    A word that changes by d ≠ 0 mod 2⁶⁴ changes the first sum by kⱼ d ≠ 0. Several changes at once, such as numbers
    that swap their places, leave both sums alone with a probability of about 2⁻³²; without the second sum, two numbers
    in upper halves of words could swap their signs unnoticed.
    """
    factors = _factors(words.device)
    full = len(words) // _ROW * _ROW
    blocks = [*words[:full].view(-1, _ROW).split(_BLOCK // _ROW), words[full:].view(1, -1)]
    return torch.cat([(half * factors[: block.shape[1]]).sum(1) for block in blocks for half in (block, block >> 32)])


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """The odd factors kⱼ."""
    generator = torch.Generator().manual_seed(12)
    return (2 * torch.randint(-(2**62), 2**62, (_ROW,), generator=generator, device="cpu") + 1).to(device)
