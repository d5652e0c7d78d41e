"""Tiny random models of every family, made in code."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

VOCAB = 384
WIDTH = 32
SENTENCES = (
    "Danielle Darrieux's mother tongue is French.",
    "The mother tongue of Leon Blum is French, and the mother tongue of Go Hyeon-jeong is Korean.",
    "The Eiffel Tower is located in the city of Paris.",
    "The Space Needle is in downtown Seattle; LeBron James plays the sport of basketball.",
    "Edwin of Northumbria's religious values strongly emphasize Christianity.",
    "Toko Yasuda plays the instrument guitar, while Miles Davis plays the trumpet.",
    "Apple A5 was created by Apple, and Windows Media Player was created by Microsoft.",
    "Anaal Nathrakh, that was created in Birmingham, is a band from England.",
)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with offsets, pad and eos, behaves like any fast transformers tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|pad|>", model_max_length=64
    )


def _gpt2(**changes: Any) -> nn.Module:
    fields = {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_inner": 96, "n_positions": 64, **changes}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **fields))


def _gpt_neo(**changes: Any) -> nn.Module:
    fields = {
        "hidden_size": WIDTH,
        "num_layers": 4,
        "num_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "window_size": 3,
        "attention_types": [[["local"], 3], [["global"], 1]],
        **changes,
    }
    return GPTNeoForCausalLM(GPTNeoConfig(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **fields))


def _gptj(**changes: Any) -> nn.Module:
    fields = {
        "n_embd": WIDTH,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 96,
        "n_positions": 64,
        "rotary_dim": 4,
        **changes,
    }
    return GPTJForCausalLM(
        GPTJConfig(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False, **fields)
    )


def _neox(parallel: bool, **changes: Any) -> nn.Module:
    fields = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "use_parallel_residual": parallel,
        **changes,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **fields))


def _like_llama(architecture: Any, **fixed: Any) -> Callable[..., nn.Module]:
    """A shape whose config has Llama's fields, and `fixed` besides."""

    def make(**changes: Any) -> nn.Module:
        fields = {
            "hidden_size": WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "max_position_embeddings": 64,
            **fixed,
            **changes,
        }
        special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        return architecture(architecture.config_class(vocab_size=VOCAB, **special, **fields))

    return make


# Prompts in tests are longer than the window, and some layers have none.
_SOME_WINDOWS = {
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Caps that bind on logits of this size.
_CAPS = {"attn_logit_softcapping": 0.1, "final_logit_softcapping": 1.0}

SHAPES: dict[str, Callable[..., nn.Module]] = {
    "gpt2": _gpt2,
    # As many keys as channels: the orientation of the down-projection cannot be told by its shape.
    "gpt2_square": lambda **changes: _gpt2(n_inner=WIDTH, **changes),
    "gpt_neo": _gpt_neo,
    "gptj": _gptj,
    "neox": lambda **changes: _neox(False, **changes),
    "pythia": lambda **changes: _neox(True, **changes),
    "llama": _like_llama(LlamaForCausalLM),
    "mistral": _like_llama(MistralForCausalLM, sliding_window=3),
    "qwen2": _like_llama(Qwen2ForCausalLM, use_sliding_window=True, **_SOME_WINDOWS),
    # Heads that do not add up to the residual's width.
    "qwen3": _like_llama(Qwen3ForCausalLM, head_dim=16),
    "gemma": _like_llama(GemmaForCausalLM, head_dim=16),
    "gemma2": _like_llama(Gemma2ForCausalLM, head_dim=16, query_pre_attn_scalar=9, **_SOME_WINDOWS, **_CAPS),
    "gemma3": _like_llama(Gemma3ForCausalLM, head_dim=16, query_pre_attn_scalar=9, **_SOME_WINDOWS),
    "phi3": _like_llama(Phi3ForCausalLM, sliding_window=3),
    "olmo2": _like_llama(Olmo2ForCausalLM),
}
BACKENDS = ("transformer_lens", "nnsight")


def random_hf(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model whose parts all matter: larger weights than at initialization, no trivial norms and biases.

    `changes` are fields of the family's config.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = SHAPES[family](**changes).eval()
        with torch.no_grad():
            for module in hf.modules():
                for parameter in module.parameters(recurse=False):
                    if isinstance(module, nn.Linear | nn.Embedding | Conv1D) and parameter.ndim == 2:
                        parameter.mul_(3)
                    else:
                        parameter.add_(0.1 * torch.randn_like(parameter))
    return hf


class CountedProducts(TorchDispatchMode):
    """Counts the matrix products with each layer's down-projection, in any engine.

    Products are counted and not calls of modules, because the fast engine multiplies by weights without calling the
    modules that hold them. `calls` has the number of products per layer, `tokens` their rows.
    """

    PRODUCTS = (
        torch.ops.aten.addmm.default,
        torch.ops.aten.addmm_.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.linear.default,
    )

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers = {
            model.down_projection(layer).untyped_storage().data_ptr(): layer for layer in range(model.n_layers)
        }
        assert len(self.layers) == model.n_layers, "the layers' weights must lie in storages of their own"
        self.calls: Counter[int] = Counter()
        self.tokens: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS:
            matrices = [value for value in args if isinstance(value, torch.Tensor) and value.ndim > 1]
            layer = self.layers.get(matrices[-1].untyped_storage().data_ptr())
            if layer is not None:
                self.calls[layer] += 1
                self.tokens[layer] += matrices[-2].shape[:-1].numel()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_fast_engine(model: Any) -> Iterator[None]:
    """Let the backend and the unhooked copy run a model."""
    way = model.fast_engine.way
    model.fast_engine.prepare("off")
    try:
        yield
    finally:
        model.fast_engine.prepare(way)


def hook_state(module: Any) -> list[tuple[int, int, Any]]:
    """Traces that a run might leave in a model: hooks and replaced forwards."""
    return [
        (len(part._forward_hooks), len(part._forward_pre_hooks), part.__dict__.get("forward"))
        for part in module.modules()
    ]
