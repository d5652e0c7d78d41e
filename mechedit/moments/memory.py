"""What collecting takes, stated before it starts: the layers of each pass, its sums, a batch, the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mechedit.errors import InputError
from mechedit.models import Model
from mechedit.moments.accumulator import STRIP
from mechedit.moments.config import MomentsConfig

GIB = 2**30
HIDDEN_COPIES, MLP_COPIES, SCORE_COPIES = 12, 4, 3
"""Activations of a block that are alive at once, in units of d_model, of d_mlp and of attention's scores."""


@dataclass(frozen=True, kw_only=True)
class MomentsPlan:
    """What collecting will take beside the weights; an estimate, in bytes."""

    passes: tuple[tuple[int, ...], ...]
    """The layers that are collected together, each time in a pass over the text."""
    batch_tokens: int
    """Tokens whose keys are held together, and most in one forward pass."""
    sums: int
    """Of the largest pass, in float64, with what a product and a snapshot need."""
    batch: int
    """The keys and activations of a batch."""
    finished: int
    """The matrices of all layers; as much disk is used when they are written."""

    @property
    def memory(self) -> int:
        """Most that is taken at once, beside the finished matrices."""
        return self.sums + self.batch

    def __str__(self) -> str:
        layers = [layer for one in self.passes for layer in one]
        passes = "one pass" if len(self.passes) == 1 else f"{len(self.passes)} passes"
        return (
            f"second moments of layers {', '.join(map(str, layers))} in {passes} over the text: about "
            f"{_gib(self.memory)} of memory beside the weights ({_gib(self.sums)} for sums, {_gib(self.batch)} for "
            f"a batch of {self.batch_tokens} tokens); the matrices take {_gib(self.finished)}, checkpoints on disk "
            f"as much again"
        )


def plan_moments(
    model: Model, layers: Sequence[int], config: MomentsConfig | None = None, *, convergence: bool = False
) -> MomentsPlan:
    """As few passes as `config.memory` allows, and then as large batches.

    The sum of a layer takes 8·d_mlp² bytes. A batch keeps the keys of every layer of the pass, and one block's
    activations, among them attention's scores.

    Raises:
        InputError: not even one layer and one sequence fit.
    """
    config = config or MomentsConfig()
    wanted = sorted(set(layers))
    longest = min(config.max_length, model.max_positions)
    least = replace(config, batch_tokens=min(config.batch_tokens, longest))

    def need(together: int, tokens: int) -> int:
        return sum_bytes(model, together, convergence) + batch_bytes(model, together, max(tokens, longest), longest)

    together, tokens = len(wanted), config.batch_tokens
    if config.memory is not None:
        most = int(config.memory * GIB)
        fitting = [many for many in range(1, len(wanted) + 1) if need(many, least.batch_tokens) <= most]
        if wanted and not fitting:
            raise InputError(
                f"memory is {config.memory} GiB, expected at least {need(1, least.batch_tokens) / GIB:.3g} GiB: one "
                f"layer's sum takes {_gib(sum_bytes(model, 1, convergence))}, and a sequence of {longest} tokens "
                f"{_gib(batch_bytes(model, 1, longest, longest))}; raise memory or lower max_length"
            )
        together = max(fitting, default=1)
        each = batch_bytes(model, together, longest, longest) // longest
        tokens = min(tokens, max(longest, (most - sum_bytes(model, together, convergence)) // each))
    together = max(together, 1)
    return MomentsPlan(
        passes=tuple(tuple(wanted[i : i + together]) for i in range(0, len(wanted), together)),
        batch_tokens=tokens,
        sums=sum_bytes(model, together, convergence),
        batch=batch_bytes(model, together, max(tokens, longest), longest),
        finished=len(wanted) * 8 * model.d_key**2,
    )


def sum_bytes(model: Model, layers: int, convergence: bool) -> int:
    """The sums of some layers, one strip's product, and the one mean that is made or written at a time.

    With `convergence`, a float32 snapshot a layer, and one layer's factorization.
    """
    square, strip = 8 * model.d_key**2, min(STRIP, model.d_key) * model.d_key * (4 + 8)
    snapshots = (layers * square // 2 + 2 * square) if convergence else 0
    return (layers + 1) * square + strip + snapshots


def batch_bytes(model: Model, layers: int, tokens: int, longest: int) -> int:
    """The keys of some layers for a batch, as they are computed and as they are kept, and a block's activations.

    One layer's keys are also there in float32.
    """
    size, heads = model.dtype.itemsize, model.n_heads
    keys = (2 * layers * size + 4) * model.d_key
    block = size * (HIDDEN_COPIES * model.d_model + MLP_COPIES * model.d_mlp + SCORE_COPIES * heads * longest)
    return tokens * (keys + block)


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"
