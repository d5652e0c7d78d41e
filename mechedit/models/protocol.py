"""The interface between mechedit and a language model: read a site, write a site, run from a layer on.

A `Site` names a place in the forward pass and a `Patch` writes there. Noising, restoring, severing and
the search for z are all patches. Both backends satisfy `Model` and give the same numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, device, dtype, nn
from torch import dtype as torch_dtype
from torch.distributed.device_mesh import DeviceMesh

from mechedit.models.family import Family
from mechedit.models.kv_cache import KVCache
from mechedit.models.readout import Readout, WholeReadout
from mechedit.models.sites import Module, Site
from mechedit.provenance import ModelIdentity

LogitsToKeep = Int[Tensor, " kept"] | Int[Tensor, "batch kept"] | int
"""Positions whose logits a run returns; see `Model.run`."""


@dataclass(frozen=True, eq=False)
class Patch:
    """Overwrite the activation at `site`: row b, position positions[b, s] becomes value[b, s].

    A position of −1 writes nothing, as rows may differ in their numbers of positions. Gradients flow into `value`.
    """

    site: Site
    positions: Int[Tensor, "batch slot"]
    value: Float[Tensor, "batch slot width"]
    add: bool = False
    """Add the value to the activation instead of replacing it."""


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


@dataclass(frozen=True, eq=False)
class Run:
    """The result of one forward pass."""

    final_logits: Float[Tensor, "batch kept vocab"] | None
    """The logits; None when the run was stopped early. `logits` is the same and never None."""
    values: Mapping[Site, Float[Tensor, "batch pos width"]] = field(default_factory=dict)
    """The activations of the sites that were read; where a site was also patched, the value after the patch."""
    final_cache: KVCache | None = None
    """The KV cache; None unless the run was asked for it. `kv_cache` is the same and never None."""
    final_head_inputs: Float[Tensor, "batch kept d_model"] | None = None
    """The input of the unembedding; None unless the run ended there. `head_inputs` is the same and never None."""

    def __getitem__(self, site: Site) -> Float[Tensor, "batch pos width"]:
        return self.values[site]

    def on(self, device: device) -> Run:
        """The same with its activations and logits on one device; keys and values stay where their layers are."""
        return Run(
            _on(self.final_logits, device),
            {site: value.to(device) for site, value in self.values.items()},
            self.final_cache,
            _on(self.final_head_inputs, device),
        )

    @property
    def logits(self) -> Float[Tensor, "batch kept vocab"]:
        """Logits at the positions of `logits_to_keep`.

        Raises:
            ValueError: the run was stopped early, so no logits were computed.
        """
        if self.final_head_inputs is not None:
            raise ValueError("this run has no logits: it ended before the unembedding; call Model.run without unembed")
        if self.final_logits is None:
            raise ValueError("this run has no logits: it was stopped early; call Model.run without stop_after")
        return self.final_logits

    @property
    def head_inputs(self) -> Float[Tensor, "batch kept d_model"]:
        """What the unembedding would multiply, after the final norm, at the positions of `logits_to_keep`.

        Raises:
            ValueError: the run did not end before the unembedding.
        """
        if self.final_head_inputs is None:
            raise ValueError("this run has no head inputs: call Model.run with unembed=False and without stop_after")
        return self.final_head_inputs

    @property
    def kv_cache(self) -> KVCache:
        """Keys and values of all positions, for runs that change only later ones.

        Those of a cache that the run was given are in it.

        Raises:
            ValueError: the run was not asked for it.
        """
        if self.final_cache is None:
            raise ValueError("this run has no KV cache: call Model.run with use_cache=True")
        return self.final_cache


def _on(tensor: Tensor | None, device: device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


@dataclass(frozen=True, eq=False)
class Resume:
    """Start at block `layer` ≥ 1 from a cached residual: the blocks below it are not computed."""

    layer: int
    resid: Float[Tensor, "batch pos d_model"]
    """Input of block `layer`, that is `resid` of layer − 1."""


@runtime_checkable
class Model(Protocol):
    """A causal language model with named sites, as `mechedit.load_model` returns it.

    `module`, `projection`, `module_output`, `output_gain`, `norm_gain`, `key_site` and `d_key` speak of the edited
    module: the MLP, or attention after `writing("attn")`.
    """

    name: str
    """The name that the user loaded it by: `tiny`, a hub name, a folder."""
    backend: str
    """`transformer_lens` or `nnsight`; `transformers` where the weights are split over processes."""
    family: Family
    """The architecture, and where it keeps its parts."""
    hf: Any
    """The clean transformers model, for users; `hf.save_pretrained` and `hf.generate` work."""
    tokenizer: Any
    """The transformers tokenizer, unchanged: `batching.pad` makes right-padded batches."""
    n_layers: int
    n_heads: int
    """Attention heads (query heads) per layer."""
    d_model: int
    d_mlp: int
    d_key: int
    """Width of the edited module's keys: d_mlp, or head · d_head for attention."""
    vocab_size: int
    """Rows of the token embedding, and so the number of logits; a tokenizer may use fewer. It may also know tokens that
    have no row: ordinary text gives none of them, and a run on one is an InputError."""
    module: Module
    """The edited module."""
    max_positions: int
    keeps_keys: bool
    """Whether a `KVCache` holds attention's keys and values, so that a prefix is not computed again; where other
    blocks keep a state (hybrid stacks), a run behind a prefix computes it again, with the same result."""

    @property
    def runs_at_once(self) -> bool:
        """Whether several threads may call `run` at once; else runs replace forwards of modules that they share."""
        ...

    @property
    def skips_padding(self) -> bool:
        """Whether the padding of a batch costs next to nothing, since its blocks compute real tokens alone."""
        return False

    @property
    def keeps_scores(self) -> bool:
        """Whether attention's scores are all in memory at once, since no fused kernel computes them (Gemma 2's cap)."""
        return False

    @property
    def mesh(self) -> DeviceMesh | None:
        """The processes over which the weights are split, and so the rows of second moments; None without others."""
        return None

    @property
    def device(self) -> device:
        """Device of the weights (of the token embedding, when they are spread)."""
        ...

    @property
    def dtype(self) -> dtype:
        """Dtype of the weights."""
        ...

    @property
    def edit_log(self) -> tuple[Any, ...]:
        """The edits applied to the weights, oldest first; shared by all models around the same weights."""
        ...

    @edit_log.setter
    def edit_log(self, entries: tuple[Any, ...]) -> None: ...

    @property
    def temporary_edits(self) -> int:
        """Number of edits that are on the weights within `edited` blocks only."""
        ...

    @temporary_edits.setter
    def temporary_edits(self, count: int) -> None: ...

    @property
    def checkpoint(self) -> str:
        """Hub name or folder that the weights were loaded from; empty for a model made in memory."""
        ...

    def exclusive(self) -> AbstractContextManager[Any]:
        """Nobody else uses the model, or another model around the same weights, within the block.

        Other threads wait until it has ended; blocks of one thread may lie in each other. All public calls open one
        while they run, and `edited` and sessions until they end. See `mechedit.models.model_lock`.

        Example:
            >>> with model.exclusive():  # no other thread edits the model between the two
            ...     scores, perplexity = me.evaluate(model, requests), me.perplexity(model, texts)

        Raises:
            InputError: another task of this thread uses the model, or a thread that itself only waits.
        """
        return nullcontext()

    def run(
        self,
        tokens: Tokens,
        patches: Sequence[Patch] = (),
        read: Sequence[Site] = (),
        *,
        resume: Resume | None = None,
        logits_to_keep: LogitsToKeep = 0,
        stop_after: int | None = None,
        kv_cache: KVCache | None = None,
        use_cache: bool = False,
        unembed: bool = True,
    ) -> Run:
        """One forward pass with `patches` written and the sites in `read` returned.

        Gradients are recorded when the caller's grad mode is on and a patch value requires grad.

        Args:
            tokens: right-padded batch.
            patches: written in forward order; of two patches on one site, the later in the sequence is written last.
            read: sites to return.
            resume: skip the blocks below `resume.layer`. Sites below it can be neither read nor patched.
            logits_to_keep: positions whose logits are returned: [kept] for all rows, or [batch, kept] with each row's
                own; 0 means all.
            stop_after: return after this block, without logits (later blocks are not computed).
            kv_cache: keys and values of earlier positions, which are not computed again. `tokens`, patches, `resume`,
                `logits_to_keep` and what is read then concern the positions that follow, counted from 0.
            use_cache: return every position's keys and values in `Run.kv_cache`.
            unembed: compute the logits; else the run ends before the unembedding and returns `Run.head_inputs`.

        Raises:
            ValueError: a site outside the model or below `resume`, a value of the wrong shape, or a row that keeps
                a position twice; as an InputError, a token that the embedding has no row for.
        """
        ...

    def next_logits(
        self,
        ids: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch all"],
        cache: Any = None,
        rows: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch vocab"], Any]:
        """One step of text generation by the transformers model itself: logits after the last position, and its cache.

        Args:
            ids: the prompt at first, then the token that was chosen.
            mask: 1 on the tokens so far, those in `cache` included.
            cache: the cache that the last step returned; this step changes it.
            rows: the last step's rows that go on, if not all do.
        """
        ...

    @property
    def end_tokens(self) -> list[int]:
        """Ids of the tokens that end a text, by the tokenizer and by the model's generation settings, ascending."""
        ...

    def window(self, layer: int) -> int | None:
        """Width of a block's attention window, the token itself included; None where all positions are seen."""
        ...

    def projection(self, layer: int) -> Float[Tensor, "d_key d_model"]:
        """The edited module's matrix, always [d_key, d_model]: a live view, writing to which edits the model.

        The MLP's second matrix [d_mlp, d_model], or attention's output projection [head · d_head, d_model]. Where the
        weights are split over processes it is a copy: only `write_projection_` edits every model.
        """
        ...

    def write_projection_(self, layer: int, weight: Float[Tensor, "d_key d_model"]) -> None:
        """Put other numbers into the edited module's matrix."""
        self.projection(layer).copy_(weight)

    def down_projection(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """A live view of the MLP's second matrix, always [d_mlp, d_model], whichever module is edited."""
        ...

    def writing(self, module: str) -> Model:
        """The same model, its weights shared, with edits written into `module`: `mlp`, or `attn` (MEMIT Fig. 12).

        Raises:
            InputError: an unknown module, or one whose projection is not the matrix between its key and its output.
        """
        ...

    def key_site(self, layer: int) -> Site:
        """Site of a layer's keys: the input of `projection`."""
        ...

    def module_output(self, layer: int, keys: Float[Tensor, "*batch d_key"]) -> Float[Tensor, "*batch d_model"]:
        """The edited module's addition to the residual stream at these keys: keys · W + b, after any post-norm."""
        ...

    def output_gain(self, layer: int, keys: Float[Tensor, "*batch d_key"]) -> Float[Tensor, "*batch d_model"]:
        """`module_output` in units of the projection's output: g / rms(keys · W + b) with a post-norm, else 1."""
        ...

    def norm_gain(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """The norm's g where the edited module adds g ⊙ x / rms(x) of its projection's output x; None without one."""
        ...

    def unembed(self, resid: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch vocab"]:
        """Next-token logits of residuals after the last block: final norm, unembedding and logit caps, as in `run`."""
        ...

    def readout(self) -> Readout | WholeReadout:
        """What reads log-probabilities and divergences off `Run.head_inputs` without all logits in memory.

        Held against the model's own logits when first called; without agreement, or a readout, it takes `Run.logits`.
        """
        return WholeReadout()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The transformers model's parameters, with the names that its checkpoints use."""
        ...

    @property
    def checkpoint_dtype(self) -> dtype:
        """Dtype in which the checkpoint holds the weights; that of the model, where it was not loaded from one."""
        ...

    def save_pretrained(self, folder: str | Path, *, dtype: torch_dtype | None = None, text: str | None = None) -> None:
        """Write weights, config and tokenizer as a transformers checkpoint, and read it back.

        Files of the source that still hold are copied byte for byte. Reading back takes a second model in memory.

        Args:
            folder: to write into.
            dtype: of the weights; by default the model's.
            text: prompt on which the logits of both are compared.

        Raises:
            InputError: what was read back is not this model.
        """
        ...

    def logits_with_adapter(self, folder: str | Path, ids: Int[Tensor, "1 pos"]) -> Float[Tensor, "1 pos vocab"] | None:
        """Logits with an adapter of PEFT on the model, in float32; None if PEFT is not installed."""
        ...

    def weights_hash(self, *, blocks: bool = True) -> str:
        """SHA-256 over the parameters as they are now (names, shapes, dtypes, bytes): all, or those outside blocks."""
        ...

    def cast_hashes(self, dtypes: Collection[str] | None = None) -> dict[str, str]:
        """Hashes that the weights as they are now have in other dtypes than the model's, by name; by default in all.

        A copy of the model that was loaded in one of these dtypes has that `weights_hash`.
        """
        ...

    def identity(self) -> ModelIdentity:
        """Weights, tokenizer, dtype and edited module as they are now: what decides whether a result may be reused.

        A method, since it looks at all weights; they are hashed once for each state that they are in.
        """
        ...

    def provenance(self) -> dict[str, Any]:
        """Name, backend, weights hash, tokenizer hash, dtype, edited module, and mechedit version."""
        ...
