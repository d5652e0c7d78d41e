"""SHA-256 of a model's weights, taken once for each state of the weights.

SHA-256 reads one or two GB a second on a CPU, and weights on a GPU have to be copied there first. So the hash is
remembered under a checksum of the weights' bytes, which is taken each time where the weights are. Nothing else would
do: an in-place write raises a tensor's version counter, but a write through `.data` or a NumPy view does not.
"""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_ROW = 4096
"""Words that go into one sum."""
_BLOCK = 2**18
"""Words that are multiplied at a time on a CPU, so that they stay in its cache."""
_STATES = 8
"""States of the weights whose hashes are remembered."""


class WeightsHash:
    """Remembers the hashes of the last states of some weights."""

    def __init__(self) -> None:
        self._hashes: OrderedDict[bytes, str] = OrderedDict()

    def of(self, parameters: Mapping[str, Tensor]) -> str:
        """SHA-256 over the parameters as they are now, in hex (`sha256_of`)."""
        state = checksum(parameters)
        digest = self._hashes[state] if state in self._hashes else sha256_of(parameters)
        self._hashes[state] = digest
        self._hashes.move_to_end(state)
        if len(self._hashes) > _STATES:
            self._hashes.popitem(last=False)
        return digest


def sha256_of(parameters: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in the order of the names, in hex."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        digest.update(_header(name, parameter))
        content: Any = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(content.numpy()))
    return digest.hexdigest()


@torch.no_grad()
def checksum(parameters: Mapping[str, Tensor]) -> bytes:
    """A checksum that changes with every single number of the parameters, and practically with every other change.

    The bytes are read as words x of 64 bits. Of every `_ROW` of them Σⱼ kⱼ xⱼ and Σⱼ kⱼ ⌊xⱼ / 2³²⌋ are taken mod 2⁶⁴,
    with random odd kⱼ. A number that changes changes one word by some d ≠ 0 mod 2⁶⁴, and so the first sum by
    kⱼ d ≠ 0. Several changes at once, such as numbers that swap their places, leave both sums alone with a
    probability of about 2⁻³²; without the second sum two numbers in upper halves could swap their signs unnoticed.
    """
    digest = hashlib.blake2b()
    for name, parameter in sorted(parameters.items()):
        digest.update(_header(name, parameter))
        digest.update(_sums(_words(parameter)).cpu().numpy().tobytes())
    return digest.digest()


def _header(name: str, parameter: Tensor) -> bytes:
    return f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode()


def _words(parameter: Tensor) -> Tensor:
    """The bytes of a tensor as whole numbers of 64 bits; zeros fill up the last one."""
    content = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
    lacking = -len(content) % 8
    if lacking or content.storage_offset() % 8:
        content = torch.cat([content, content.new_zeros(lacking)])
    return content.view(torch.int64)


def _sums(words: Tensor) -> Tensor:
    """Both sums of each row of words; the last row may be shorter."""
    factors = _factors(words.device)
    full = len(words) // _ROW * _ROW
    size = _BLOCK if words.device.type == "cpu" else 64 * _BLOCK
    blocks = [*words[:full].view(-1, _ROW).split(size // _ROW), words[full:].view(1, -1)]
    return torch.cat([(half * factors[: block.shape[1]]).sum(1) for block in blocks for half in (block, block >> 32)])


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """The odd factors kⱼ."""
    generator = torch.Generator().manual_seed(12)
    return (2 * torch.randint(-(2**62), 2**62, (_ROW,), generator=generator) + 1).to(device)
