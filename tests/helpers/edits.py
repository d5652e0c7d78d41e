"""Random edits, and weights compared bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechedit.batching import pad
from mechedit.edit import Edit, Factors

LAYERS = (0, 2)


def random_edit(model: Any, seed: int = 0, layers: tuple[int, ...] = LAYERS, ranks: tuple[int, ...] = (2, 2)) -> Edit:
    """A random edit for the model as it is now."""
    draw = torch.Generator().manual_seed(seed)
    factors = {
        layer: Factors(
            left=torch.randn(model.d_mlp, rank, generator=draw, dtype=torch.float64),
            right=torch.randn(rank, model.d_model, generator=draw, dtype=torch.float64),
        )
        for layer, rank in zip(layers, ranks, strict=True)
    }
    return Edit(factors=factors, manifest={"method": "test", "model": model.provenance()})


def logits(model: Any) -> Tensor:
    """Logits of one prompt, [1, pos, vocab]."""
    tokens = pad([model.tokenizer("The mother tongue of Leon Blum is")["input_ids"]], model.tokenizer)
    with torch.no_grad():
        return model.run(tokens).logits


def weights(model: Any) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: value.detach().clone() for name, value in model.hf.named_parameters()}


def identical(model: Any, before: dict[str, Tensor]) -> bool:
    """Whether all weights are bit for bit those of `before` (0 and −0 differ)."""
    now = dict(model.hf.named_parameters())
    return now.keys() == before.keys() and all(
        now[name].dtype == before[name].dtype
        and torch.equal(now[name].detach().view(torch.uint8), before[name].view(torch.uint8))
        for name in before
    )
