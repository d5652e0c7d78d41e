"""Is the text enough? How a moment, and an update made with it, still changes as tokens are added."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.batching import pad
from mechedit.errors import InputError, check_at_least, check_positive
from mechedit.models import Model
from mechedit.moments.accumulator import MomentAccumulator
from mechedit.moments.shards import Shard
from mechedit.solve import ridge_update

COLUMNS = ["tokens", "layer", "matrix_change", "update_change"]
PREFIX = 64
"""Most tokens before a key that is drawn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Convergence:
    """What the curve measures: the change from one moment to that over at least twice as many tokens.

    `matrix_change` is ‖M₂ − M₁‖ / ‖M₂‖ (Frobenius), `update_change` the same of (λM + K Kᵀ)⁻¹ K, which any
    residuals R turn into the update of MEMIT Eq. 14. With independent documents and M₂ over exactly twice as many, M₂ −
    M₁ has the variance of M₂ itself, so the last rows estimate how far the moment is from that of endless text.
    """

    weight: float | int = 15_000
    """λ."""
    keys: Mapping[int, Tensor] | None = None
    """K of each layer, [d_mlp, key]; None draws keys of the text."""
    drawn: int = 32
    """How many keys are drawn: each a random token of another of the first texts, at most 64 tokens in."""
    seed: int = 0
    """Of that draw."""

    def __post_init__(self) -> None:
        check_positive("the weight of the convergence curve", self.weight)
        check_at_least("drawn", self.drawn, 1)

    def plain(self) -> dict[str, Any]:
        """The settings as JSON holds them; keys stand by their hash."""
        if self.keys is None:
            return {"weight": self.weight, "drawn": self.drawn, "seed": self.seed}
        digest = hashlib.sha256()
        for layer, keys in sorted(self.keys.items()):
            digest.update(f"{layer} {list(keys.shape)}\n".encode())
            digest.update(keys.detach().double().cpu().numpy().tobytes())
        return {"weight": self.weight, "keys": digest.hexdigest()}

    def chosen(
        self, model: Model, shard: Shard, together: list[int], layers: list[int]
    ) -> dict[int, Float[Tensor, "d_mlp key"]]:
        """K of some layers: given, or drawn from the first shard of the text, where `together` are read at once."""
        if self.keys is None:
            return draw_keys(model, shard, together, self.drawn, self.seed)
        for layer in layers:
            shape = tuple(self.keys[layer].shape) if layer in self.keys else None
            if shape is None or len(shape) != 2 or shape[0] != model.d_key:
                raise InputError(
                    f"the curve's keys of layer {layer} have shape {shape}, expected [{model.d_key}, number of keys]"
                )
        return {layer: self.keys[layer].double() for layer in layers}


class Curve:
    """One layer's curve, as far as it has come; keeps the last snapshot alone."""

    def __init__(self, keys: Float[Tensor, "d_mlp key"], settings: Convergence) -> None:
        """Start with no snapshot.

        Args:
            keys: K of the layer.
            settings: what to measure.
        """
        self.keys, self.settings = keys, settings
        self.rows: list[list[float]] = []
        """Tokens, change of the matrix, change of the update."""
        self.count = 0
        """Tokens of the last snapshot."""
        self.matrix: Tensor | None = None
        self.update: Tensor | None = None

    def watch(self, fitter: MomentAccumulator, *, final: bool = False) -> None:
        """Take a snapshot when the tokens have doubled (the first at d_mlp), or are all there."""
        due = fitter.count >= max(2 * self.count, len(fitter.total))
        if not due and not (final and fitter.count > self.count > 0):
            return
        matrix = fitter.mean()
        update = unit_update(matrix, self.keys, self.settings.weight)
        if self.matrix is not None:
            changes = (_change(self.matrix, matrix), _change(self.update, update))
            self.rows.append([fitter.count, *changes])
        self.count, self.matrix, self.update = fitter.count, matrix.float(), update

    def frame(self, layer: int) -> pd.DataFrame:
        """The rows so far: `tokens, layer, matrix_change, update_change`."""
        rows = [(int(tokens), layer, *changes) for tokens, *changes in self.rows]
        return pd.DataFrame(rows, columns=COLUMNS).astype({"tokens": "int64", "layer": "int64"})


def unit_update(
    matrix: Float[Tensor, "d_mlp d_mlp"], keys: Float[Tensor, "d_mlp key"], weight: float | int
) -> Float[Tensor, "d_mlp key"] | None:
    """(λM + K Kᵀ)⁻¹ K: the ridge update for residuals I. None when M cannot be solved with, from too few tokens."""
    keys = keys.to(matrix)
    try:
        return ridge_update(keys, torch.eye(keys.shape[1]).to(matrix), matrix, weight).left
    except InputError:
        return None


@torch.no_grad()
def draw_keys(
    model: Model, shard: Shard, layers: list[int], count: int, seed: int
) -> dict[int, Float[Tensor, "d_mlp key"]]:
    """Keys of random tokens of a shard, at most one of a text."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(shard.rows), generator=generator).tolist()
    chosen = [shard.rows[i] for i in order[:count]]
    ends = [int(torch.randint(min(len(ids), PREFIX), (), generator=generator)) + 1 for ids in chosen]
    tokens = pad([ids[:end] for ids, end in zip(chosen, ends, strict=True)], model.tokenizer, model.device)
    sites = {layer: model.key_site(layer) for layer in layers}
    run = model.run(tokens, read=list(sites.values()), stop_after=max(layers))
    rows = torch.arange(len(chosen))
    return {layer: run[site][rows, torch.tensor(ends) - 1].double().T.cpu() for layer, site in sites.items()}


def _change(before: Tensor | None, after: Tensor | None) -> float:
    """‖after − before‖ / ‖after‖."""
    if before is None or after is None:
        return float("nan")
    return float((after - before).norm() / after.norm())
