"""Reads the keys of a batch of texts at several layers, into buffers that are reused from batch to batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechedit.batching import length_batches, pad, padding_budget
from mechedit.models import Model, Tokens
from mechedit.workers import n_workers, run_batches


@dataclass(frozen=True, eq=False)
class _Batch:
    """Sequences that run together."""

    tokens: Tokens
    counted: Int[Tensor, " token"]
    """Those of its tokens that are neither padding nor special."""
    first: int
    """Where its keys begin in the buffers."""


class KeyReader:
    """Runs token sequences and returns their keys at some layers."""

    def __init__(self, model: Model, layers: Sequence[int], batch_tokens: int) -> None:
        """Prepare; nothing is computed yet.

        Args:
            model: model whose keys are read.
            layers: layers to read, ascending.
            batch_tokens: tokens per forward pass at most, padding included.
        """
        self.model, self.batch_tokens = model, batch_tokens
        self.sites = {layer: model.key_site(layer) for layer in layers}
        self._special_ids = torch.tensor(model.tokenizer.all_special_ids or [-1], device=model.device)
        self._buffers: dict[int, Tensor] = {}
        self._lock = threading.Lock()
        """Is taken by the thread that makes a buffer, which others fill as well."""

    @torch.no_grad()
    def read(self, sequences: Sequence[list[int]]) -> dict[int, Float[Tensor, "token d_mlp"]]:
        """Keys per layer at all tokens that are not special; valid until the next call, which reuses their memory.

        Args:
            sequences: token ids per text, longest first.
        """
        n_keys, capacity = 0, sum(map(len, sequences))
        batches: list[_Batch] = []
        # What runs at once is in memory at once.
        most = max(self.batch_tokens // n_workers(self.model), 1)
        for rows in length_batches(sequences, padding_budget(self.model), most):
            tokens = pad(rows, self.model.tokenizer, self.model.device)
            counted = self._is_counted(tokens).flatten().nonzero().squeeze(1)
            batches.append(_Batch(tokens, counted, n_keys))
            n_keys += len(counted)
        # A batch that memory does not hold is not halved: the text's passes are cut to fit beforehand.
        list(run_batches(self.model, [[batch] for batch in batches], lambda batch: self._read(batch[0], capacity)))
        return {layer: self._buffers[layer][:n_keys] for layer in self.sites}

    def _read(self, batch: _Batch, capacity: int) -> None:
        """Run a batch and put its keys into the buffers."""
        run = self.model.run(batch.tokens, read=list(self.sites.values()), stop_after=max(self.sites))
        for layer, site in self.sites.items():
            keys = run[site].flatten(0, 1)
            target = self._buffer(layer, capacity, keys)[batch.first : batch.first + len(batch.counted)]
            torch.index_select(keys, 0, batch.counted.to(keys.device), out=target)

    def _buffer(self, layer: int, capacity: int, like: Float[Tensor, "token d_mlp"]) -> Float[Tensor, "_ d_mlp"]:
        """A buffer of at least `capacity` tokens. Allocating one anew takes as long as filling it."""
        with self._lock:
            if layer not in self._buffers or len(self._buffers[layer]) < capacity:
                self._buffers[layer] = like.new_empty(capacity, like.shape[1])
            return self._buffers[layer]

    def _is_counted(self, tokens: Tokens) -> Bool[Tensor, "batch pos"]:
        """Mask of the tokens that are neither padding nor special."""
        return tokens.mask.bool() & ~torch.isin(tokens.ids, self._special_ids)
