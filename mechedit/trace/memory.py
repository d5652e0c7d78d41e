"""How many rows fit in memory: an estimate of what a group of facts keeps, and of what one batch needs."""

from __future__ import annotations

import math

from mechedit.batching import GIB, HIDDEN_COPIES, MLP_COPIES, padding_budget
from mechedit.errors import InputError, brief
from mechedit.models import Model, ModelShapes
from mechedit.trace.config import TraceConfig
from mechedit.trace.metrics import are_of_object
from mechedit.trace.traced_fact import TracedFact

ENOUGH_TOKENS = 2048
"""Tokens of a batch of cells that are enough, at least."""
TOKENS_PER_BLOCK = 136
"""The same for each block of the model. Rows join on the way, so that early blocks have few of them: with 2,048 tokens
for its 30 blocks, a trace of SmolLM2 ran at 79% of the rate on large matrices, with 4,096 at 92%; one of GPT-2's 12
blocks was as fast with either, and took 0.45 GiB in place of 0.65."""
GROUP_TOKENS = 1024
"""Tokens of a group's corrupted run that are enough. Its states stay in memory while the group is traced, and groups
are dealt to processes."""
GRADIENT_GIB = 1.0
"""GiB for the rows of a backward pass where a trace has no limit; more rows at once are hardly faster."""
GRADIENT_COPIES = 24
"""Activations of a block that a backward pass keeps, and their gradients, in multiples of d_model."""


def group_row_bytes(model: Model | ModelShapes, traced: TracedFact, config: TraceConfig) -> int:
    """Bytes kept per row of the corrupted run: states, keys, values, outputs, and states of attention windows.

    Windows of MLPs begin at their outputs. Estimates read the outputs of all that they restore.
    """
    restored = set(config.kinds) - {"state"} if config.approximation is not None else {"mlp"} & set(config.kinds)
    outputs = len({sever.module for sever in config.severed} - {"nothing"}) + len(restored)
    windows = len(config.sever) if "attn" in config.kinds else 0
    corrupted = (3 + outputs + windows) * model.n_layers * model.d_model * len(traced.ids) * model.dtype.itemsize
    clean = len(config.kinds) * model.n_layers * model.d_model * len(traced.ids) * model.dtype.itemsize
    return corrupted + clean // config.samples


def batch_row_bytes(model: Model | ModelShapes, traced: TracedFact, config: TraceConfig) -> int:
    """Bytes needed per row of a batch: a layer's keys and values, and a block's activations or, at the end, logits."""
    tokens, size = len(traced.ids), model.dtype.itemsize
    cached = 2 * 2 * model.d_model * tokens * size
    block = tokens * size * (HIDDEN_COPIES * model.d_model + MLP_COPIES * model.d_mlp)
    patched = (len(config.sever) + len(config.kinds)) * model.d_model * size
    return cached + patched + max(block, _logit_bytes(model, traced, config))


def _logit_bytes(model: Model | ModelShapes, traced: TracedFact, config: TraceConfig) -> int:
    """Bytes of a row's logits, in float32 too where they are not, of its log-probabilities, and of other metrics'.

    A divergence takes the clean run's logits and log-probabilities as well, and their difference. Metrics of the object
    alone are read off a part of the vocabulary at a time.
    """
    if are_of_object(config.metrics) and (isinstance(model, ModelShapes) or model.readout().chunked):
        return 0
    size = model.dtype.itemsize
    bytes_per_token = size + (4 if size < 4 else 0) + 4
    if any(not isinstance(metric, str) or "kl" in metric for metric in config.metrics):
        bytes_per_token += size + 3 * 4
    return len(traced.object_ids) * model.vocab_size * bytes_per_token


def gradient_row_bytes(model: Model | ModelShapes, traced: TracedFact) -> int:
    """Bytes needed per row of a forward pass whose activations a backward pass reads again, and for its gradients."""
    tokens, size = len(traced.ids), model.dtype.itemsize
    block = tokens * size * (GRADIENT_COPIES * model.d_model + MLP_COPIES * model.d_mlp + 3 * model.n_heads * tokens)
    logits = len(traced.object_ids) * model.vocab_size * (2 * size + 4 * 4)
    return model.n_layers * block + logits


def max_gradient_rows(model: Model | ModelShapes, traced: TracedFact, config: TraceConfig) -> int:
    """Most rows of one backward pass: what half of `memory` holds, without a limit `GRADIENT_GIB`; at least one."""
    gib = GRADIENT_GIB if config.memory is None else config.memory / 2
    return max(1, min(config.batch_rows, int(gib * GIB // gradient_row_bytes(model, traced))))


def enough_tokens(model: Model) -> int:
    """Tokens of a batch of cells: `least_enough_tokens`, or more where starting a block takes the time."""
    return max(least_enough_tokens(model), round(22 * padding_budget(model)))


def least_enough_tokens(model: Model | ModelShapes) -> int:
    """Tokens of a batch of cells at least, where there are so many: more for a deep model."""
    return max(ENOUGH_TOKENS, TOKENS_PER_BLOCK * model.n_layers)


def max_batch_rows(model: Model | ModelShapes, traced: TracedFact, config: TraceConfig) -> int:
    """Most rows of one batch of cells: `batch_rows`, or what half of `memory` holds."""
    return _max_rows(traced, config, batch_row_bytes(model, traced, config))


def max_group_rows(model: Model | ModelShapes, traced: TracedFact, config: TraceConfig) -> int:
    """Most rows of one group of facts: `batch_rows`, what half of `memory` holds, or those of `GROUP_TOKENS`."""
    row_bytes = max(group_row_bytes(model, traced, config), batch_row_bytes(model, traced, config))
    enough = -(-GROUP_TOKENS // len(traced.ids))
    return max(config.samples, min(_max_rows(traced, config, row_bytes), enough))


def _max_rows(traced: TracedFact, config: TraceConfig, row_bytes: int) -> int:
    """Rows that half of `memory` holds, at least one fact's samples.

    Raises:
        InputError: not even those fit.
    """
    if config.memory is None:
        return max(config.batch_rows, config.samples)
    rows = int(config.memory * GIB / 2 // row_bytes)
    if rows < config.samples:
        need = math.ceil(2000 * config.samples * row_bytes / GIB) / 1000
        raise InputError(
            f"memory is {config.memory} GiB, expected at least {need:.3f} GiB: fact {brief(traced.fact.id)} has "
            f"{len(traced.ids)} tokens and is traced with {config.samples} samples; raise memory or lower samples"
        )
    return max(config.samples, min(rows, config.batch_rows))
