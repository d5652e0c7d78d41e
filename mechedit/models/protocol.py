"""What the rest of mechedit may ask of a language model: read a site, write a site, run from a layer on.

A `Site` names a place in the forward pass and a `Patch` writes there. Noising, restoring, severing and
the search for z are all patches. Both backends satisfy `Model` and give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, device, dtype

Part = Literal["embed", "attn_key", "attn_out", "mlp_key", "mlp_out", "resid"]
PARTS: tuple[str, ...] = get_args(Part)
"""In forward order within a block; `embed` precedes every block."""
Module = Literal["mlp", "attn"]
"""What an edit can be written into: the MLPs' second matrices, or attention's output projections."""
MODULES: tuple[str, ...] = get_args(Module)
_WRITTEN: dict[Module, tuple[Part, Part]] = {"mlp": ("mlp_key", "mlp_out"), "attn": ("attn_key", "attn_out")}


@dataclass(frozen=True)
class Site:
    """A place in the forward pass, the same on every architecture.

    `embed`: output of the token embedding, after any scale and before any position embedding.
    `attn_out`, `mlp_out`: what the module adds to the residual stream, after any post-norm.
    `mlp_key`: input of the down-projection, [d_mlp].
    `attn_key`: input of attention's output projection, the heads' results side by side, [head · d_head].
    `resid`: the residual stream after the block.
    """

    layer: int
    """0-based block; 0 for `embed`."""
    part: Part

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: forward order."""
        return (-1 if self.part == "embed" else self.layer, PARTS.index(self.part))


EMBED = Site(0, "embed")


def key_part(module: Module) -> Part:
    """The input of the matrix through which a module writes."""
    return _WRITTEN[module][0]


def out_part(module: Module) -> Part:
    """What a module adds to the residual stream."""
    return _WRITTEN[module][1]


Keep = Int[Tensor, " kept"] | Int[Tensor, "batch kept"] | int
"""Positions whose logits are wanted; see `Model.run`."""


@dataclass(frozen=True, eq=False)
class Patch:
    """Overwrite the activation at `site`: row b, position positions[b, s] becomes value[b, s].

    A position of −1 writes nothing, so rows may have different numbers of patched positions. Gradients
    flow into `value`.
    """

    site: Site
    positions: Int[Tensor, "batch slot"]
    value: Float[Tensor, "batch slot width"]
    add: bool = False
    """Add the value to what is there instead."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """A right-padded batch."""

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    """1 on tokens, 0 on padding (always at the right)."""

    def rows(self, index: Int[Tensor, " row"] | slice) -> Tokens:
        """The chosen rows, in the given order (rows may repeat)."""
        return Tokens(self.ids[index], self.mask[index])

    def first(self, count: int) -> Tokens:
        """The first positions of every row."""
        return Tokens(self.ids[:, :count], self.mask[:, :count])

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens in each row."""
        return self.mask.sum(1)


Pairs = tuple[tuple[Float[Tensor, "batch head pos d_head"], Float[Tensor, "batch head pos d_head"]], ...]


@dataclass(frozen=True, eq=False)
class KVCache:
    """What attention keeps of the first positions of a batch; it holds as long as nothing there is patched."""

    layers: Pairs
    """Keys and values of each layer."""
    lengths: Int[Tensor, " batch"] | None = None
    """How many positions each row has, the last ones; None when all rows have all."""

    @property
    def length(self) -> int:
        """Positions covered."""
        return self.layers[0][0].shape[2]

    @property
    def mask(self) -> Int[Tensor, "batch pos"]:
        """1 on positions that a row has, 0 on the empty places before them."""
        keys = self.layers[-1][0]
        places = torch.arange(self.length, 0, -1, device=keys.device).expand(len(keys), -1)
        lengths = keys.new_full((len(keys),), self.length) if self.lengths is None else self.lengths.to(keys.device)
        return (places <= lengths[:, None]).long()

    def take(self, index: Int[Tensor, " row"], length: int, first: int = 0, last: int | None = None) -> KVCache:
        """The first `length` positions of the chosen rows, for a run that resumes at `first` and stops after `last`.

        Other layers are not looked at: they get something of the right shape.
        """
        lengths = None if self.lengths is None else self.lengths[index]
        used = range(first, len(self.layers) if last is None else last + 1)
        shape = (len(index), length)
        return KVCache(self._each(lambda states: states[:, :, :length].index_select(0, index), shape, used), lengths)

    def before(self, ends: Int[Tensor, " batch"], first: int = 0) -> KVCache:
        """Each row's positions before its own end, counted from its first one, for a run that resumes at `first`.

        See `take` for what other layers hold.
        """
        width = int(ends.max())
        begins = 0 if self.lengths is None else self.length - self.lengths
        at = ((begins + ends)[:, None] - torch.arange(width, 0, -1, device=ends.device)).clamp(min=0)
        rows, used = torch.arange(len(ends), device=ends.device)[:, None], range(first, len(self.layers))
        return KVCache(
            self._each(lambda states: states.transpose(1, 2)[rows, at].transpose(1, 2), (len(ends), width), used), ends
        )

    def _each(self, change: Callable[[Tensor], Tensor], shape: tuple[int, int], used: range) -> Pairs:
        """Keys and values of the layers that are used, changed; elsewhere nothing in the shape (rows, positions)."""

        def changed(layer: int, states: Tensor) -> Tensor:
            rows, width = shape
            empty = states.new_zeros(())
            return change(states) if layer in used else empty.expand(rows, states.shape[1], width, states.shape[3])

        return tuple((changed(i, keys), changed(i, values)) for i, (keys, values) in enumerate(self.layers))


def lengths_after(kv_cache: KVCache | None, tokens: Tokens) -> Int[Tensor, " batch"] | None:
    """`KVCache.lengths` once the positions of a batch follow."""
    return None if kv_cache is None or kv_cache.lengths is None else kv_cache.lengths + tokens.ids.shape[1]


@dataclass(frozen=True, eq=False)
class Run:
    """What came out of one forward pass."""

    logits: Float[Tensor, "batch kept vocab"] | None
    """None when the pass was stopped early."""
    values: Mapping[Site, Float[Tensor, "batch pos width"]] = field(default_factory=dict)
    """The activations asked for; where a site was also patched, the value after the patch."""
    kv_cache: KVCache | None = None
    """With `use_cache`: keys and values of all positions, also those that the run was given, for runs that change only
    later positions."""

    def __getitem__(self, site: Site) -> Float[Tensor, "batch pos width"]:
        return self.values[site]


@dataclass(frozen=True, eq=False)
class Resume:
    """Start at block `layer` ≥ 1 from a cached residual: blocks below it are not computed."""

    layer: int
    resid: Float[Tensor, "batch pos d_model"]
    """Input of block `layer`, that is `resid` of layer − 1."""


@runtime_checkable
class Model(Protocol):
    """A causal language model with named sites. See `mechedit.load_model`."""

    name: str
    """What the user called it: `tiny`, a hub name, a folder."""
    backend: str
    """`transformer_lens` or `nnsight`."""
    hf: Any
    """The clean transformers model; `hf.save_pretrained` and `hf.generate` work."""
    tokenizer: Any
    """The transformers tokenizer, used as it is: right-padded batches are made by `prompts`."""
    n_layers: int
    d_model: int
    d_mlp: int
    d_key: int
    """Width of the keys of the module that is written: d_mlp, or head · d_head for attention."""
    module: Module
    """What edits are written into; `projection`, `module_output`, `output_gain`, `key_site` and `d_key` speak of it."""
    max_positions: int

    @property
    def device(self) -> device:
        """Where the weights are."""
        ...

    @property
    def dtype(self) -> dtype:
        """What the weights are."""
        ...

    def run(
        self,
        tokens: Tokens,
        patches: Sequence[Patch] = (),
        read: Sequence[Site] = (),
        *,
        resume: Resume | None = None,
        logits_to_keep: Keep = 0,
        stop_after: int | None = None,
        kv_cache: KVCache | None = None,
        use_cache: bool = False,
    ) -> Run:
        """One forward pass with `patches` written and the sites in `read` returned.

        Gradients are recorded when the caller's grad mode is on and a patch value requires grad.

        Args:
            tokens: right-padded batch.
            patches: in any order; they are written in forward order. With two patches on one site, the
                later in the sequence is written last.
            read: sites to return.
            resume: skip the blocks below `resume.layer`. Sites below it can be neither read nor patched.
            logits_to_keep: positions whose logits are wanted, the same for all rows or each row's own; 0 means all.
            stop_after: return after this block, with no logits (later blocks are not computed).
            kv_cache: keys and values of earlier positions, which are not computed again. `tokens`, patches, `resume`,
                `logits_to_keep` and what is read then concern the positions that follow, counted from 0.
            use_cache: return every position's keys and values in `Run.kv_cache`.

        Raises:
            ValueError: a site outside the model or below `resume`, a value of the wrong shape, or a row that keeps
                a position twice.
        """
        ...

    def window(self, layer: int) -> int | None:
        """How many positions a token of this block sees, itself included; None where that may be all."""
        ...

    def projection(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """A live view of the MLP's second matrix, always [d_mlp, d_model]; writing to it edits the model.

        Of attention's output projection, [head · d_head, d_model], when that is what is written.
        """
        ...

    def writing(self, module: str) -> Model:
        """The same model, its weights shared, with edits written into `module`: `mlp`, or `attn` (MEMIT Fig. 12).

        Raises:
            InputError: an unknown module, or one whose projection is not the matrix between its key and its output.
        """
        ...

    def key_site(self, layer: int) -> Site:
        """Where a layer's keys are: the input of `projection`."""
        ...

    def module_output(self, layer: int, keys: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        """What the written module adds to the residual stream at these keys: keys · W + b, after any post-norm."""
        ...

    def output_gain(self, layer: int, keys: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        """`module_output` in units of the projection's output: g / rms(keys · W + b) with a post-norm, else 1."""
        ...

    def unembed(self, resid: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch vocab"]:
        """Next-token logits of states after the last block: final norm, unembedding and what follows, as in `run`."""
        ...

    def weights_hash(self, *, blocks: bool = True) -> str:
        """SHA-256 over the parameters as they are now (names, shapes, dtypes, bytes): all, or those outside blocks."""
        ...

    def provenance(self) -> dict[str, Any]:
        """Name, backend, weights hash, tokenizer hash, dtype, the module that is written, and mechedit version."""
        ...
