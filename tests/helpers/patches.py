"""Random tokens and patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from helpers.models import VOCAB
from mechedit.models import Patch, Site, Tokens


def random_tokens(batch: int = 2, width: int = 7, seed: int = 0) -> Tokens:
    ids = torch.randint(VOCAB, (batch, width), generator=torch.Generator().manual_seed(seed))
    return Tokens(ids, torch.ones_like(ids))


def column(positions: Sequence[int]) -> torch.Tensor:
    """One position per row, as `Patch.positions`: [batch, 1]."""
    return torch.tensor(list(positions), dtype=torch.long)[:, None]


def random_patch(model: Any, site: Site, positions: Sequence[Sequence[int]], seed: int = 0) -> Patch:
    where = torch.tensor(positions)
    width = model.d_mlp if site.part == "mlp_key" else model.d_model
    generator = torch.Generator().manual_seed(seed)
    return Patch(site, where, torch.randn(*where.shape, width, generator=generator))
