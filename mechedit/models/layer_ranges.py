"""Layers as people write them, `3-8` or `3`, read without making a list of them, and as programs give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, Final

from mechedit.errors import InputError, brief, read_whole

MOST_LAYERS: Final = 10_000
"""More layers than any model has: a range up to here may become a list before the model is known."""


def layer_numbers(layers: Any) -> list[int]:
    """Layers that a caller gives, as a list: whole numbers of any kind, also those of NumPy and torch.

    Raises:
        InputError: something else.
    """
    layers = layers.tolist() if callable(getattr(layers, "tolist", None)) else layers
    several = isinstance(layers, Iterable) and not isinstance(layers, str | bytes | Mapping)
    numbers = list(layers) if several else []
    if not several or not all(isinstance(layer, Integral) and not isinstance(layer, bool) for layer in numbers):
        raise InputError(f"the layers are {brief(numbers or layers)}, expected whole numbers, such as [3, 4, 5]")
    return list(map(int, numbers))


def read_layer_range(text: str, what: str) -> range:
    """Read one layer, `3`, or a range with both its ends, `3-8`.

    Args:
        text: to read.
        what: names the whole text in messages, such as `the layers '3-8,10'`.

    Raises:
        InputError: anything else, a range that runs backwards, or a layer that no model has.
    """
    ends = text.strip().split("-")
    if not 1 <= len(ends) <= 2 or not all(end.strip().isdecimal() for end in ends):
        raise InputError(f"{what} cannot be read, expected such as 3-8 or 3,5,7")
    first, last = (read_whole(f"a layer of {what}", end, MOST_LAYERS - 1) for end in (ends[0], ends[-1]))
    if last < first:
        raise InputError(f"{what} run backwards, expected the lower one first, such as {last}-{first}")
    return range(first, last + 1)
