"""Module paths of each architecture. To support another one, add an entry to `FAMILIES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mechedit.errors import InputError
from mechedit.models.sites import Module

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Paths to the parts of one architecture.

    The orientation of a matrix is not among them: it follows from its module's type, Linear or Conv1D.
    """

    name: str
    """Usual name."""
    model_type: str
    """`config.model_type`."""
    architecture: str
    """The transformers class with the language-model head."""
    blocks: str
    """The list of blocks, from the model."""
    embedding: str
    """The token embedding, from the model."""
    attn: str
    """The attention module, from a block; its output is a tuple whose first item counts."""
    mlp: str
    """The MLP, from a block."""
    down: str
    """The MLP's second matrix (down-projection), from a block; its input is the key."""
    attn_proj: str
    """Attention's output projection, from a block; its input is the heads' results, side by side."""
    attn_norm: str | None = None
    """A norm between the attention module and the residual stream, from a block."""
    mlp_norm: str | None = None
    """A norm between the MLP and the residual stream, from a block."""
    tuple_block: bool = False
    """Whether a block returns (residual, attention weights) instead of the residual."""

    def projection(self, module: Module) -> str:
        """The matrix through which a module adds to the residual stream, from a block."""
        return {"mlp": self.down, "attn": self.attn_proj}[module]

    def norm_after(self, module: Module) -> str | None:
        """A norm between a module of a block and the residual stream, from a block."""
        return {"mlp": self.mlp_norm, "attn": self.attn_norm}[module]

    @property
    def attn_out(self) -> str:
        """The module whose output attention adds to the residual stream, from a block."""
        return self.attn_norm or self.attn

    @property
    def mlp_out(self) -> str:
        """The module whose output the MLP adds to the residual stream, from a block."""
        return self.mlp_norm or self.mlp

    def modules_of(self, part: str) -> set[str]:
        """A block's children that must run with the backend's hooks for a step at a part."""
        modules = {
            "attn_key": (self.attn,),
            "attn_out": (self.attn, self.attn_norm),
            "mlp_out": (self.mlp, self.mlp_norm),
            "mlp_key": (self.mlp,),
        }
        return {name for name in modules.get(part, ()) if name is not None}


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
        tuple_block=True,
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
        tuple_block=True,
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
    """Find the family of a loaded transformers model.

    Raises:
        InputError: an architecture that is not listed, without a language-model head, a mixture of
            experts, a model that reads more than text, or quantized weights.
    """
    config = getattr(hf, "config", None)
    if config is None:
        raise InputError(
            f"the model is a {type(hf).__name__}, expected a transformers causal language model: pass "
            f'"tiny", a hub name, a folder, or a loaded model; {_supported()}'
        )
    family = family_of_config(config)
    if type(hf).__name__ != family.architecture:
        raise InputError(
            f"the model is a {type(hf).__name__}, expected a {family.architecture}: load it with "
            f"AutoModelForCausalLM, without wrappers (merge adapters first)"
        )
    return family


def family_of_config(config: Any) -> Family:
    """Find the family by a transformers config alone, before any weights are loaded.

    Raises:
        InputError: as `family_of`.
    """
    model_type = getattr(config, "model_type", None) or type(config).__name__
    experts = max((getattr(config, field, None) or 0 for field in _EXPERT_COUNTS), default=0)
    if experts > 1:
        raise InputError(
            f"the model ({model_type}) is a mixture of {experts} experts, so no single matrix is the MLP's "
            f"down-projection; expected a dense model: choose one; {_supported()}"
        )
    if getattr(config, "text_config", None) is not None:
        raise InputError(
            f"the model ({model_type}) reads more than text, expected a language model alone: load it, put its "
            f"language model and lm_head into the ForCausalLM class of config.text_config, and pass that; "
            f"{_supported()}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"the model ({model_type}) is quantized, so its matrices cannot be edited in place; expected weights "
            f"in float32, bfloat16 or float16: load the unquantized checkpoint"
        )
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    raise InputError(
        f"the architecture {model_type!r} is not known to mechedit; choose a supported model: {_supported()}"
    )


def attention_window(config: Any, layer: int) -> int | None:
    """Width of a block's attention window, the token itself included, by the config; None means all positions."""
    if config.model_type == "gpt_neo":
        return config.window_size if config.attention_layers[layer] == "local" else None
    kinds = getattr(config, "layer_types", None)
    if kinds is None or kinds[layer] == "sliding_attention":
        # Mistral and Phi-3 name no kinds: all of their layers slide when there is a window.
        return getattr(config, "sliding_window", None)
    return None


def _supported() -> str:
    return "supported are " + ", ".join(family.name for family in FAMILIES)
