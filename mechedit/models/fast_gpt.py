"""A quicker way through GPT-2's and GPT-Neo's blocks on a CPU in float32, for runs that look at few sites.

transformers' blocks write a fresh tensor for every sum, copy queries, keys and values into place for a batched
product, and build a mask a row and a layer. Here the mask is made once, and where rows are alike it is one for all;
attention reads the heads where they lie, GELU overwrites its input where no gradient needs it, and the products add
to the residual stream. The last block computes the kept positions alone: of the others it needs keys and values only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel, GPTNeoForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoMLP
from transformers.pytorch_utils import Conv1D

from mechedit.models.fast_gelu import InPlaceGelu
from mechedit.models.plan import Step, Write
from mechedit.models.protocol import Keep, KVCache, Resume, Run, Site, Tokens, lengths_after
from mechedit.models.shared_copy import replaced

_READ = ("attn_key", "mlp_key", "resid")
_WRITTEN = ("attn_out", "mlp_out", "resid")


@dataclass(frozen=True, eq=False)
class Heads:
    """What a block's attention does."""

    inputs: tuple[Any, ...]
    """Projections whose outputs, side by side, are queries, keys and values."""
    output: Any
    """The projection of what they find."""
    count: int
    """How many there are."""
    scale: float
    """Of the products of queries and keys."""
    window: int | None
    """How many positions a token sees, itself included; None means all."""


@dataclass(frozen=True, eq=False)
class Sight:
    """Which positions the tokens of a run see; padding, at the right, is seen by padding alone."""

    count: int
    """Of positions that are computed."""
    kv_cache: KVCache | None
    made: dict[int | None, Float[Tensor, "row 1 query key"]] = field(default_factory=dict)
    """Masks by window, for all rows together where they are alike."""

    def is_causal(self, window: int | None) -> bool:
        """Whether every token sees itself and all before it, and nothing else is there."""
        return self.kv_cache is None and (window is None or window >= self.count)

    def past(self, window: int | None) -> int:
        """How many positions of the kv_cache, its last ones, are seen at all."""
        length = 0 if self.kv_cache is None else self.kv_cache.length
        return length if window is None else min(length, window - 1)

    def mask(self, window: int | None) -> Float[Tensor, "row 1 query key"]:
        """0 where a query sees a key, −∞ where not."""
        if window not in self.made:
            past = self.past(window)
            behind = torch.arange(past, past + self.count)[:, None] - torch.arange(past + self.count)
            hidden = ((behind < 0) if window is None else (behind < 0) | (behind >= window))[None]
            if self.kv_cache is not None and self.kv_cache.lengths is not None:
                places = torch.arange(past, 0, -1)
                empty = functional.pad(places > self.kv_cache.lengths[:, None], (0, self.count))
                hidden = hidden | empty[:, None]
            self.made[window] = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)[:, None]
        return self.made[window]


def supports_run(
    model: Any,
    steps: Sequence[Step],
    resume: Resume | None,
    keep: Keep,
    cache: bool,
) -> bool:
    """Whether `run_fast` can do this run: keys and residuals are read, and what is written joins the residual.

    The model is one of those that `supports_model` tells.
    """
    if (cache and resume is not None) or (isinstance(keep, int) and keep != 0):
        return False
    seen = all(
        (not step.read or step.site.part in _READ) and (not step.writes or step.site.part in _WRITTEN) for step in steps
    )
    weights = [model.transformer.wte.weight, *(block.mlp.c_proj.weight for block in model.transformer.h)]
    return seen and all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)


def supports_model(model: Any) -> bool:
    """Whether the model is one of the two, in the form that is computed here."""
    if not isinstance(model, GPT2LMHeadModel | GPTNeoForCausalLM):
        return False
    mlps = (block.mlp for block in model.transformer.h)
    if not all(isinstance(mlp, GPT2MLP | GPTNeoMLP) and isinstance(mlp.act, InPlaceGelu) for mlp in mlps):
        return False
    return isinstance(model, GPTNeoForCausalLM) or not model.config.add_cross_attention


def run_fast(
    model: Any,
    tokens: Tokens,
    steps: Sequence[Step],
    end: Site | None,
    *,
    resume: Resume | None,
    keep: Keep,
    kv_cache: KVCache | None,
    cache: bool,
) -> Run:
    """One forward pass, up to `end` when there is one; see `mechedit.models.protocol.Model.run`."""
    blocks, visited = model.transformer.h, {step.site: step for step in steps}
    first, hidden = (0, _embedded(model, tokens, kv_cache)) if resume is None else (resume.layer, resume.resid)
    last = len(blocks) - 1 if end is None else end.layer
    # The kept positions alone go through the last block, if nobody looks into it that counts them otherwise.
    looked_at = [step for step in steps if step.site.layer == last]
    alike = isinstance(keep, Tensor) and keep.ndim == 1
    narrow = end is None and not any(step.read for step in looked_at) and (alike or not looked_at)
    kept = keep if narrow and isinstance(keep, Tensor) else None
    sight, values, pairs = Sight(tokens.ids.shape[1], kv_cache), {}, []
    for layer in range(first, last + 1):
        past = None if kv_cache is None else kv_cache.layers[layer]
        here = {site.part: step for site, step in visited.items() if site.layer == layer}
        stop = end.part if end is not None and layer == last else "resid"
        block = _Block(blocks[layer], sight, here, values, kept if layer == last else None)
        hidden, pair = block.run(hidden, past, stop)
        if cache:
            pairs.append(pair if past is None else _joined(past, pair))
    found = KVCache(tuple(pairs), lengths_after(kv_cache, tokens)) if cache else None
    if end is not None:
        return Run(None, values, found)
    if isinstance(keep, Tensor) and kept is None:
        hidden = _chosen(hidden, keep)
    return Run(model.lm_head(model.transformer.ln_f(hidden)), values, found)


def _embedded(model: Any, tokens: Tokens, kv_cache: KVCache | None) -> Float[Tensor, "batch pos d_model"]:
    """What the first block gets."""
    past = tokens.ids.new_zeros(1) if kv_cache is None else tokens.ids.new_full((1,), kv_cache.length)
    if kv_cache is not None and kv_cache.lengths is not None:
        past = kv_cache.lengths
    places = past[:, None] + torch.arange(tokens.ids.shape[1])
    at = places.clamp(max=model.config.max_position_embeddings - 1)
    return model.transformer.wte(tokens.ids) + model.transformer.wpe(at)


@dataclass(frozen=True, eq=False)
class _Block:
    """One block, and what is looked at in it."""

    module: Any
    sight: Sight
    steps: Mapping[str, Step]
    """By part."""
    values: dict[Site, Tensor]
    """Where what is read goes."""
    kept: Int[Tensor, "*batch kept"] | None
    """The positions that go on from here; None means all."""

    def run(
        self, hidden: Float[Tensor, "batch pos d_model"], past: tuple[Tensor, Tensor] | None, stop: str
    ) -> tuple[Float[Tensor, "batch kept d_model"], tuple[Tensor, Tensor]]:
        """The residual after the block, or at the part where the run stops, and the keys and values computed."""
        heads = _heads(self.module)
        queries, keys, values = self.projected(heads, self.module.ln_1(hidden))
        if self.kept is not None:
            hidden = _chosen(hidden, self.kept)
        found = self.visit("attn_key", self.attend(heads, queries, keys, values, past))
        if stop != "attn_key":
            hidden = self.added(hidden, heads.output, found, "attn_out")
            mlp = self.module.mlp
            found = self.visit("mlp_key", mlp.act(mlp.c_fc(self.module.ln_2(hidden))))
            if stop != "mlp_key":
                hidden = self.visit("resid", self.added(hidden, mlp.c_proj, found, "mlp_out"))
        return hidden, (keys, values)

    def projected(
        self, heads: Heads, normed: Float[Tensor, "batch pos d_model"]
    ) -> list[Float[Tensor, "batch head _ d_head"]]:
        """Queries at the kept positions, keys and values at all."""
        asking = normed if self.kept is None else _chosen(normed, self.kept)
        if len(heads.inputs) == 3:
            parts = [project(normed if i else asking) for i, project in enumerate(heads.inputs)]
        elif self.kept is None:
            parts = heads.inputs[0](normed).chunk(3, dim=-1)
        else:
            (joint,), width = heads.inputs, normed.shape[-1]
            weight, bias = _matrix(joint).split([width, 2 * width], dim=1), joint.bias.split([width, 2 * width])
            asked, rest = (
                torch.addmm(bias[i], some.flatten(0, 1), weight[i]).unflatten(0, some.shape[:2])
                for i, some in enumerate((asking, normed))
            )
            parts = [asked, *rest.chunk(2, dim=-1)]
        return [part.unflatten(-1, (heads.count, -1)).transpose(1, 2) for part in parts]

    def attend(
        self,
        heads: Heads,
        queries: Float[Tensor, "batch head kept d_head"],
        keys: Float[Tensor, "batch head pos d_head"],
        values: Float[Tensor, "batch head pos d_head"],
        past: tuple[Tensor, Tensor] | None,
    ) -> Float[Tensor, "batch kept d_model"]:
        """What the heads find, one beside another."""
        if past is not None:
            begin = past[0].shape[2] - self.sight.past(heads.window)
            keys, values = _joined((past[0][:, :, begin:], past[1][:, :, begin:]), (keys, values))
        causal = self.kept is None and self.sight.is_causal(heads.window)
        mask = None if causal else self.sight.mask(heads.window)
        if mask is not None and self.kept is not None:
            mask = _chosen_queries(mask, self.kept)
        if mask is not None and torch.is_grad_enabled():
            # For rows this short the fused kernel's way back takes longer than that of two batched products.
            scaled = queries if heads.scale == 1 else queries * heads.scale
            found = torch.matmul(scaled, keys.mT).add_(mask).softmax(-1) @ values
        else:
            found = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=causal, scale=heads.scale
            )
        return found.transpose(1, 2).flatten(2)

    def added(
        self,
        hidden: Float[Tensor, "batch pos d_model"],
        module: Any,
        inputs: Float[Tensor, "batch pos d_in"],
        part: str,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual with a module's output added, in one product; where something is written, with that instead."""
        flat = hidden.flatten(0, 1) + module.bias

        def forward(inputs: Tensor) -> Tensor:
            return flat.addmm_(inputs.flatten(0, 1), _matrix(module))

        # As the module's own forward, so that whoever watches modules sees it run.
        with replaced({module: forward}):
            module(inputs)
        total = flat.unflatten(0, hidden.shape[:2])
        for write in self.writes(part):
            before = total if write.add else hidden
            total[write.rows, write.columns] = before[write.rows, write.columns] + write.value
        return total

    def visit(self, part: str, activation: Tensor) -> Tensor:
        """Write and read at a site."""
        step = self.steps.get(part)
        if step is None:
            return activation
        return Step(step.site, tuple(self.writes(part)), step.read)(activation, self.values)

    def writes(self, part: str) -> Sequence[Write]:
        """What is written there, its columns counted among the kept ones."""
        step = self.steps.get(part)
        if step is None or self.kept is None:
            return () if step is None else step.writes
        return [_at(write, self.kept, self.sight.count) for write in step.writes]


def _joined(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of earlier positions and of later ones."""
    return torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2)


def _heads(block: Any) -> Heads:
    """Where a block has the parts of its attention."""
    attn = block.attn
    if not hasattr(attn, "attention"):
        return Heads((attn.c_attn,), attn.c_proj, attn.num_heads, attn.scaling, None)
    inner = attn.attention
    window = inner.config.window_size if inner.attention_type == "local" else None
    return Heads((inner.q_proj, inner.k_proj, inner.v_proj), inner.out_proj, inner.num_heads, 1.0, window)


def _chosen(
    states: Float[Tensor, "batch pos width"], kept: Int[Tensor, "*batch kept"]
) -> Float[Tensor, "batch kept width"]:
    """The states at the kept positions, the same ones of each row or each row's own."""
    return states.index_select(1, kept) if kept.ndim == 1 else states.take_along_dim(kept[..., None], 1)


def _chosen_queries(
    mask: Float[Tensor, "row 1 query key"], kept: Int[Tensor, "*batch kept"]
) -> Float[Tensor, "_ 1 kept key"]:
    """The mask of the kept positions."""
    return mask.index_select(2, kept) if kept.ndim == 1 else mask.take_along_dim(kept[:, None, :, None], 2)


def _at(write: Write, kept: Int[Tensor, " kept"], width: int) -> Write:
    """A write with its columns counted among the kept ones; the others are left out."""
    places = kept.new_full((width,), -1)
    places[kept] = torch.arange(len(kept))
    columns = places[write.columns]
    chosen = columns >= 0
    return Write(write.rows[chosen], columns[chosen], write.value[chosen], write.add)


def _matrix(module: Any) -> Float[Tensor, "d_in d_out"]:
    """The weight, inputs first."""
    return module.weight if isinstance(module, Conv1D) else module.weight.T
