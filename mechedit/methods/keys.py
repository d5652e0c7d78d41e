"""Keys and states at one token, read while an edit moves up through the layers (MEMIT Algorithm 1).

Requests and prefixes go in; after each edited layer the next one's keys come out (MEMIT Eq. 19). The residual stream of
all prompts is cached at the input of the layer that the edit has reached, and runs go on from there, so that no block
below the edit is computed twice. Prompts end with that token: those after it cannot matter in a causal model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mechedit.batching import batches_of, pad
from mechedit.data import EditRequest
from mechedit.models import Model, Patch, Resume, Run, Site, Tokens
from mechedit.prefixes import BARE, prefixed_prompts
from mechedit.split_tensors import is_split, part_here, rows_here, split_in_columns, split_in_rows


class KeyExtractor:
    """Every request's prompt behind every prefix, with the residual stream at the input of block `layer`.

    The model may be edited between calls, at `layer` and above: the cached stream does not depend on those weights.
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[EditRequest],
        prefixes: Sequence[str],
        *,
        token: str = "subject_last",
        subject_alone: bool = False,
        batch_size: int = 64,
        memory_fraction: float = 0.25,
    ) -> None:
        """Tokenize the prompts; nothing is computed yet.

        Args:
            model: whose keys.
            requests: the facts.
            prefixes: templates with one {} for the whole prompt.
            token: at which keys and states are read, see `Prompt.position`.
            subject_alone: take keys behind the prefix from the subject alone (MEMIT Eq. 19), not from the whole prompt.
            batch_size: prompts per forward pass.
            memory_fraction: fraction of the device's free memory that the cached stream may take; a larger one lies on
                the CPU.
        """
        self.model = model
        self.layer = 0
        """The block at whose input the stream is cached. It only goes up."""
        prompts = [
            [
                *_prompts_up_to(token, _without_words(request) if subject_alone else request, model, prefixes),
                *_prompts_up_to(token, request, model, [BARE]),
            ]
            for request in requests
        ]
        bare = sorted({fact_prompts[-1] for fact_prompts in prompts}, key=_by_length)
        with_prefix = {ids for fact_prompts in prompts for ids in fact_prompts[:-1]}
        unique = [*bare, *sorted(with_prefix - set(bare), key=_by_length)]
        index = {ids: row for row, ids in enumerate(unique)}
        self._rows = torch.tensor([[index[ids] for ids in fact_prompts] for fact_prompts in prompts], device="cpu")
        """Row of each request's prompts among the unique ones, [fact, prefix]; the bare prompt's comes last."""
        # Prompts that are equal up to the subject are run once, and the bare ones can be run alone.
        self._bare = _batches(model, bare, batch_size)
        self._batches = [*self._bare, *_batches(model, unique[len(bare) :], batch_size)]
        size = sum(batch.tokens.ids.numel() for batch in self._batches) * model.d_model * model.dtype.itemsize
        fits = _fits_in_memory(size, model.device, memory_fraction)
        self._cache_device = model.device if fits else torch.device("cpu")

    @torch.no_grad()
    def advance_(self, layer: int) -> None:
        """Take the stream on to the input of block `layer`, through the model as it is now.

        Raises:
            ValueError: it is beyond that block already.
        """
        self._check_layer(layer)
        if layer > self.layer:
            site = Site(layer - 1, "resid")
            self._cache_(layer, [self._run(batch, [site])[site].to(self._cache_device) for batch in self._batches])

    @torch.no_grad()
    def keys(self, layer: int) -> Float[Tensor, "fact prefix d_mlp"]:
        """The keys of `layer` at the token, in float32 at least; the stream is taken on to `layer`.

        Where the model is split over processes, so are they, along d_mlp: of a batch each process keeps its columns.

        Raises:
            ValueError: the stream is beyond that block already.
        """
        self._check_layer(layer)
        key, block_input = self.model.key_site(layer), Site(layer - 1, "resid")
        sites = [key] if layer == self.layer else [block_input, key]
        keys, streams = [], []
        for batch in self._batches:
            run = self._run(batch, sites)
            keys.append(_columns_here(_at_last_token(run[key], batch.tokens), self.model.mesh))
            if block_input in sites:
                streams.append(run[block_input].to(self._cache_device))
        if streams:
            self._cache_(layer, streams)
        here = torch.cat(keys)[self._rows[:, :-1]]
        return here if self.model.mesh is None else split_in_columns(here, self.model.mesh)

    @torch.no_grad()
    def states(self, sites: Sequence[Site]) -> dict[Site, Float[Tensor, "fact d_model"]]:
        """The states of `sites`, at `layer` or above, at the token of the bare prompt.

        They are in float32 at least. The stream stays where it is.
        """
        runs = [(self._run(batch, sites), batch.tokens) for batch in self._bare]
        return {
            site: torch.cat([_at_last_token(run[site], tokens) for run, tokens in runs])[self._rows[:, -1]]
            for site in sites
        }

    @torch.no_grad()
    def replay(
        self, site: Site, values: Float[Tensor, "fact d_model"], read: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "fact d_model"]]:
        """The states at `read`, as by `states`, with `values` written to `site` at the token."""
        states = {read_site: torch.zeros_like(values) for read_site in read}
        for first, batch in zip(_first_rows(self._bare), self._bare, strict=True):
            rows = self._rows[:, -1] - first
            facts = ((rows >= 0) & (rows < len(batch.tokens.ids))).nonzero()[:, 0]
            # A row for each fact: those that share a prompt differ in what is written.
            for chunk in facts.split(len(batch.tokens.ids)):
                chunk_batch, chunk = batch.take(rows[chunk]), chunk.to(values.device)
                last = (chunk_batch.tokens.lengths - 1)[:, None]
                patch = Patch(site, last, values[chunk][:, None].to(self.model.dtype))
                run = self._run(chunk_batch, read, [patch])
                for read_site in read:
                    states[read_site][chunk] = _at_last_token(run[read_site], chunk_batch.tokens).to(values)
        return states

    def _run(self, batch: _Batch, read: Sequence[Site], patches: Sequence[Patch] = ()) -> Run:
        """Run from the cached stream to the last site."""
        start = Resume(self.layer, batch.stream) if batch.stream is not None else None
        return self.model.run(batch.tokens, patches, read, resume=start, stop_after=max(site.layer for site in read))

    def _cache_(self, layer: int, streams: Sequence[Tensor]) -> None:
        """Cache each batch's stream, [batch, pos, d_model], at the input of block `layer`."""
        for batch, stream in zip(self._batches, streams, strict=True):
            batch.stream = stream
        self.layer = layer

    def _check_layer(self, layer: int) -> None:
        if layer < self.layer:
            raise ValueError(f"the stream is at the input of block {self.layer}, expected it at {layer} or below")


def prefix_mean(keys: Float[Tensor, "fact prefix d_mlp"], convention: str = "default") -> Float[Tensor, "d_mlp fact"]:
    """Each fact's key: the mean over prefixes (MEMIT Eq. 19), in float64; split in rows where keys are split.

    `convention="memit-2022"` takes the mean of the first prefix's key and of the mean over the other prefixes, as the
    published code does.
    """
    weights = [1 / keys.shape[1]] * keys.shape[1]
    if convention == "memit-2022" and len(weights) > 1:
        weights = [1 / 2, *[1 / (2 * (len(weights) - 1))] * (len(weights) - 1)]
    here = part_here(keys)
    total = here.new_zeros(here.shape[0], here.shape[2], dtype=torch.float64)
    # One prefix after another: all of them in float64 would take as many times the memory.
    for weight, prefix_keys in zip(weights, here.unbind(1), strict=True):
        total.add_(prefix_keys, alpha=weight)
    return split_in_rows(total.T, keys.device_mesh) if is_split(keys) else total.T


@dataclass(eq=False)
class _Batch:
    """Prompts of similar length and their residual stream at the input of the layer that was reached."""

    tokens: Tokens
    stream: Float[Tensor, "batch pos d_model"] | None = None
    """None at layer 0, where a run starts with the tokens."""

    def take(self, rows: Int[Tensor, " row"]) -> _Batch:
        """The chosen rows, which may repeat."""
        tokens = self.tokens.rows(rows.to(self.tokens.ids.device))
        return _Batch(tokens, None if self.stream is None else self.stream[rows.to(self.stream.device)])


def _prompts_up_to(token: str, request: EditRequest, model: Model, prefixes: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of the request behind each prefix, up to a token."""
    return [prompt.ids[: prompt.position(token) + 1] for prompt in prefixed_prompts(model, request, prefixes)]


def _without_words(request: EditRequest) -> EditRequest:
    """The request whose prompt is its subject alone."""
    return replace(request, prompt=BARE)


def _by_length(ids: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return (len(ids), ids)


def _batches(model: Model, rows: Sequence[tuple[int, ...]], size: int) -> list[_Batch]:
    return [_Batch(pad(batch, model.tokenizer, model.device)) for batch in batches_of(rows, size)]


def _first_rows(batches: Sequence[_Batch]) -> list[int]:
    """The number of each batch's first row."""
    sizes = [len(batch.tokens.ids) for batch in batches]
    return [sum(sizes[:number]) for number in range(len(sizes))]


def _at_last_token(values: Float[Tensor, "batch pos width"], tokens: Tokens) -> Float[Tensor, "batch width"]:
    """The values at each row's last token, in float32 at least."""
    last = (tokens.lengths - 1).to(values.device)[:, None, None]
    chosen = values.take_along_dim(last, 1)[:, 0]
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32))


def _columns_here(keys: Float[Tensor, "batch width"], mesh: DeviceMesh | None) -> Float[Tensor, "batch here"]:
    """A copy of this process's columns, so that the others can be freed; all of them where there are no others."""
    if mesh is None:
        return keys
    columns = rows_here(keys.shape[1], mesh)
    return keys[:, columns.start : columns.stop].clone()


def _fits_in_memory(size: int, device: torch.device, fraction: float) -> bool:
    """Whether so many bytes are within this fraction of the device's free memory, or where that is not known."""
    memory_info = getattr(torch.get_device_module(device), "mem_get_info", None)
    return memory_info is None or size <= fraction * memory_info(device)[0]
