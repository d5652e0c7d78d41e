"""A quicker way through the blocks of GPT-2 and GPT-Neo, for runs on a CPU that resume and look at little.

transformers' blocks write a fresh tensor for every sum, copy queries, keys and values into place for a batched
product, and build a mask a row. Here one mask serves all rows, attention reads the heads where they lie, GELU
overwrites its input, and the products add to the residual stream. The last block computes the kept
positions alone: of the others it needs keys and values only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel, GPTNeoForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoMLP
from transformers.pytorch_utils import Conv1D

from mechedit.models.base import Keep, Prefix, Resume, Run, Site, Tokens
from mechedit.models.steps import Step, Write, looks_at_the_end
from mechedit.models.twin import InPlaceGelu, replaced

_PARTS = ("attn_out", "mlp_out", "resid")


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


def lean_fits(
    model: Any,
    tokens: Tokens,
    steps: Sequence[Step],
    resume: Resume | None,
    keep: Keep,
    stop_after: int | None,
    prefix: Prefix | None,
) -> bool:
    """Whether `lean_run` can do this run: what is written is added to the residual, and the end alone is read."""
    if resume is None or torch.is_grad_enabled() or resume.resid.device.type != "cpu":
        return False
    if prefix is not None and prefix.lengths is not None:
        return False
    whole = stop_after is not None or (isinstance(keep, Tensor) and keep.ndim == 1)
    seen = all(looks_at_the_end(step, stop_after) or (step.site.part in _PARTS and not step.read) for step in steps)
    return whole and seen and _is_known(model) and resume.resid.dtype == torch.float32 and bool(tokens.mask.all())


def _is_known(model: Any) -> bool:
    """Whether the model is one of the two, in the form that is computed here."""
    config = model.config
    if model.dtype != torch.float32 or not isinstance(model, GPT2LMHeadModel | GPTNeoForCausalLM):
        return False
    if not all(
        isinstance(module.act, InPlaceGelu) for module in model.modules() if isinstance(module, GPT2MLP | GPTNeoMLP)
    ):
        return False
    return isinstance(model, GPTNeoForCausalLM) or not config.add_cross_attention


def lean_run(
    model: Any,
    steps: Sequence[Step],
    resume: Resume,
    keep: Keep,
    stop_after: int | None,
    prefix: Prefix | None,
) -> Run:
    """One forward pass from a cached residual; see `mechedit.models.base.Model.run`."""
    hidden, blocks = resume.resid, model.transformer.h
    writes = {step.site: step.writes for step in steps if step.writes}
    last = len(blocks) - 1 if stop_after is None else stop_after
    kept = keep if stop_after is None and isinstance(keep, Tensor) else None
    for layer in range(resume.layer, last + 1):
        past = None if prefix is None else prefix.layers[layer]
        here = {part: writes.get(Site(layer, part), ()) for part in _PARTS}  # pyright: ignore[reportArgumentType]
        hidden = _through(blocks[layer], hidden, past, here, kept if layer == last else None)
    if stop_after is not None:
        return Run(None, {step.site: hidden for step in steps if step.read})
    return Run(model.lm_head(model.transformer.ln_f(hidden)), {})


def _through(
    block: Any,
    hidden: Float[Tensor, "batch pos d_model"],
    past: tuple[Tensor, Tensor] | None,
    writes: Mapping[str, Sequence[Write]],
    kept: Int[Tensor, " kept"] | None,
) -> Float[Tensor, "batch kept d_model"]:
    """The residual after a block, at the kept positions (None means all)."""
    normed, heads = block.ln_1(hidden), _heads(block)
    if kept is not None:
        writes = {part: [_at(write, kept, hidden.shape[1]) for write in some] for part, some in writes.items()}
        hidden = hidden[:, kept]
    mixed = _attend(heads, normed, past, kept)
    hidden = _added(hidden, heads.output, mixed, writes["attn_out"])
    active = _activated(block.mlp.c_fc, block.ln_2(hidden))
    hidden = _added(hidden, block.mlp.c_proj, active, writes["mlp_out"])
    for write in writes["resid"]:
        hidden = write(hidden)
    return hidden


def _heads(block: Any) -> Heads:
    """Where a block has the parts of its attention."""
    attn = block.attn
    if not hasattr(attn, "attention"):
        return Heads((attn.c_attn,), attn.c_proj, attn.num_heads, attn.scaling, None)
    inner = attn.attention
    window = inner.config.window_size if inner.attention_type == "local" else None
    return Heads((inner.q_proj, inner.k_proj, inner.v_proj), inner.out_proj, inner.num_heads, 1.0, window)


def _at(write: Write, kept: Int[Tensor, " kept"], width: int) -> Write:
    """A write with its columns counted among the kept ones; the others are left out."""
    places = kept.new_full((width,), -1)
    places[kept] = torch.arange(len(kept))
    columns = places[write.columns]
    chosen = columns >= 0
    return Write(write.rows[chosen], columns[chosen], write.value[chosen], write.add)


def _attend(
    heads: Heads,
    normed: Float[Tensor, "batch pos d_model"],
    past: tuple[Tensor, Tensor] | None,
    kept: Int[Tensor, " kept"] | None,
) -> Float[Tensor, "batch kept d_model"]:
    """What the heads find, one after another."""
    projected = _projected(heads, normed, kept)
    queries, keys, values = (part.unflatten(-1, (heads.count, -1)).transpose(1, 2) for part in projected)
    if past is not None:
        keys, values = (torch.cat([old, new], dim=2) for old, new in zip(past, (keys, values), strict=True))
    at = torch.arange(normed.shape[1]) if kept is None else kept
    plain = kept is None and past is None and (heads.window is None or heads.window >= len(at))
    mask = None if plain else _mask(at + keys.shape[2] - normed.shape[1], keys.shape[2], heads.window)
    found = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=plain, scale=heads.scale
    )
    return found.transpose(1, 2).flatten(2)


def _projected(
    heads: Heads, normed: Float[Tensor, "batch pos d_model"], kept: Int[Tensor, " kept"] | None
) -> Sequence[Tensor]:
    """Queries at the kept positions, keys and values at all."""
    asking = normed if kept is None else normed[:, kept]
    if len(heads.inputs) == 3:
        return [project(normed if i else asking) for i, project in enumerate(heads.inputs)]
    (joint,) = heads.inputs
    if kept is None:
        return joint(normed).chunk(3, dim=-1)
    width = normed.shape[-1]
    weight, bias = _matrix(joint).split([width, 2 * width], dim=1), joint.bias.split([width, 2 * width])
    asked, rest = (
        torch.addmm(bias[i], some.flatten(0, 1), weight[i]).unflatten(0, some.shape[:2])
        for i, some in enumerate((asking, normed))
    )
    return [asked, *rest.chunk(2, dim=-1)]


def _mask(at: Int[Tensor, " query"], count: int, window: int | None) -> Float[Tensor, "1 1 query key"]:
    """0 where a query at a position sees a key, −∞ where not."""
    behind = at[:, None] - torch.arange(count)
    hidden = (behind < 0) if window is None else (behind < 0) | (behind >= window)
    return torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)[None, None]


def _added(
    hidden: Float[Tensor, "batch pos d_model"],
    module: Any,
    inputs: Float[Tensor, "batch pos d_in"],
    writes: Sequence[Write],
) -> Float[Tensor, "batch pos d_model"]:
    """The residual with a module's output added, in one product; where something is written, with that instead."""
    total = hidden + module.bias

    def forward(inputs: Tensor) -> Tensor:
        return total.flatten(0, 1).addmm_(inputs.flatten(0, 1), _matrix(module))

    # As the module's own forward, so that whoever watches modules sees it run.
    with replaced({module: forward}):
        module(inputs)
    for write in writes:
        before = hidden if not write.add else total
        total[write.rows, write.columns] = before[write.rows, write.columns] + write.value
    return total


def _activated(module: Any, inputs: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_mlp"]:
    """GELU of a linear map, over what the map wrote."""
    return torch.ops.aten.gelu_(module(inputs), approximate="tanh")


def _matrix(module: Any) -> Float[Tensor, "d_in d_out"]:
    """The weight, inputs first."""
    return module.weight if isinstance(module, Conv1D) else module.weight.T
