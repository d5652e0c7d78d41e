"""The keys of a batch of texts, layer by layer, in buffers that are filled again and again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechedit.batching import pad, pieces, spare_tokens
from mechedit.models import Model, Tokens


class KeyReader:
    """Reads the keys of some layers over batches of rows."""

    def __init__(self, model: Model, layers: Sequence[int], batch_tokens: int) -> None:
        """Nothing is computed yet.

        Args:
            model: whose keys.
            layers: ascending.
            batch_tokens: most tokens in one forward pass, padding included.
        """
        self.model, self.batch_tokens = model, batch_tokens
        self.sites = {layer: model.key_site(layer) for layer in layers}
        self._special = torch.tensor(model.tokenizer.all_special_ids or [-1], device=model.device)
        self._buffers: dict[int, Tensor] = {}

    @torch.no_grad()
    def read(self, rows: Sequence[list[int]]) -> dict[int, Float[Tensor, "token d_mlp"]]:
        """Each layer's keys at all tokens that are not special; they hold until the next call.

        Args:
            rows: token ids, the longest row first.
        """
        held, room = 0, sum(map(len, rows))
        for some in pieces(rows, spare_tokens(self.model), self.batch_tokens):
            tokens = pad(some, self.model.tokenizer, self.model.device)
            counted = self._counted(tokens).flatten().nonzero().squeeze(1)
            run = self.model.run(tokens, read=list(self.sites.values()), stop_after=max(self.sites))
            for layer, site in self.sites.items():
                keys = run[site].flatten(0, 1)
                into = self._buffer(layer, room, keys)[held : held + len(counted)]
                torch.index_select(keys, 0, counted.to(keys.device), out=into)
            held += len(counted)
        return {layer: self._buffers[layer][:held] for layer in self.sites}

    def _buffer(self, layer: int, room: int, like: Float[Tensor, "token d_mlp"]) -> Float[Tensor, "_ d_mlp"]:
        """At least `room` tokens long. Memory that is asked for anew costs as much as what is put there."""
        if layer not in self._buffers or len(self._buffers[layer]) < room:
            self._buffers[layer] = like.new_empty(room, like.shape[1])
        return self._buffers[layer]

    def _counted(self, tokens: Tokens) -> Bool[Tensor, "batch pos"]:
        return tokens.mask.bool() & ~torch.isin(tokens.ids, self._special)
