"""Small random models of every causal-language-model type that transformers can build, made from their configs."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 384
WIDTH = 32
N_LAYERS = 3

LEAVE: Any = object()
"""Stands for a field that is left to the type's default."""
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers"), N_LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_encoder_layers"), N_LAYERS),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "emb_dim", "word_embed_proj_dim"), WIDTH
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_query_groups"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dim_ff", "dff"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_size", "block_ff_dim", "mlp_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"), 64),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim", "kv_channels"), 8),
    **dict.fromkeys(("global_head_dim",), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    "hidden_size_per_layer_input": 8,
    "sliding_window": 8,
    "image_size": 28,
    "patch_size": 14,
}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


_DECODER = {"is_decoder": True}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
_LOGITS = {"logit_scale": 1.0}
_HEADS = {"head_dim": 8}
_ROTARY = {"rotary_dim": 4}
_MULTIPLIERS = {"residual_multiplier": 0.4, "embedding_multiplier": 2.0}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1}
FIXES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "git"), _DECODER),
    **dict.fromkeys(("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roformer"), _DECODER),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), _DECODER),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), _LINEAR),
    **dict.fromkeys(("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared"), _MULTIPLIERS),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), _LOGITS),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), _HEADS),
    **dict.fromkeys(("codegen", "gptj"), _ROTARY),
    **dict.fromkeys(("deepseek_v2", "dots1"), _EXPERTS),
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"as_it_is": True, "kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "as_it_is": True, "hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2,
        },
    },
    "deepseek_v3": {"first_k_dense_replace": 1},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2},
    "gpt_neo": {"attention_types": [[["local"], 2], [["global"], 1]], "window_size": 8},
    "granitemoehybrid": {
        **_MAMBA, **_MULTIPLIERS, "num_local_experts": 0, "shared_intermediate_size": 96,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "prophetnet": {"num_hidden_layers": LEAVE},
    "recurrent_gemma": {"lru_width": WIDTH, "attention_window_size": 8, "num_key_value_heads": 1},
    "reformer": {
        "is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "attention_head_size": 8,
        "feed_forward_size": 96, "attn_layers": ["local"] * N_LAYERS, "local_attn_chunk_length": 8,
        "num_hidden_layers": LEAVE,
    },
    "xlnet": {"max_position_embeddings": LEAVE, "d_inner": 96, "d_head": LEAVE, "attn_type": "uni"},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4,
        "attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4, "mamba_d_state": 8,
        "num_key_value_heads": 4, "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4,
        "num_key_value_heads": 4, "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 8,
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
"""What a type needs beside small sizes."""


def small_config(model_type: str, **changes: Any) -> Any:
    """The config of a small model of a type: the type's defaults with small sizes."""
    return _shrunk(AutoConfig.for_model(model_type), {**FIXES.get(model_type, {}), **changes})


def _shrunk(default: Any, changes: dict[str, Any]) -> Any:
    cls = type(default)
    parameters = inspect.signature(cls.__init__).parameters
    fields: dict[str, Any] = {}
    for name, value in {**_SIZES, **_SPECIAL}.items():
        field = cls.attribute_map.get(name, name)
        is_fixed = isinstance(getattr(cls, field, None), property)
        if not is_fixed and (field in parameters or _has(default, field)) and _holds_value(default, field):
            fields[field] = value
    if _has(default, "num_key_value_heads") and _has(default, "num_attention_heads"):
        # Latent attention has as many keys as queries; elsewhere they are shared.
        heads = [_value(default, name) for name in ("num_key_value_heads", "num_attention_heads")]
        fields[cls.attribute_map.get("num_key_value_heads", "num_key_value_heads")] = 4 if heads[0] == heads[1] else 2
        if isinstance(getattr(cls, "num_key_value_heads", None), property):
            del fields["num_key_value_heads"]
    for name in cls.sub_configs:
        sub_config = getattr(default, name, None)
        if isinstance(changes.get(name), dict) and changes[name].get("as_it_is"):
            fields[name] = {key: value for key, value in changes[name].items() if key != "as_it_is"}
        elif sub_config is not None:
            fields[name] = _shrunk(
                sub_config, {**FIXES.get(sub_config.model_type, {}), **changes.get(name, {})}
            ).to_dict()
    fields |= {name: value for name, value in changes.items() if name not in cls.sub_configs}
    return cls(**{name: value for name, value in fields.items() if value is not LEAVE})


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except (AttributeError, RuntimeError, ValueError):
        # One value per layer.
        return "several"


def _has(config: Any, name: str) -> bool:
    return _value(config, name) is not None


def _holds_value(config: Any, name: str) -> bool:
    return _has(config, name) or name in _SPECIAL


def small_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of a type, scaled so that every part of it matters to the logits."""
    config = small_config(model_type, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(config).float().eval()
        scatter_(hf)
    return hf


@torch.no_grad()
def scatter_(hf: nn.Module) -> None:
    """Draw weights so that states are of order 1 and every part of the model counts."""
    for module in hf.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                parameter.normal_()
            elif (name in ("weight",) and parameter.ndim == 2) or parameter.ndim == 3:
                fan_in = min(parameter.shape[-2:]) if parameter.ndim == 3 else parameter.shape[-1]
                parameter.normal_(std=1.2 / math.sqrt(fan_in))
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
