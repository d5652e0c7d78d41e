"""The shapes that are timed: how each is made, where it is edited, and how much of it is timed.

A shape is the model that ships, a pretrained checkpoint where `analyses.real_models` has made it, or a model of that
size with random weights, scaled so that states and logits spread. Layers are five from a sixth of the depth, where
papers edit, and five from half of it. Amounts are such that all steps on a shape take
minutes on two cores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    Qwen2Config,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

import mechedit as me
from analyses.real_models.make import is_made, real_model_folder

RANGE = 5
"""Layers of a range; of fewer than twice as many blocks, half."""
LOGIT_SCALE = 3.0
"""Standard deviation of a random model's logits, in nats."""


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much of each step is timed, and how much of that the published schedule runs."""

    facts: int
    """Facts whose z and keys are computed."""
    updates: int
    """Updates of each δ."""
    texts: int
    """Texts over which the moments are: of more tokens than d_mlp."""
    trace_facts: int
    """Facts traced whole; three times as many where only the subject's last token is."""
    trace_tokens: int | None
    """Tokens of these facts' prompts and objects, as nearly as may be; None takes the first facts, however long."""
    drawn: int
    """Facts, drawn, whose z the published schedule searches for."""
    keys_drawn: int
    """Facts whose keys it computes."""
    layers_drawn: int
    """Layers of five whose moments and keys it computes."""
    trace_drawn: float
    """Part of the cells, drawn, that it runs."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One model that is timed."""

    about: str
    """What it is, for people."""
    config: Callable[[], Any] | None
    """Makes the config of the random model; None for the model that ships."""
    amounts: Amounts
    real: str | None = None
    """Name of the pretrained checkpoint that is taken where it is there."""
    cpu_layers: int | None = None
    """Blocks of the model on a CPU, where all of them take too long."""
    not_on_cpu: tuple[str, ...] = ()
    """Steps that a CPU is spared."""


def _gemma3() -> Any:
    kinds = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(18)]
    return Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512, layer_types=kinds, max_position_embeddings=32_768,
    )  # fmt: skip


def _llama() -> Any:
    return LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip


def _qwen2() -> Any:
    return Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
    )  # fmt: skip


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(
        about="the model that ships: 10 layers, d 128",
        config=None,
        amounts=Amounts(
            facts=64,
            updates=24,
            texts=2000,
            trace_facts=16,
            trace_tokens=None,
            drawn=12,
            keys_drawn=21,
            layers_drawn=5,
            trace_drawn=0.04,
        ),
    ),
    "gpt2": Shape(
        about="GPT-2's shape: 12 layers, d 768",
        config=GPT2Config,
        amounts=Amounts(
            facts=64,
            updates=10,
            texts=400,
            trace_facts=2,
            trace_tokens=12,
            drawn=6,
            keys_drawn=21,
            layers_drawn=2,
            trace_drawn=0.05,
        ),
    ),
    "llama": Shape(
        about="SmolLM2-135M's shape: 30 layers, d 576, grouped queries",
        config=_llama,
        real="smollm2",
        amounts=Amounts(
            facts=32,
            updates=5,
            texts=200,
            trace_facts=1,
            trace_tokens=12,
            drawn=4,
            keys_drawn=21,
            layers_drawn=1,
            trace_drawn=0.03,
        ),
    ),
    "gemma3": Shape(
        about="Gemma 3 270M's shape: 18 layers, d 640, 262,144 tokens, sandwich norms",
        config=_gemma3,
        real="gemma3",
        amounts=Amounts(
            facts=16,
            updates=5,
            texts=200,
            trace_facts=1,
            trace_tokens=12,
            drawn=2,
            keys_drawn=8,
            layers_drawn=1,
            trace_drawn=0.03,
        ),
    ),
    "qwen2": Shape(
        about="Qwen2-0.5B's shape: 24 layers, d 896, d_mlp 4,864, grouped queries",
        config=_qwen2,
        not_on_cpu=("weights",),
        amounts=Amounts(
            facts=12,
            updates=5,
            texts=120,
            trace_facts=1,
            trace_tokens=7,
            drawn=2,
            keys_drawn=6,
            layers_drawn=1,
            trace_drawn=0.03,
        ),
    ),
    "gptj": Shape(
        about="GPT-J's shape: d 4,096, parallel blocks",
        config=GPTJConfig,
        cpu_layers=4,
        # Moments and systems of 16,384 keys in float64 take minutes and most of the memory.
        not_on_cpu=("moments", "late moments", "solve", "weights"),
        amounts=Amounts(
            facts=8,
            updates=5,
            texts=500,
            trace_facts=1,
            trace_tokens=7,
            drawn=1,
            keys_drawn=4,
            layers_drawn=2,
            trace_drawn=0.08,
        ),
    ),
}
"""The shapes by name."""
SMALL = "small"
"""A shape for tests of the scripts: Llama's parts in miniature."""
SMALL_SHAPE = Shape(
    about="a miniature of Llama's shape: 4 layers, d 32",
    config=lambda: LlamaConfig(
        vocab_size=1500, hidden_size=32, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
    ),
    amounts=Amounts(
            facts=4, updates=2, texts=20, trace_facts=1, trace_tokens=10,
            drawn=2, keys_drawn=2, layers_drawn=2, trace_drawn=0.2,
        ),
)  # fmt: skip
ALL_SHAPES: Mapping[str, Shape] = {**SHAPES, SMALL: SMALL_SHAPE}


@dataclass(frozen=True, kw_only=True)
class TimedModel:
    """A loaded shape."""

    name: str
    shape: Shape
    model: me.Model
    weights: str
    """`shipped`, `pretrained` or `random`."""
    device: str
    dtype: str

    @property
    def about(self) -> str:
        """What was loaded, for people."""
        layers = self.shape.cpu_layers
        cut = f"; {layers} of its blocks" if layers and self.model.n_layers == layers else ""
        return f"{self.shape.about}{cut}; {self.weights} weights"

    @property
    def knows_almanac(self) -> bool:
        """Whether it is the model that ships, which alone knows the facts that ship."""
        return self.name == "tiny"

    @property
    def early(self) -> tuple[int, ...]:
        """Layers from a sixth of the depth on."""
        return self._range(self.model.n_layers // 6)

    @property
    def late(self) -> tuple[int, ...]:
        """Layers from half of the depth on."""
        return self._range(self.model.n_layers // 2)

    @property
    def target(self) -> int:
        """Where z is searched for: the last early layer."""
        return self.early[-1]

    def runs(self, step: str) -> bool:
        """Whether a step is timed on this model and device."""
        return not (self.device == "cpu" and step in self.shape.not_on_cpu)

    def _range(self, first: int) -> tuple[int, ...]:
        return tuple(range(first, first + min(RANGE, self.model.n_layers // 2)))


def load_shape(name: str, device: str = "cpu", dtype: str = "float32", *, random: bool = False) -> TimedModel:
    """Load or make the model of a shape; with `random`, random weights where a checkpoint is there, too."""
    shape = ALL_SHAPES[name]
    if shape.config is None:
        model, weights = me.load_model("tiny", device=device, dtype=dtype), "shipped"
    elif shape.real is not None and is_made(shape.real) and not random:
        model = me.load_model(real_model_folder(shape.real), device=device, dtype=dtype)
        model.name, weights = shape.real, "pretrained"
    else:
        model, weights = _random_model(shape, device, dtype), "random"
    model.hf.requires_grad_(False)
    return TimedModel(name=name, shape=shape, model=model, weights=weights, device=device, dtype=dtype)


def with_amounts(timed: TimedModel, **amounts: Any) -> TimedModel:
    """The same model with other amounts; None leaves one as it is."""
    changes = {name: value for name, value in amounts.items() if value is not None}
    return replace(timed, shape=replace(timed.shape, amounts=replace(timed.shape.amounts, **changes)))


@functools.lru_cache
def shipped() -> me.Model:
    """The model that ships, on a CPU: its tokenizer and texts are those of models with random weights."""
    return me.load_model("tiny", device="cpu")


def _random_model(shape: Shape, device: str, dtype: str) -> me.Model:
    assert shape.config is not None
    config = shape.config()
    if shape.cpu_layers is not None and device == "cpu":
        config.num_hidden_layers = shape.cpu_layers
    before = torch.get_default_dtype()
    # Drawing a billion weights twice would take longer than a step.
    with torch.device(device), no_init_weights():
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            hf = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
            hf.tie_weights()
        finally:
            torch.set_default_dtype(before)
    scatter_(hf)
    return me.load_model(hf, tokenizer=shipped().tokenizer)


@torch.no_grad()
def scatter_(hf: Any, seed: int = 0) -> None:
    """Draw weights that keep states of order one through any depth, and logits of a few nats.

    A block's two outputs into the residual stream are scaled down by the square root of their number.
    """
    generator = torch.Generator(next(hf.parameters()).device).manual_seed(seed)
    config, head = hf.config.get_text_config(), hf.get_output_embeddings()
    outputs = 2 * config.num_hidden_layers
    for name, module in hf.named_modules():
        for field, parameter in module.named_parameters(recurse=False):
            if module is head or isinstance(module, nn.Embedding):
                if field == "weight":
                    parameter.normal_(std=LOGIT_SCALE / math.sqrt(config.hidden_size), generator=generator)
                else:
                    parameter.zero_()
            elif parameter.ndim == 2:
                fan_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[1]
                into_stream = name.endswith(INTO_STREAM)
                parameter.normal_(std=1 / math.sqrt(fan_in * (outputs if into_stream else 1)), generator=generator)
            else:
                is_gain = field == "weight" and not getattr(config, "model_type", "").startswith("gemma")
                parameter.normal_(mean=float(is_gain), std=0.1, generator=generator)


INTO_STREAM = ("down_proj", "o_proj", "out_proj", "fc_out", "c_proj", "dense", "dense_4h_to_h")
"""Names of the matrices whose product is added to the residual stream."""
