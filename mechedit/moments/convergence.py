"""Is the text long enough? Tracks how a second moment, and an update made with it, change as tokens are added."""

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
from mechedit.bounds import check_numbers
from mechedit.errors import InputError, check_at_least, check_positive
from mechedit.models import Model
from mechedit.moments.accumulator import MomentAccumulator
from mechedit.moments.chunks import Chunk
from mechedit.solve import ridge_update

COLUMNS = ["tokens", "layer", "matrix_change", "update_change"]
MAX_CONTEXT = 64
"""Position of a drawn key in its text at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Convergence:
    """Settings of the convergence curve: the change from one moment to that over at least twice as many tokens.

    `matrix_change` is ‖M₂ − M₁‖ / ‖M₂‖ (Frobenius); `update_change` is the same of (λM + K Kᵀ)⁻¹ K, which any
    residuals R turn into the update of MEMIT Eq. 14. With independent documents and M₂ over exactly twice as many,
    M₂ − M₁ has the variance of M₂ itself; so the last rows estimate how far the moment is from that of endless text.
    """

    weight: float | int = 15_000
    """λ, the weight of the second moment in the update."""
    keys: Mapping[int, Tensor] | None = None
    """K per layer, [d_mlp, key]; by default keys drawn from the text."""
    drawn: int = 32
    """Number of keys drawn: each at a random token among the first 64 of a text, one per text."""
    seed: int = 0
    """Random seed of that draw."""

    def __post_init__(self) -> None:
        check_numbers(self, drawn=1_000_000)
        check_positive("the weight of the convergence curve", self.weight)
        check_at_least("drawn", self.drawn, 1)

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON can hold them; keys are replaced by their hash."""
        if self.keys is None:
            return {"weight": self.weight, "drawn": self.drawn, "seed": self.seed}
        digest = hashlib.sha256()
        for layer, keys in sorted(self.keys.items()):
            digest.update(f"{layer} {list(keys.shape)}\n".encode())
            digest.update(keys.detach().double().cpu().numpy().tobytes())
        return {"weight": self.weight, "keys": digest.hexdigest()}

    def keys_of(
        self, model: Model, chunk: Chunk, layers_read: list[int], layers: list[int]
    ) -> dict[int, Float[Tensor, "d_mlp key"]]:
        """K of some layers: the settings' own, or drawn from a chunk of the text.

        Args:
            model: model whose keys are drawn.
            chunk: first chunk of the text.
            layers_read: layers whose keys are drawn in one run.
            layers: layers whose K is needed.

        Raises:
            InputError: the settings' own keys lack a layer, or have another width than the model's.
        """
        if self.keys is None:
            return draw_keys(model, chunk, layers_read, self.drawn, self.seed)
        for layer in layers:
            shape = tuple(self.keys[layer].shape) if layer in self.keys else None
            if shape is None or len(shape) != 2 or shape[0] != model.d_key:
                raise InputError(
                    f"the curve's keys of layer {layer} have shape {shape}, expected [{model.d_key}, number of keys]"
                )
        return {layer: self.keys[layer].double() for layer in layers}


class ConvergenceTracker:
    """Measures one layer's convergence curve; keeps only the last snapshot of the moment."""

    def __init__(self, keys: Float[Tensor, "d_mlp key"], settings: Convergence) -> None:
        """Start without a snapshot.

        Args:
            keys: K of the layer.
            settings: what to measure.
        """
        self.keys, self.settings = keys, settings
        self.changes: list[list[float]] = []
        """Per snapshot but the first: tokens, `matrix_change`, `update_change`."""
        self.count = 0
        """Tokens in the last snapshot."""
        self.matrix: Tensor | None = None
        """The second moment in the last snapshot, in float32."""
        self.update: Tensor | None = None
        """(λM + K Kᵀ)⁻¹ K in the last snapshot; None if that could not be solved."""

    def track(self, accumulator: MomentAccumulator, *, final: bool = False) -> None:
        """Take a snapshot if the tokens have doubled since the last one; the first is taken at d_mlp tokens.

        Args:
            accumulator: the sum so far.
            final: whether it holds all tokens, which are worth a snapshot even if they have not doubled.
        """
        due = accumulator.count >= max(2 * self.count, len(accumulator.total))
        if not due and not (final and accumulator.count > self.count > 0):
            return
        matrix = accumulator.mean()
        update = identity_update(matrix, self.keys, self.settings.weight)
        if self.matrix is not None:
            changes = (_relative_change(self.matrix, matrix), _relative_change(self.update, update))
            self.changes.append([accumulator.count, *changes])
        self.count, self.matrix, self.update = accumulator.count, matrix.float(), update

    def frame(self, layer: int) -> pd.DataFrame:
        """The curve so far: `tokens, layer, matrix_change, update_change`."""
        rows = [(int(tokens), layer, *changes) for tokens, *changes in self.changes]
        return pd.DataFrame(rows, columns=COLUMNS).astype({"tokens": "int64", "layer": "int64"})


def identity_update(
    matrix: Float[Tensor, "d_mlp d_mlp"], keys: Float[Tensor, "d_mlp key"], weight: float | int
) -> Float[Tensor, "d_mlp key"] | None:
    """(λM + K Kᵀ)⁻¹ K: the ridge update for residuals I. None if M, over too few tokens, makes the system singular."""
    keys = keys.to(matrix)
    try:
        return ridge_update(keys, torch.eye(keys.shape[1], device="cpu").to(matrix), matrix, weight).left
    except InputError:
        return None


@torch.no_grad()
def draw_keys(
    model: Model, chunk: Chunk, layers: list[int], count: int, seed: int
) -> dict[int, Float[Tensor, "d_mlp key"]]:
    """Keys at random tokens of a chunk, at most one per text."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(chunk.sequences), generator=generator, device="cpu").tolist()
    sequences = [chunk.sequences[i] for i in order[:count]]
    ends = [
        int(torch.randint(min(len(ids), MAX_CONTEXT), (), generator=generator, device="cpu")) + 1 for ids in sequences
    ]
    tokens = pad([ids[:end] for ids, end in zip(sequences, ends, strict=True)], model.tokenizer, model.device)
    sites = {layer: model.key_site(layer) for layer in layers}
    run = model.run(tokens, read=list(sites.values()), stop_after=max(layers))
    index = torch.arange(len(sequences), device="cpu")
    return {
        layer: run[site][index, torch.tensor(ends, device="cpu") - 1].double().T.cpu() for layer, site in sites.items()
    }


def _relative_change(before: Tensor | None, after: Tensor | None) -> float:
    """‖after − before‖ / ‖after‖; NaN if one of them is missing."""
    if before is None or after is None:
        return float("nan")
    return float((after - before).norm() / after.norm())
