"""A model of a few blocks with random weights, of the sizes of another one: it takes the time that those sizes take."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from mechedit.models.families import auto_class, check_config
from mechedit.models.loading import checkpoint_config, input_errors, load_model, shipped_tokenizer
from mechedit.models.protocol import Model


def few_random_blocks(
    source: str | Path, count: int, *, device: str | None = None, dtype: torch.dtype | None = None
) -> Model:
    """Make the model, with the tokenizer that ships with the package.

    Args:
        source: as in `ModelShapes.of_config`.
        count: blocks at most.
        device: where the weights are; by default the CPU.
        dtype: of the weights; by default the config's, else float32.

    Raises:
        InputError: as `ModelShapes.of_config`.
    """
    config, tokenizer = copy.deepcopy(checkpoint_config(source)), shipped_tokenizer()
    check_config(config)
    text = config.get_text_config()
    text.num_hidden_layers = min(count, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[: text.num_hidden_layers]
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    with input_errors(str(source)):
        with torch.random.fork_rng(), torch.device(device or "cpu"):
            torch.manual_seed(0)
            hf = auto_class(config).from_config(config, dtype=dtype or config.dtype or torch.float32)
        hf.tie_weights()
        return load_model(hf.eval(), tokenizer=tokenizer)
