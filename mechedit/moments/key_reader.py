"""Reads the keys of a batch of texts at several layers, into buffers that are reused from batch to batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechedit.batching import length_batches, pad, padding_budget
from mechedit.models import Model, Tokens


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

    @torch.no_grad()
    def read(self, sequences: Sequence[list[int]]) -> dict[int, Float[Tensor, "token d_mlp"]]:
        """Keys per layer at all tokens that are not special; valid until the next call, which reuses their memory.

        Args:
            sequences: token ids per text, longest first.
        """
        n_keys, capacity = 0, sum(map(len, sequences))
        for batch in length_batches(sequences, padding_budget(self.model), self.batch_tokens):
            tokens = pad(batch, self.model.tokenizer, self.model.device)
            counted = self._is_counted(tokens).flatten().nonzero().squeeze(1)
            run = self.model.run(tokens, read=list(self.sites.values()), stop_after=max(self.sites))
            for layer, site in self.sites.items():
                keys = run[site].flatten(0, 1)
                target = self._buffer(layer, capacity, keys)[n_keys : n_keys + len(counted)]
                torch.index_select(keys, 0, counted.to(keys.device), out=target)
            n_keys += len(counted)
        return {layer: self._buffers[layer][:n_keys] for layer in self.sites}

    def _buffer(self, layer: int, capacity: int, like: Float[Tensor, "token d_mlp"]) -> Float[Tensor, "_ d_mlp"]:
        """A buffer of at least `capacity` tokens. Allocating one anew takes as long as filling it."""
        if layer not in self._buffers or len(self._buffers[layer]) < capacity:
            self._buffers[layer] = like.new_empty(capacity, like.shape[1])
        return self._buffers[layer]

    def _is_counted(self, tokens: Tokens) -> Bool[Tensor, "batch pos"]:
        """Mask of the tokens that are neither padding nor special."""
        return tokens.mask.bool() & ~torch.isin(tokens.ids, self._special_ids)
