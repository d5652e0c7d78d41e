"""The residual stream at the input of a block, for rows that are run again while only weights above it change."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mechedit.batching import batches_of, pad
from mechedit.models import Model, Resume, Site

CACHE_BYTES = 2**28
"""Bytes of residual streams at most that `RecentBlockInputs` has."""


@torch.no_grad()
def block_inputs(
    model: Model, rows: Sequence[Sequence[int]], layer: int, batch_size: int
) -> list[Float[Tensor, "_ d_model"]] | None:
    """Each row's residual stream at the input of block `layer`, on the CPU; None where that is the model's input.

    Args:
        model: whose blocks below `layer` do not change.
        rows: tokens.
        layer: 0-based.
        batch_size: rows per pass.
    """
    if layer == 0:
        return None
    site, streams = Site(layer - 1, "resid"), []
    for batch in batches_of(rows, batch_size):
        inputs = pad(batch, model.tokenizer, model.device)
        states = model.run(inputs, read=[site], stop_after=layer - 1)[site].cpu()
        streams += [state[: len(row)].clone() for row, state in zip(batch, states, strict=True)]
    return streams


def resume_from(streams: Sequence[Float[Tensor, "_ d_model"]] | None, layer: int, model: Model) -> Resume | None:
    """Where a run of the rows starts whose streams these are; at the tokens without them."""
    if streams is None:
        return None
    return Resume(layer, pad_sequence(list(streams), batch_first=True).to(model.device))


class RecentBlockInputs:
    """`block_inputs` of groups of rows, of which those asked for last are there without another run.

    A group is one batch, so that what it gives does not depend on what was asked for before.
    """

    def __init__(self, model: Model, layer: int, most: int = CACHE_BYTES) -> None:
        """Without any group yet.

        Args:
            model: whose blocks below `layer` do not change.
            layer: 0-based.
            most: bytes of streams at most.
        """
        self.model, self.layer, self.most = model, layer, most
        self._streams: OrderedDict[tuple[tuple[int, ...], ...], list[Tensor]] = OrderedDict()
        self._bytes = 0

    def of(self, groups: Sequence[Sequence[Sequence[int]]]) -> list[Float[Tensor, "_ d_model"]] | None:
        """The streams of the groups' rows, one after the other; None where the block's input is the model's."""
        if self.layer == 0:
            return None
        return [stream for group in groups for stream in self._of_group(tuple(tuple(row) for row in group))]

    def _of_group(self, group: tuple[tuple[int, ...], ...]) -> list[Tensor]:
        if group in self._streams:
            self._streams.move_to_end(group)
            return self._streams[group]
        streams = block_inputs(self.model, group, self.layer, len(group)) or []
        self._streams[group] = streams
        self._bytes += _size(streams)
        while self._bytes > self.most:
            self._bytes -= _size(self._streams.popitem(last=False)[1])
        return streams


def _size(streams: Sequence[Tensor]) -> int:
    return sum(stream.nbytes for stream in streams)
