"""Keys and states at the subject's last token, recollected while an edit moves up through the layers (Algorithm 1).

Requests and prefixes go in; after each edited layer the next one's keys come out (MEMIT Eq. 19). The stream of all
prompts is kept at the input of the layer that the edit has come to, and goes on from there, so that no block below
the edit is computed twice. Prompts end with the subject: what follows it cannot matter in a causal model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.batching import pad
from mechedit.data import EditRequest
from mechedit.models import Model, Patch, Resume, Run, Site, Tokens
from mechedit.prompts import BARE, prefixed_prompts


class Recollection:
    """Every request's prompt behind every prefix, with the residual stream at the input of block `layer`.

    The model may be edited between calls, at `layer` and above: what is kept does not depend on that.
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[EditRequest],
        prefixes: Sequence[str],
        *,
        batch_size: int = 64,
        share: float = 0.25,
    ) -> None:
        """Tokenize the prompts; nothing is computed yet.

        Args:
            model: whose keys.
            requests: the facts.
            prefixes: templates with one {} for the whole prompt.
            batch_size: prompts in one forward pass.
            share: of the device's free memory that the kept stream may take; more than that lies on the CPU.
        """
        self.model = model
        self.layer = 0
        """Where the stream is kept: the input of this block. It only goes up."""
        cut = [_cut_prompts(model, request, [*prefixes, BARE]) for request in requests]
        bare = sorted({prompts[-1] for prompts in cut}, key=_by_length)
        others = sorted({ids for prompts in cut for ids in prompts[:-1]} - set(bare), key=_by_length)
        place = {ids: row for row, ids in enumerate([*bare, *others])}
        self._rows = torch.tensor([[place[ids] for ids in prompts] for prompts in cut])
        # Prompts that are equal up to the subject are run once, and the bare ones can be run alone.
        self._bare = _batches(model, bare, batch_size)
        self._batches = [*self._bare, *_batches(model, others, batch_size)]
        kept = sum(batch.tokens.ids.numel() for batch in self._batches) * model.d_model * model.dtype.itemsize
        self._home = torch.device("cpu") if _too_much(kept, model.device, share) else model.device

    @torch.no_grad()
    def move_(self, layer: int) -> None:
        """Take the stream on to the input of block `layer`, through the model as it is now.

        Raises:
            ValueError: it is beyond that block already.
        """
        self._check(layer)
        if layer > self.layer:
            site = Site(layer - 1, "resid")
            self._keep_(layer, [self._run(batch, [site])[site].to(self._home) for batch in self._batches])

    @torch.no_grad()
    def keys(self, layer: int) -> Float[Tensor, "fact prefix d_mlp"]:
        """The keys of `layer` at the subject's last token, in float32 at least; the stream is taken on to `layer`.

        Raises:
            ValueError: the stream is beyond that block already.
        """
        self._check(layer)
        key, entry = self.model.key_site(layer), Site(layer - 1, "resid")
        sites = [key] if layer == self.layer else [entry, key]
        found, streams = [], []
        for batch in self._batches:
            run = self._run(batch, sites)
            found.append(_last(run[key], batch.tokens))
            if entry in sites:
                streams.append(run[entry].to(self._home))
        if streams:
            self._keep_(layer, streams)
        return torch.cat(found)[self._rows[:, :-1]]

    @torch.no_grad()
    def states(self, sites: Sequence[Site]) -> dict[Site, Float[Tensor, "fact d_model"]]:
        """What `sites`, at `layer` or above, hold at the subject's last token of the bare prompt, in float32 at least.

        The stream stays where it is.
        """
        runs = [(self._run(batch, sites), batch.tokens) for batch in self._bare]
        return {site: torch.cat([_last(run[site], at) for run, at in runs])[self._rows[:, -1]] for site in sites}

    @torch.no_grad()
    def replay(
        self, site: Site, values: Float[Tensor, "fact d_model"], read: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "fact d_model"]]:
        """What `states` would give if `site` held `values` at the subject's last token."""
        found = {other: torch.zeros_like(values) for other in read}
        for first, batch in zip(_firsts(self._bare), self._bare, strict=True):
            own = self._rows[:, -1] - first
            facts = ((own >= 0) & (own < len(batch.tokens.ids))).nonzero()[:, 0]
            # A row for each fact: those that share a prompt differ in what is written.
            for some in facts.split(len(batch.tokens.ids)):
                rows = batch.take(own[some])
                at = (rows.tokens.lengths - 1)[:, None]
                patch = Patch(site, at, values[some.to(values.device)][:, None].to(self.model.dtype))
                run = self._run(rows, read, [patch])
                for other in read:
                    found[other][some.to(values.device)] = _last(run[other], rows.tokens).to(values)
        return found

    def _run(self, batch: _Batch, read: Sequence[Site], patches: Sequence[Patch] = ()) -> Run:
        """From the kept stream to the last site."""
        start = Resume(self.layer, batch.stream) if batch.stream is not None else None
        return self.model.run(batch.tokens, patches, read, resume=start, stop_after=max(site.layer for site in read))

    def _keep_(self, layer: int, streams: Sequence[Tensor]) -> None:
        """Each batch's stream, [batch, pos, d_model], and where it is."""
        for batch, stream in zip(self._batches, streams, strict=True):
            batch.stream = stream
        self.layer = layer

    def _check(self, layer: int) -> None:
        if layer < self.layer:
            raise ValueError(f"the stream is at the input of block {self.layer}, expected it at {layer} or below")


def prefix_mean(keys: Float[Tensor, "fact prefix d_mlp"], convention: str = "default") -> Float[Tensor, "d_mlp fact"]:
    """Each fact's key: the mean over prefixes (MEMIT Eq. 19), in float64.

    `convention="memit-2022"` takes the mean of the first prefix's key and of the mean over the others, as the
    published code does.
    """
    weights = keys.new_full((keys.shape[1],), 1 / keys.shape[1], dtype=torch.float64)
    if convention == "memit-2022" and len(weights) > 1:
        weights[0], weights[1:] = 1 / 2, 1 / (2 * (len(weights) - 1))
    return torch.einsum("fpk,p->kf", keys.double(), weights)


@dataclass(eq=False)
class _Batch:
    """Prompts of like length and their stream at the input of the layer that was come to."""

    tokens: Tokens
    stream: Float[Tensor, "batch pos d_model"] | None = None
    """None at layer 0, where a run starts with the tokens."""

    def take(self, rows: Int[Tensor, " row"]) -> _Batch:
        """The chosen rows, which may repeat."""
        at = rows.to(self.tokens.ids.device)
        return _Batch(self.tokens.rows(at), None if self.stream is None else self.stream[rows.to(self.stream.device)])


def _cut_prompts(model: Model, request: EditRequest, prefixes: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of the request behind each prefix, up to the subject's last token."""
    return [prompt.ids[: prompt.last_subject + 1] for prompt in prefixed_prompts(model, request, prefixes)]


def _by_length(ids: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return (len(ids), ids)


def _batches(model: Model, rows: Sequence[tuple[int, ...]], size: int) -> list[_Batch]:
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [_Batch(pad(chunk, model.tokenizer, model.device)) for chunk in chunks]


def _firsts(batches: Sequence[_Batch]) -> list[int]:
    """The number of each batch's first row."""
    sizes = [len(batch.tokens.ids) for batch in batches]
    return [sum(sizes[:place]) for place in range(len(sizes))]


def _last(values: Float[Tensor, "batch pos width"], tokens: Tokens) -> Float[Tensor, "batch width"]:
    """At each row's last token, in float32 at least."""
    at = (tokens.lengths - 1).to(values.device)[:, None, None]
    found = values.take_along_dim(at, 1)[:, 0]
    return found.to(torch.promote_types(found.dtype, torch.float32))


def _too_much(size: int, device: torch.device, share: float) -> bool:
    """Whether so many bytes are more than their share of the device's free memory, where that can be told."""
    free = getattr(torch.get_device_module(device), "mem_get_info", None)
    return free is not None and size > share * free(device)[0]
