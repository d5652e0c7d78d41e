"""Where each architecture keeps its parts: our own table, and for all others what `discovery` measures.

An entry in `FAMILIES` overrides the measurement; it is needed only where that fails.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from mechedit.errors import InputError, brief
from mechedit.models.discovery import find_family
from mechedit.models.family import Family
from mechedit.models.layer_ranges import MOST_LAYERS
from mechedit.models.unsupported import UnsupportedModelError


def _like_llama(name: str, model_type: str, architecture: str, *, post_norms: bool = False) -> Family:
    """A family with Llama's module names; with `post_norms`, modules' outputs are normed before they are added."""
    return Family(
        name=name,
        model_type=model_type,
        architecture=architecture,
        blocks="model.layers",
        # Gemma's embedding scales its rows itself, so its output is the first block's input.
        embedding="model.embed_tokens",
        attn="self_attn",
        mlp="mlp",
        down="mlp.down_proj",
        attn_proj="self_attn.o_proj",
        attn_norm="post_attention_layernorm" if post_norms else None,
        mlp_norm="post_feedforward_layernorm" if post_norms else None,
    )


FAMILIES = (
    Family(
        name="GPT-2",
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        blocks="transformer.h",
        embedding="transformer.wte",
        attn="attn",
        mlp="mlp",
        down="mlp.c_proj",
        attn_proj="attn.c_proj",
    ),
    Family(
        name="GPT-Neo",
        model_type="gpt_neo",
        architecture="GPTNeoForCausalLM",
        blocks="transformer.h",
        embedding="transformer.wte",
        attn="attn",
        mlp="mlp",
        down="mlp.c_proj",
        attn_proj="attn.attention.out_proj",
        tuple_items=2,
    ),
    Family(
        name="GPT-J",
        model_type="gptj",
        architecture="GPTJForCausalLM",
        blocks="transformer.h",
        embedding="transformer.wte",
        attn="attn",
        mlp="mlp",
        down="mlp.fc_out",
        attn_proj="attn.out_proj",
        tuple_items=2,
    ),
    Family(
        name="GPT-NeoX and Pythia",
        model_type="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        attn="attention",
        mlp="mlp",
        down="mlp.dense_4h_to_h",
        attn_proj="attention.dense",
    ),
    _like_llama("Llama", "llama", "LlamaForCausalLM"),
    _like_llama("Mistral", "mistral", "MistralForCausalLM"),
    _like_llama("Qwen2", "qwen2", "Qwen2ForCausalLM"),
    _like_llama("Qwen3", "qwen3", "Qwen3ForCausalLM"),
    _like_llama("Gemma", "gemma", "GemmaForCausalLM"),
    _like_llama("Gemma 2", "gemma2", "Gemma2ForCausalLM", post_norms=True),
    _like_llama("Gemma 3 (text)", "gemma3_text", "Gemma3ForCausalLM", post_norms=True),
    _like_llama("Phi-3", "phi3", "Phi3ForCausalLM"),
    _like_llama("OLMo 2", "olmo2", "Olmo2ForCausalLM", post_norms=True),
)


def family_of(hf: Any) -> Family:
    """Find where a loaded transformers model keeps its parts: by our table, else by measuring (`discovery`).

    Raises:
        InputError: no transformers model, or another class of it than the one with the language-model head.
        UnsupportedModelError: quantized weights, or blocks that do not add attention's and an MLP's output to one
            residual stream.
    """
    check_loadable(hf)
    for family in FAMILIES:
        if (family.model_type, family.architecture) == (hf.config.model_type, type(hf).__name__):
            return family
    return find_family(hf)


def is_in_table(config: Any) -> bool:
    """Whether our table has the parts of a model, by its config."""
    return any(family.model_type == config.model_type for family in FAMILIES)


def check_loadable(hf: Any) -> None:
    """Refuse a loaded model that cannot be used, as far as this is known without running it.

    Raises:
        InputError: as `family_of`.
    """
    config = getattr(hf, "config", None)
    if config is None:
        raise InputError(
            f"the model is a {type(hf).__name__}, expected a transformers causal language model: pass "
            f'"tiny", a hub name, a folder, or a loaded model'
        )
    _check_not_quantized(config)
    expected = _architectures(config)
    if hf.get_output_embeddings() is None or (expected and type(hf).__name__ not in expected):
        raise InputError(
            f"the model is a {type(hf).__name__}, expected a {' or '.join(expected) or 'language model'}: load it with "
            f"AutoModelForCausalLM, without wrappers (merge adapters first)"
        )


def check_config(config: Any) -> None:
    """Refuse a model by its transformers config alone, before any weights are loaded.

    Raises:
        UnsupportedModelError: quantized weights, or no causal language model.
        InputError: more layers than any model has, each of which would take memory before the weights are looked at.
    """
    _check_not_quantized(config)
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        count = getattr(part, "num_hidden_layers", 0)
        if isinstance(count, int) and count > MOST_LAYERS:
            raise InputError(
                f"the config ({config.model_type}) has {brief(count)} layers, expected at most {MOST_LAYERS:,}; it is "
                f"damaged: download it again"
            )
    model_type = config.model_type
    if not _architectures(config):
        raise UnsupportedModelError(
            "encoder and decoder" if getattr(config, "is_encoder_decoder", False) else "no causal language model",
            f"the architecture {model_type!r} has no causal language model in transformers; expected one that "
            f"AutoModelForCausalLM or AutoModelForImageTextToText loads: choose another model",
        )


def _check_not_quantized(config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "quantized",
            f"the model ({config.model_type}) is quantized, so its matrices cannot be edited in place; expected "
            f"weights in float32, bfloat16 or float16: load the unquantized checkpoint",
        )


def auto_class(config: Any) -> Any:
    """The transformers class that loads a checkpoint whole: with its other inputs, if it has more than text."""
    multimodal = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    of_checkpoint = getattr(config, "architectures", None) or []
    if multimodal in of_checkpoint or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def loader_of(hf: Any) -> Any:
    """The class that loads what `hf.save_pretrained` wrote: transformers' automatic one where it gives hf's class."""
    auto = auto_class(hf.config)
    return auto if auto._model_mapping.get(type(hf.config), None) is type(hf) else type(hf)


def _architectures(config: Any) -> list[str]:
    """The classes with a language-model head that transformers has for a config."""
    model_type = getattr(config, "model_type", None)
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    names = [mapping[model_type] for mapping in mappings if model_type in mapping]
    return list(dict.fromkeys(name for entry in names for name in ([entry] if isinstance(entry, str) else entry)))


def attention_window(config: Any, layer: int) -> int | None:
    """Width of a block's attention window, the token itself included, by the config; None means all positions."""
    config = config.get_text_config()
    if config.model_type == "gpt_neo":
        return config.window_size if config.attention_layers[layer] == "local" else None
    kinds = getattr(config, "layer_types", None)
    if kinds is None or kinds[layer] == "sliding_attention":
        # Mistral and Phi-3 name no kinds: all of their layers slide when there is a window.
        return getattr(config, "sliding_window", None)
    return None


def keeps_scores(config: Any) -> bool:
    """Whether attention's scores are all in memory at once, by the config: where no fused kernel computes them."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return capped or getattr(config, "_attn_implementation", None) == "eager"
