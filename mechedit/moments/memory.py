"""Memory that collecting takes, estimated before it starts: the layers of each pass, sums, batches and files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mechedit.arguments import checked
from mechedit.batching import GIB, HIDDEN_COPIES, MLP_COPIES
from mechedit.errors import InputError
from mechedit.models import Model, ModelShapes
from mechedit.moments.accumulator import STRIP
from mechedit.moments.config import MomentsConfig
from mechedit.split_tensors import rows_here

SCORE_COPIES = 3
"""Copies of attention's scores of a block that are in memory at once."""


@dataclass(frozen=True, kw_only=True)
class MomentsPlan:
    """Passes over the text, and an estimate of the bytes that collecting takes beside the weights."""

    passes: tuple[tuple[int, ...], ...]
    """Layers per pass over the text."""
    batch_tokens: int
    """Tokens per batch and per forward pass."""
    sums: int
    """Bytes of the float64 sums of the largest pass, and of what a product and a snapshot need."""
    batch: int
    """Bytes of the keys and activations of a batch."""
    mean: int
    """Bytes of the one mean that is made at a time, once the text is read."""
    finished: int
    """Bytes of the finished matrices of all layers, in memory and again on disk when they are written."""

    @property
    def memory(self) -> int:
        """Bytes in use at once, beside the weights: while a batch is read, or when the first mean is made."""
        return self.sums + max(self.batch, self.mean)

    def __str__(self) -> str:
        layers = [layer for pass_layers in self.passes for layer in pass_layers]
        passes = "one pass" if len(self.passes) == 1 else f"{len(self.passes)} passes"
        return (
            f"second moments of layers {', '.join(map(str, layers))} in {passes} over the text: about "
            f"{_gib(self.memory)} of memory beside the weights ({_gib(self.sums)} for sums, {_gib(self.batch)} for "
            f"a batch of {self.batch_tokens} tokens); the matrices take {_gib(self.finished)}, checkpoints on disk "
            f"as much again"
        )


@checked
def plan_moments(
    model: Model | ModelShapes, layers: Sequence[int], config: MomentsConfig | None = None, *, convergence: bool = False
) -> MomentsPlan:
    """Plan as few passes over the text as `config.memory` allows, and then as large batches as fit.

    The sum of a layer takes 8·d_mlp² bytes. A batch takes the keys of every layer of the pass and one block's
    activations, including attention's scores.

    Args:
        model: model whose keys are collected.
        layers: layers to collect.
        config: limits of memory and of tokens per batch.
        convergence: whether a convergence curve is measured too.

    Raises:
        InputError: not even one layer and one sequence fit.
    """
    config = config or MomentsConfig()
    layers = sorted(set(layers))
    n_layers, batch_tokens = len(layers), config.batch_tokens
    length = config.text_length(model)
    if config.memory is not None:
        limit = int(config.memory * GIB)
        n_layers = _layers_per_pass(model, len(layers), limit, config, convergence)
        bytes_per_token = batch_bytes(model, n_layers, length, length) // length
        fitting = (limit - sum_bytes(model, n_layers, convergence)) // bytes_per_token
        batch_tokens = min(batch_tokens, max(length, fitting))
    n_layers = max(n_layers, 1)
    return MomentsPlan(
        passes=tuple(tuple(layers[i : i + n_layers]) for i in range(0, len(layers), n_layers)),
        batch_tokens=batch_tokens,
        sums=sum_bytes(model, n_layers, convergence),
        batch=batch_bytes(model, n_layers, max(batch_tokens, length), length),
        mean=mean_bytes(model),
        finished=len(layers) * square_bytes(model),
    )


def _layers_per_pass(
    model: Model | ModelShapes, n_layers: int, limit: int, config: MomentsConfig, convergence: bool
) -> int:
    """How many of `n_layers` layers fit in `limit` bytes with the smallest batch."""
    length = config.text_length(model)

    def needed(count: int) -> int:
        return sum_bytes(model, count, convergence) + max(batch_bytes(model, count, length, length), mean_bytes(model))

    fitting = [count for count in range(1, n_layers + 1) if needed(count) <= limit]
    if n_layers and not fitting:
        raise InputError(
            f"memory is {config.memory} GiB, expected at least {needed(1) / GIB:.3g} GiB: one "
            f"layer's sum takes {_gib(sum_bytes(model, 1, convergence))}, and a sequence of {length} tokens "
            f"{_gib(batch_bytes(model, 1, length, length))}; raise memory or lower max_length"
        )
    return max(fitting, default=1)


def sum_bytes(model: Model | ModelShapes, layers: int, convergence: bool) -> int:
    """Bytes of the sums of some layers, and of one strip's product.

    With `convergence`, also of a float32 snapshot per layer and of one layer's factorization.
    """
    square, strip = square_bytes(model), min(STRIP, model.d_key) * model.d_key * (4 + 8)
    snapshots = (layers * square // 2 + 2 * square) if convergence else 0
    return layers * square + strip + snapshots


def mean_bytes(model: Model | ModelShapes) -> int:
    """Bytes of the mean of one layer, which is made of its sum; where rows are split, with what mirrors them."""
    return square_bytes(model) * (1 if model.mesh is None else 4)


def square_bytes(model: Model | ModelShapes) -> int:
    """Bytes of one matrix in float64, or of the rows of it that this process holds."""
    return 8 * len(rows_here(model.d_key, model.mesh)) * model.d_key


def batch_bytes(
    model: Model | ModelShapes, layers: int, tokens: int, length: int, *, at_once: int | None = None
) -> int:
    """Bytes of the keys of some layers for a batch, as computed and as buffered, and of one block's activations.

    In half precision one layer's keys are also there in float32. Attention's scores are where no fused kernel computes
    them.

    Args:
        model: model that is run.
        layers: number of layers in the pass.
        tokens: tokens in the batch.
        length: tokens of its longest sequence.
        at_once: tokens of one forward pass, by default all of the batch.
    """
    size = model.dtype.itemsize
    buffered = layers * size * model.d_key
    keys = (layers * size + (4 if size < 4 else 0)) * model.d_key
    scores = SCORE_COPIES * model.n_heads * length if model.keeps_scores else 0
    block = size * (HIDDEN_COPIES * model.d_model + MLP_COPIES * model.d_mlp + scores)
    return tokens * buffered + (tokens if at_once is None else at_once) * (keys + block)


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"
