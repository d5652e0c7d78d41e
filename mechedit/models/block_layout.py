"""How the blocks of known architectures are put together, as far as `fast_block` needs it to compute them itself.

A layout is read from a block's modules; whether it is right is measured when a model is loaded (`engine_check`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mechedit.models.block_arguments import BlockArguments
from mechedit.models.fast_norm import Norm, fast_norm
from mechedit.models.fast_rotary import RotaryTables, tables_of_halves


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockLayout:
    """One block's modules, in the order of their use, and how they are joined."""

    attn_input: Norm | None
    """Norm before attention."""
    inputs: tuple[Any, ...]
    """Three projections to queries, keys and values, or one to all of them."""
    by_head: bool = False
    """Whether the one projection gives each head's query, key and value side by side (GPT-NeoX)."""
    n_heads: int
    n_kv_heads: int
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    norms_heads: bool = True
    """Whether queries and keys are normed head by head."""
    rotary: Callable[[BlockArguments, int], RotaryTables] | None = None
    """The run's rotary tables, from the block's arguments and its layer."""
    scale: float
    """Factor of the products of queries and keys."""
    softcap: float | None = None
    """Bound of the scores, which they approach as tanh does."""
    window: int | None = None
    """Width of a window that attention applies itself; windows in the block's mask are none of it."""
    attn_output: Any
    attn_after: Norm | None = None
    """Norm between attention and the residual stream."""
    mlp_input: Norm | None
    """Norm before the MLP."""
    is_parallel: bool = False
    """Whether the MLP reads the block's input and not what attention has made of it."""
    first: tuple[Any, ...]
    """The MLP's first matrix; with a gate, the gate's and the other one, or both in one."""
    is_gated: bool
    activation: Callable[[Tensor], Tensor]
    down: Any
    mlp_after: Norm | None = None
    """Norm between the MLP and the residual stream."""

    @property
    def matrices(self) -> tuple[Any, ...]:
        """The modules that are taken for matrices with at most a bias."""
        return (*self.inputs, self.attn_output, *self.first, self.down)


def block_layout(block: Any, config: Any) -> BlockLayout | None:
    """The layout of a block of a known class; None for all others."""
    read = _READERS.get(type(block).__name__)
    return None if read is None else read(block, config)


def matrix(module: Any) -> Tensor:
    """The weight of a Linear or Conv1D, inputs first."""
    return module.weight if isinstance(module, Conv1D) else module.weight.T


def is_matrix(module: Any) -> bool:
    """Whether a module is a matrix and perhaps a bias, and nothing else (no adapter, no quantized weights)."""
    return type(module) in (nn.Linear, Conv1D)


def _gpt2(block: Any, config: Any) -> BlockLayout | None:
    attn, mlp = block.attn, block.mlp
    if hasattr(block, "crossattention"):
        return None
    if hasattr(attn, "attention"):
        inner = attn.attention
        inputs, output, scale = (inner.q_proj, inner.k_proj, inner.v_proj), inner.out_proj, 1.0
        window = config.window_size if inner.attention_type == "local" else None
    else:
        inner, inputs, output, scale, window = attn, (attn.c_attn,), attn.c_proj, attn.scaling, None
    return BlockLayout(
        attn_input=block.ln_1,
        inputs=inputs,
        n_heads=inner.num_heads,
        n_kv_heads=inner.num_heads,
        scale=scale,
        window=window,
        attn_output=output,
        mlp_input=block.ln_2,
        first=(mlp.c_fc,),
        is_gated=False,
        activation=mlp.act,
        down=mlp.c_proj,
    )


def _gptj(block: Any, config: Any) -> BlockLayout | None:
    attn, mlp = block.attn, block.mlp

    def rotary(arguments: BlockArguments, layer: int) -> RotaryTables:
        at = arguments.by_layer[layer]["position_ids"]

        def tables() -> RotaryTables:
            sin, cos = attn.embed_positions.to(at.device)[at].to(attn.k_proj.weight.dtype)[:, :, None].chunk(2, -1)
            return RotaryTables(cos, sin, True)

        return arguments.once("rotary", tables)

    return BlockLayout(
        attn_input=block.ln_1,
        inputs=(attn.q_proj, attn.k_proj, attn.v_proj),
        n_heads=attn.num_attention_heads,
        n_kv_heads=attn.num_attention_heads,
        rotary=rotary,
        scale=1 / float(attn.scale_attn),
        attn_output=attn.out_proj,
        mlp_input=block.ln_1,
        is_parallel=True,
        first=(mlp.fc_in,),
        is_gated=False,
        activation=mlp.act,
        down=mlp.fc_out,
    )


def _neox(block: Any, config: Any) -> BlockLayout | None:
    attn, mlp = block.attention, block.mlp
    return BlockLayout(
        attn_input=block.input_layernorm,
        inputs=(attn.query_key_value,),
        by_head=True,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_attention_heads,
        rotary=_given_tables,
        scale=attn.scaling,
        attn_output=attn.dense,
        mlp_input=block.post_attention_layernorm,
        is_parallel=block.use_parallel_residual,
        first=(mlp.dense_h_to_4h,),
        is_gated=False,
        activation=mlp.act,
        down=mlp.dense_4h_to_h,
    )


def _llama(block: Any, config: Any) -> BlockLayout | None:
    """Llama and what followed it: separate or joined projections, with norms before or after modules, or both."""
    attn, mlp = block.self_attn, block.mlp
    joined, joined_first = getattr(attn, "qkv_proj", None), getattr(mlp, "gate_up_proj", None)
    after_both = hasattr(block, "post_feedforward_layernorm")
    mlp_input = getattr(block, "pre_feedforward_layernorm", None) if after_both else block.post_attention_layernorm
    q_norm = getattr(attn, "q_norm", None)
    if getattr(attn, "sinks", None) is not None:
        return None
    activation = getattr(mlp, "act_fn", None) or mlp.activation_fn
    return BlockLayout(
        attn_input=fast_norm(getattr(block, "input_layernorm", None)),
        inputs=(attn.q_proj, attn.k_proj, attn.v_proj) if joined is None else (joined,),
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_attention_heads // attn.num_key_value_groups,
        query_norm=fast_norm(q_norm),
        key_norm=fast_norm(getattr(attn, "k_norm", None)),
        norms_heads=q_norm is not None and q_norm.weight.numel() == attn.head_dim,
        rotary=_given_tables,
        scale=attn.scaling,
        softcap=getattr(attn, "attn_logit_softcapping", None),
        attn_output=attn.o_proj,
        attn_after=fast_norm(block.post_attention_layernorm) if after_both else None,
        mlp_input=fast_norm(mlp_input),
        first=(mlp.gate_proj, mlp.up_proj) if joined_first is None else (joined_first,),
        is_gated=True,
        activation=_Silu() if type(activation).__name__ in ("SiLUActivation", "SiLU") else activation,
        down=mlp.down_proj,
        mlp_after=fast_norm(block.post_feedforward_layernorm) if after_both else None,
    )


def _given_tables(arguments: BlockArguments, layer: int) -> RotaryTables:
    cos, sin = arguments.by_layer[layer]["position_embeddings"]
    return arguments.once(("rotary", id(cos)), lambda: tables_of_halves(cos, sin))


class _Silu:
    """x·σ(x), which overwrites its input where no gradient needs it."""

    def __call__(self, states: Tensor) -> Tensor:
        return functional.silu(states, inplace=not states.requires_grad)


_READERS: dict[str, Callable[[Any, Any], BlockLayout | None]] = {
    "GPT2Block": _gpt2,
    "GPTNeoBlock": _gpt2,
    "GPTJBlock": _gptj,
    "GPTNeoXLayer": _neox,
    **dict.fromkeys(
        (
            "LlamaDecoderLayer",
            "MistralDecoderLayer",
            "Qwen2DecoderLayer",
            "Qwen3DecoderLayer",
            "GemmaDecoderLayer",
            "Gemma2DecoderLayer",
            "Gemma3DecoderLayer",
            "Phi3DecoderLayer",
            "Olmo2DecoderLayer",
            "Olmo3DecoderLayer",
        ),
        _llama,
    ),
}
