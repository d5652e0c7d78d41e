"""The fast engine of GPT-2 and GPT-Neo on a CPU in float32, for runs that look at few sites.

transformers' blocks write a fresh tensor for every sum, copy queries, keys and values into place for a batched
product, and build a mask per row and layer. Here the mask is made once, and where all rows see the same positions it is
one for all of them; attention reads the heads where they lie in memory, GELU overwrites its input where no gradient
needs it, and the products add to the residual stream. The last block computes the kept positions alone: of the others
it needs keys and values only.
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
from mechedit.models.kv_cache import KVCache
from mechedit.models.protocol import Run, Tokens
from mechedit.models.run_plan import RunPlan, SiteStep, Write
from mechedit.models.sites import Site

_READABLE = ("attn_key", "mlp_key", "resid")
_WRITABLE = ("attn_out", "mlp_out", "resid")


class FastGptEngine:
    """Runs the unhooked copy of a GPT-2 or GPT-Neo, block by block, with operations of its own."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._supported = supports_model(model)

    def can_run(self, plan: RunPlan) -> bool:
        """Whether keys and residuals are all that is read, and all that is written is added to the residual."""
        keep = plan.logits_to_keep
        if not self._supported or (plan.use_cache and plan.resume is not None) or (isinstance(keep, int) and keep != 0):
            return False
        sites_fit = all(
            (not step.read or step.site.part in _READABLE) and (not step.writes or step.site.part in _WRITABLE)
            for step in plan.steps
        )
        blocks = self.model.transformer.h
        weights = [self.model.transformer.wte.weight, *(block.mlp.c_proj.weight for block in blocks)]
        return sites_fit and all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)

    def run(self, plan: RunPlan) -> Run:
        """One forward pass, up to the plan's exit site when there is one."""
        model, cache, exit_site = self.model, plan.kv_cache, plan.exit_site
        hidden = _embed(model, plan.tokens, cache) if plan.resume is None else plan.resume.resid
        last = len(model.transformer.h) - 1 if exit_site is None else exit_site.layer
        positions = _kept_in_last_block(plan, last)
        masks = AttentionMasks(plan.tokens.ids.shape[1], cache)
        values: dict[Site, Tensor] = {}
        computed: list[tuple[Tensor, Tensor]] = []
        for layer in range(plan.first_layer, last + 1):
            cached = None if cache is None else cache.layers[layer]
            steps = {step.site.part: step for step in plan.steps if step.site.layer == layer}
            exit_part = exit_site.part if exit_site is not None and layer == last else "resid"
            block = FastBlock(model.transformer.h[layer], masks, steps, values, positions if layer == last else None)
            hidden, keys_and_values = block.run(hidden, cached, exit_part)
            if plan.use_cache:
                computed.append(keys_and_values if cached is None else _concatenate(cached, keys_and_values))
        lengths = None if cache is None else cache.lengths_with(plan.tokens.ids.shape[1])
        final_cache = KVCache(tuple(computed), lengths) if plan.use_cache else None
        if exit_site is not None:
            return Run(None, values, final_cache)
        if isinstance(plan.logits_to_keep, Tensor) and positions is None:
            hidden = _select(hidden, plan.logits_to_keep)
        head_inputs = model.transformer.ln_f(hidden)
        if not plan.unembed:
            return Run(None, values, final_cache, head_inputs)
        return Run(model.lm_head(head_inputs), values, final_cache)


def supports_model(model: Any) -> bool:
    """Whether the model is a GPT-2 or GPT-Neo, in the form that is computed here."""
    if not isinstance(model, GPT2LMHeadModel | GPTNeoForCausalLM):
        return False
    mlps = (block.mlp for block in model.transformer.h)
    if not all(isinstance(mlp, GPT2MLP | GPTNeoMLP) and isinstance(mlp.act, InPlaceGelu) for mlp in mlps):
        return False
    return isinstance(model, GPTNeoForCausalLM) or not model.config.add_cross_attention


def _kept_in_last_block(plan: RunPlan, last: int) -> Int[Tensor, "*batch kept"] | None:
    """The positions that alone go through the last block; None where all do.

    All do where a step reads the block, or writes into it while each row keeps positions of its own.
    """
    keep = plan.logits_to_keep
    steps = [step for step in plan.steps if step.site.layer == last]
    same_for_all_rows = isinstance(keep, Tensor) and keep.ndim == 1
    if plan.exit_site is not None or any(step.read for step in steps) or not (same_for_all_rows or not steps):
        return None
    return keep if isinstance(keep, Tensor) else None


def _embed(model: Any, tokens: Tokens, kv_cache: KVCache | None) -> Float[Tensor, "batch pos d_model"]:
    """Token and position embeddings: the input of the first block."""
    start = tokens.ids.new_zeros(1) if kv_cache is None else tokens.ids.new_full((1,), kv_cache.length)
    if kv_cache is not None and kv_cache.lengths is not None:
        start = kv_cache.lengths
    positions = start[:, None] + torch.arange(tokens.ids.shape[1], device=tokens.ids.device)
    at = positions.clamp(max=model.config.max_position_embeddings - 1)
    return model.transformer.wte(tokens.ids) + model.transformer.wpe(at)


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """Where a block keeps the parts of its attention, and how it scores keys."""

    inputs: tuple[Any, ...]
    """Projections whose outputs, side by side, are queries, keys and values."""
    output: Any
    """The output projection."""
    n_heads: int
    scale: float
    """Factor of the products of queries and keys."""
    window: int | None
    """Width of the attention window, the token itself included; None where all positions are seen."""


@dataclass(frozen=True, eq=False)
class AttentionMasks:
    """Attention masks of a run, made once per window; padding, at the right, is seen by padding alone."""

    n_queries: int
    """Positions that are computed."""
    kv_cache: KVCache | None
    by_window: dict[int | None, Float[Tensor, "row 1 query key"]] = field(default_factory=dict)
    """The masks made so far; one row where all rows see the same positions."""

    def is_causal(self, window: int | None) -> bool:
        """Whether every token sees itself and all before it, and there is no cache."""
        return self.kv_cache is None and (window is None or window >= self.n_queries)

    def cached_positions(self, window: int | None) -> int:
        """Positions of the cache, its last ones, that any query sees."""
        length = 0 if self.kv_cache is None else self.kv_cache.length
        return length if window is None else min(length, window - 1)

    def mask(self, window: int | None) -> Float[Tensor, "row 1 query key"]:
        """0 where a query sees a key, −∞ where not."""
        if window not in self.by_window:
            cached = self.cached_positions(window)
            distance = torch.arange(cached, cached + self.n_queries, device="cpu")[:, None] - torch.arange(
                cached + self.n_queries, device="cpu"
            )
            hidden = ((distance < 0) if window is None else (distance < 0) | (distance >= window))[None]
            if self.kv_cache is not None and self.kv_cache.lengths is not None:
                distance_to_end = torch.arange(cached, 0, -1, device="cpu")
                empty = functional.pad(distance_to_end > self.kv_cache.lengths[:, None], (0, self.n_queries))
                hidden = hidden | empty[:, None]
            self.by_window[window] = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device).masked_fill(
                hidden, -math.inf
            )[:, None]
        return self.by_window[window]


@dataclass(frozen=True, eq=False)
class FastBlock:
    """One block of a run, with the steps in it."""

    module: Any
    masks: AttentionMasks
    steps: Mapping[str, SiteStep]
    """Steps at the sites of the block, by part."""
    values: dict[Site, Tensor]
    """Receives the activations that are read."""
    positions: Int[Tensor, "*batch kept"] | None
    """The positions that go on from this block; None means all."""

    def run(
        self, hidden: Float[Tensor, "batch pos d_model"], cached: tuple[Tensor, Tensor] | None, exit_part: str
    ) -> tuple[Float[Tensor, "batch kept d_model"], tuple[Tensor, Tensor]]:
        """The residual after the block, or at the part after which the run stops, and the keys and values computed."""
        layout = _attention_layout(self.module)
        queries, keys, values = self.project(layout, self.module.ln_1(hidden))
        if self.positions is not None:
            hidden = _select(hidden, self.positions)
        attn_key = self.visit("attn_key", self.attend(layout, queries, keys, values, cached))
        if exit_part != "attn_key":
            hidden = self.add_output(hidden, layout.output, attn_key, "attn_out")
            mlp = self.module.mlp
            mlp_key = self.visit("mlp_key", mlp.act(mlp.c_fc(self.module.ln_2(hidden))))
            if exit_part != "mlp_key":
                hidden = self.visit("resid", self.add_output(hidden, mlp.c_proj, mlp_key, "mlp_out"))
        return hidden, (keys, values)

    def project(
        self, layout: AttentionLayout, normed: Float[Tensor, "batch pos d_model"]
    ) -> list[Float[Tensor, "batch head _ d_head"]]:
        """Queries at the kept positions, keys and values at all."""
        at_kept = normed if self.positions is None else _select(normed, self.positions)
        if len(layout.inputs) == 3:
            parts = [project(normed if i else at_kept) for i, project in enumerate(layout.inputs)]
        elif self.positions is None:
            parts = layout.inputs[0](normed).chunk(3, dim=-1)
        else:
            (joint,), width = layout.inputs, normed.shape[-1]
            weight, bias = _matrix(joint).split([width, 2 * width], dim=1), joint.bias.split([width, 2 * width])
            queries, keys_and_values = (
                torch.addmm(bias[i], states.flatten(0, 1), weight[i]).unflatten(0, states.shape[:2])
                for i, states in enumerate((at_kept, normed))
            )
            parts = [queries, *keys_and_values.chunk(2, dim=-1)]
        return [part.unflatten(-1, (layout.n_heads, -1)).transpose(1, 2) for part in parts]

    def attend(
        self,
        layout: AttentionLayout,
        queries: Float[Tensor, "batch head kept d_head"],
        keys: Float[Tensor, "batch head pos d_head"],
        values: Float[Tensor, "batch head pos d_head"],
        cached: tuple[Tensor, Tensor] | None,
    ) -> Float[Tensor, "batch kept d_model"]:
        """The heads' results, side by side."""
        if cached is not None:
            begin = cached[0].shape[2] - self.masks.cached_positions(layout.window)
            keys, values = _concatenate((cached[0][:, :, begin:], cached[1][:, :, begin:]), (keys, values))
        causal = self.positions is None and self.masks.is_causal(layout.window)
        mask = None if causal else self.masks.mask(layout.window)
        if mask is not None and self.positions is not None:
            mask = _select_queries(mask, self.positions)
        if mask is not None and torch.is_grad_enabled():
            # For rows this short the fused kernel's backward pass takes longer than that of two batched products.
            scaled = queries if layout.scale == 1 else queries * layout.scale
            results = torch.matmul(scaled, keys.mT).add_(mask).softmax(-1) @ values
        else:
            results = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=causal, scale=layout.scale
            )
        return results.transpose(1, 2).flatten(2)

    def add_output(
        self,
        hidden: Float[Tensor, "batch pos d_model"],
        projection: Any,
        inputs: Float[Tensor, "batch pos d_in"],
        part: str,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual plus a module's output, in one product; where the output is written, plus the written value."""
        biased = hidden.flatten(0, 1) + projection.bias
        total = biased.addmm_(inputs.flatten(0, 1), _matrix(projection)).unflatten(0, hidden.shape[:2])
        for write in self.writes(part):
            before = total if write.add else hidden
            total[write.rows, write.columns] = before[write.rows, write.columns] + write.value
        return total

    def visit(self, part: str, activation: Tensor) -> Tensor:
        """Run the step at a site, if there is one."""
        step = self.steps.get(part)
        if step is None:
            return activation
        return SiteStep(step.site, tuple(self.writes(part)), step.read)(activation, self.values)

    def writes(self, part: str) -> Sequence[Write]:
        """The writes at a site, their columns counted among the kept positions."""
        step = self.steps.get(part)
        if step is None or self.positions is None:
            return () if step is None else step.writes
        return [_among_kept(write, self.positions, self.masks.n_queries) for write in step.writes]


def _concatenate(earlier: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of earlier and of later positions."""
    return torch.cat([earlier[0], later[0]], 2), torch.cat([earlier[1], later[1]], 2)


def _attention_layout(block: Any) -> AttentionLayout:
    attn = block.attn
    if not hasattr(attn, "attention"):
        return AttentionLayout((attn.c_attn,), attn.c_proj, attn.num_heads, attn.scaling, None)
    inner = attn.attention
    window = inner.config.window_size if inner.attention_type == "local" else None
    return AttentionLayout((inner.q_proj, inner.k_proj, inner.v_proj), inner.out_proj, inner.num_heads, 1.0, window)


def _select(
    states: Float[Tensor, "batch pos width"], positions: Int[Tensor, "*batch kept"]
) -> Float[Tensor, "batch kept width"]:
    """The states at the kept positions, the same ones of each row or each row's own."""
    return states.index_select(1, positions) if positions.ndim == 1 else states.take_along_dim(positions[..., None], 1)


def _select_queries(
    mask: Float[Tensor, "row 1 query key"], positions: Int[Tensor, "*batch kept"]
) -> Float[Tensor, "_ 1 kept key"]:
    """The mask of the kept positions."""
    return (
        mask.index_select(2, positions) if positions.ndim == 1 else mask.take_along_dim(positions[:, None, :, None], 2)
    )


def _among_kept(write: Write, positions: Int[Tensor, " kept"], width: int) -> Write:
    """A write with its columns counted among the kept positions; the others are left out."""
    index_of = positions.new_full((width,), -1)
    index_of[positions] = torch.arange(len(positions), device=positions.device)
    columns = index_of[write.columns]
    inside = columns >= 0
    return Write(write.rows[inside], columns[inside], write.value[inside], write.add)


def _matrix(module: Any) -> Float[Tensor, "d_in d_out"]:
    """The weight, inputs first."""
    return module.weight if isinstance(module, Conv1D) else module.weight.T
