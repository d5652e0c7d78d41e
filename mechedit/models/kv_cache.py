"""The KV cache: attention's keys and values at the first positions of a batch, so that later runs can skip them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

KeysAndValues = tuple[tuple[Shaped[Tensor, "batch _ pos _"], Shaped[Tensor, "batch _ pos _"]], ...]
"""Keys and values by layer, [batch, head, pos, d_head]; of a model that keeps none (`Model.keeps_keys`), each block's
input and the ids, as one head."""


@dataclass(frozen=True, eq=False)
class KVCache:
    """Attention's keys and values at the first positions of a batch; valid as long as nothing there is patched."""

    layers: KeysAndValues
    """Keys and values per layer."""
    lengths: Int[Tensor, " batch"] | None = None
    """Cached positions per row, which are the last ones; None when every row has all of them."""

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return self.layers[0][0].shape[2]

    @property
    def mask(self) -> Int[Tensor, "batch pos"]:
        """1 on cached positions, 0 on the empty ones before a shorter row."""
        keys = self.layers[-1][0]
        distance_to_end = torch.arange(self.length, 0, -1, device=keys.device).expand(len(keys), -1)
        lengths = keys.new_full((len(keys),), self.length) if self.lengths is None else self.lengths.to(keys.device)
        return (distance_to_end <= lengths[:, None]).long()

    def lengths_with(self, count: int) -> Int[Tensor, " batch"] | None:
        """`lengths` once `count` more positions are cached."""
        return None if self.lengths is None else self.lengths + count

    def take(self, index: Int[Tensor, " row"], length: int, first: int = 0, last: int | None = None) -> KVCache:
        """The first `length` positions of the chosen rows, for a run that resumes at `first` and stops after `last`.

        Such a run does not look at other layers: they hold placeholders of the right shape.
        """
        lengths = None if self.lengths is None else self.lengths[index]
        used = range(first, len(self.layers) if last is None else last + 1)
        shape = (len(index), length)

        def taken(states: Tensor) -> Tensor:  # layers may be on several devices
            return states[:, :, :length].index_select(0, index.to(states.device))

        return KVCache(self._map(taken, shape, used), lengths)

    def since(self, first: int) -> KVCache:
        """The same for a run that resumes at `first`; see `take` for the other layers."""
        rows, used = len(self.layers[0][0]), range(first, len(self.layers))
        return KVCache(self._map(lambda states: states, (rows, self.length), used), self.lengths)

    def before(
        self,
        ends: Int[Tensor, " row"],
        first: int = 0,
        last: int | None = None,
        index: Int[Tensor, " row"] | None = None,
    ) -> KVCache:
        """The chosen rows' positions before an end of their own, counted from a row's first one.

        Args:
            ends: number of positions of each row.
            first: block at which the run resumes that begins there.
            last: block after which it stops; None means the last one. See `take` for the other layers.
            index: the row in this cache of each of the new one's; None means every row once.
        """
        width, n_rows = int(ends.max()), len(ends)
        rows = torch.arange(n_rows, device=ends.device) if index is None else index
        begins = 0 if self.lengths is None else (self.length - self.lengths)[rows]
        at = ((begins + ends)[:, None] - torch.arange(width, 0, -1, device=ends.device)).clamp(min=0)
        used = range(first, len(self.layers) if last is None else last + 1)

        where = rows[:, None] * self.length + at

        def taken(states: Tensor) -> Tensor:  # all heads of a position at once
            by_position = states.transpose(1, 2)
            index = where.to(states.device).flatten()
            return by_position.flatten(0, 1).index_select(0, index).unflatten(0, where.shape).transpose(1, 2)

        return KVCache(self._map(taken, (n_rows, width), used), ends)

    def _map(self, change: Callable[[Tensor], Tensor], shape: tuple[int, int], used: range) -> KeysAndValues:
        """Apply `change` to the layers that are used; elsewhere put a placeholder of `shape` (rows, positions)."""

        def changed(layer: int, states: Tensor) -> Tensor:
            rows, width = shape
            empty = states.new_zeros(())
            return change(states) if layer in used else empty.expand(rows, states.shape[1], width, states.shape[3])

        return tuple((changed(i, keys), changed(i, values)) for i, (keys, values) in enumerate(self.layers))
