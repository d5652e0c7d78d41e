"""How many rows fit: an estimate of what a trace keeps and of what a pass needs."""

from __future__ import annotations

from mechedit.errors import InputError
from mechedit.models import Model
from mechedit.trace.config import TraceConfig
from mechedit.trace.tokens import TracedFact

GIB = 2**30
HIDDEN_COPIES, MLP_COPIES = 12, 4
"""Activations of a block that are alive at once, in units of d_model and of d_mlp."""


def scene_bytes(model: Model, traced: TracedFact, config: TraceConfig) -> int:
    """Kept for one row of the corrupted run: states, keys, values, severed modules, and where windows start from."""
    severed = len({sever.module for sever in config.severed} - {"nothing"})
    entries = len(set(config.kinds) - {"state"}) * len(config.sever)
    own = (3 + severed + entries) * model.n_layers * model.d_model * len(traced.ids) * model.dtype.itemsize
    clean = len(config.kinds) * model.n_layers * model.d_model * len(traced.ids) * model.dtype.itemsize
    return own + clean // config.samples


def pass_bytes(model: Model, traced: TracedFact, config: TraceConfig) -> int:
    """Needed for one row of a pass: a layer's keys and values, a block's activations, logits in fp32 three times."""
    tokens, size = len(traced.ids), model.dtype.itemsize
    cached = 2 * 2 * model.d_model * tokens * size
    block = tokens * size * (HIDDEN_COPIES * model.d_model + MLP_COPIES * model.d_mlp)
    logits = len(traced.object_ids) * model.vocab_size * (size + 3 * 4)
    held = config_places(config) * model.d_model * size
    return cached + block + logits + held


def config_places(config: TraceConfig) -> int:
    """Positions that patches write in a row, about."""
    return len(config.sever) + len(config.kinds)


def pass_rows(model: Model, traced: TracedFact, config: TraceConfig) -> int:
    """Most rows of one pass: `batch_rows`, or what half of `memory` holds."""
    return _rows(model, traced, config, pass_bytes(model, traced, config))


def scene_rows(model: Model, traced: TracedFact, config: TraceConfig) -> int:
    """Most rows of one group of facts: `batch_rows`, or what half of `memory` holds."""
    return _rows(model, traced, config, max(scene_bytes(model, traced, config), pass_bytes(model, traced, config)))


def _rows(model: Model, traced: TracedFact, config: TraceConfig, each: int) -> int:
    """Rows that half of `memory` holds, at least one fact's draws.

    Raises:
        InputError: not even those fit.
    """
    if config.memory is None:
        return max(config.batch_rows, config.samples)
    rows = int(config.memory * GIB / 2 // each)
    if rows < config.samples:
        need = 2 * config.samples * each / GIB
        raise InputError(
            f"memory is {config.memory} GiB, expected at least {need:.2f} GiB: fact {traced.fact.id!r} has "
            f"{len(traced.ids)} tokens and is traced with {config.samples} samples; raise memory or lower samples"
        )
    return max(config.samples, min(rows, config.batch_rows))
