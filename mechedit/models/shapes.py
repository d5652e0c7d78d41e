"""The sizes of a model's parts, from the model or from its config alone: what costs follow from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from mechedit.errors import InputError
from mechedit.models.backend import BackendModel
from mechedit.models.engines import max_positions
from mechedit.models.families import attention_window, auto_class, check_config, family_of, keeps_scores
from mechedit.models.family import Family
from mechedit.models.loading import checkpoint_config, input_errors
from mechedit.models.protocol import Model


@dataclass(frozen=True, kw_only=True)
class BlockShapes:
    """Sizes of one block."""

    matrices: int
    """Parameters of all its matrices."""
    keys_values: int
    """Parameters of those among them that make attention's keys and values."""
    down: int
    """Parameters of the MLP's down-projection."""
    heads_width: int
    """Query heads times d_head."""
    kv_width: int
    """Key heads times d_head."""
    window: int | None
    """Positions that a token attends to at most; None for all."""
    norms: int
    """Norms on the way of the residual stream."""
    is_gated: bool
    """Whether the MLP multiplies two products (three matrices) or has one (two matrices)."""


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """Sizes of a model, which need no weights."""

    name: str
    n_heads: int
    d_model: int
    d_mlp: int
    vocab_size: int
    max_positions: int
    parameters: int
    """Parameters in all, shared ones once."""
    head: int
    """Parameters of the output embedding."""
    dtype: torch.dtype
    keeps_scores: bool
    """Whether attention's scores are all in memory at once."""
    blocks: tuple[BlockShapes, ...]
    mesh: ClassVar[None] = None
    """As of a model whose weights are whole in each process."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def d_key(self) -> int:
        """Width of the keys of the edited matrix, the MLP's down-projection."""
        return self.d_mlp

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return self.parameters * self.dtype.itemsize

    @staticmethod
    def of(model: Model) -> ModelShapes:
        """The sizes of a loaded model.

        Raises:
            InputError: a block without one matrix that leads out of its MLP or attention.
        """
        assert isinstance(model, BackendModel)
        return _shapes(model.hf, model.family, model.name)

    @staticmethod
    def of_config(source: str | Path, dtype: torch.dtype | None = None) -> ModelShapes:
        """The sizes of a model whose config alone is read: nothing is allocated, and no weights need be there.

        Args:
            source: `tiny`, a hub name, a folder with config.json, or a config's own file.
            dtype: of the weights; by default the config's, else float32.

        Raises:
            InputError: no config, one of an architecture that is not supported, or as `of`.
        """
        config = checkpoint_config(source)
        check_config(config)
        with input_errors(str(source)), torch.device("meta"):
            hf = auto_class(config).from_config(config, dtype=dtype or config.dtype or torch.float32)
            hf.tie_weights()
        try:
            family = family_of(hf)
        except InputError:
            raise
        except Exception as error:  # where parts are, other families are asked by running them
            raise InputError(
                f"the parts of {str(source)!r} ({config.model_type}) are only seen by running it, expected a family "
                f"that is known beforehand (such as Llama, Mistral, Qwen, Gemma, GPT-2, GPT-J); plan with one of those"
            ) from error
        with input_errors(str(source)):
            return _shapes(hf, family, str(source))


def _shapes(hf: Any, family: Family, name: str) -> ModelShapes:
    config = hf.config.get_text_config()
    count = len(hf.get_submodule(family.blocks))
    blocks = tuple(_block(hf, family, layer, name) for layer in range(count))
    head = hf.get_output_embeddings().weight
    return ModelShapes(
        name=name,
        n_heads=getattr(config, "num_attention_heads", 1),
        d_model=config.hidden_size,
        d_mlp=blocks[0].down // config.hidden_size,
        vocab_size=hf.get_input_embeddings().weight.shape[0],
        max_positions=max_positions(hf.config),
        parameters=sum(parameter.numel() for parameter in hf.parameters()),
        head=head.numel(),
        dtype=head.dtype,
        keeps_scores=keeps_scores(hf.config),
        blocks=blocks,
    )


def _block(hf: Any, family: Family, layer: int, name: str) -> BlockShapes:
    """The sizes of one block.

    Raises:
        InputError: it has not one matrix that leads out of its MLP and one out of its attention.
    """
    config, parts = hf.config.get_text_config(), family.parts(layer)
    if parts.down is None or parts.attn_proj is None:
        raise InputError(
            f"block {layer} of {name!r} is built otherwise than of attention and one MLP (a mixture of experts, or a "
            f"hybrid), expected both in each block; costs of such a model are not known beforehand"
        )
    block = hf.get_submodule(f"{family.blocks}.{layer}")
    matrices = sum(parameter.numel() for parameter in block.parameters() if parameter.ndim == 2)
    down, out = (block.get_submodule(path).weight.numel() for path in (parts.down, parts.attn_proj))
    heads_width = out // config.hidden_size
    n_heads = getattr(config, "num_attention_heads", 1)
    kv_width = heads_width * (getattr(config, "num_key_value_heads", None) or n_heads) // n_heads
    keys_values = 2 * config.hidden_size * kv_width
    return BlockShapes(
        matrices=matrices,
        keys_values=keys_values,
        down=down,
        heads_width=heads_width,
        kv_width=kv_width,
        window=attention_window(hf.config, layer),
        norms=2 + sum(path is not None for path in (parts.attn_norm, parts.mlp_norm)),
        is_gated=matrices - 2 * out - keys_values > 2.5 * down,
    )
