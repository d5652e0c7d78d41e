"""How many operations a second each step computes on this machine: measured on a few random blocks of a model's sizes.

A model of a few blocks with random weights does a little of each step, and its operations are divided by the seconds.
So the rate holds what surrounds the matrix products, too: the start of operations, norms, the softmax, Python.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from mechedit.data import load_facts, load_requests
from mechedit.errors import InputError
from mechedit.models import Model, ModelShapes, few_random_blocks
from mechedit.moments import MomentsConfig
from mechedit.moments.accumulator import MomentAccumulator, product_entries
from mechedit.moments.key_reader import KeyReader
from mechedit.planning.operations import Operations
from mechedit.planning.plan import fact_operations, search_operations
from mechedit.prefixes import BARE
from mechedit.targets import TargetConfig, find_targets
from mechedit.targets.search_prompts import search_prompts
from mechedit.trace import TraceConfig
from mechedit.trace.cells import trace_group
from mechedit.trace.traced_fact import tokenize_fact

BLOCKS = 4
"""Blocks of the model that is measured."""
MOST_BYTES = 4 * 2**30
"""Bytes of weights above which nothing is measured."""
SECONDS = 2.0
"""Least seconds for which a step is repeated."""
FACTS = 8
"""Facts whose z is searched for, and that are traced, at a time."""
PREFIXES = (BARE, "The tower stands in the old city near the river. {}")
"""Texts before the prompts."""


def measured_rates(
    source: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None
) -> Mapping[str, float]:
    """Operations per second of each step, by its name, and of the linear systems (`solving`).

    Args:
        source: as in `ModelShapes.of_config`.
        device: where it is measured.
        dtype: of the weights.

    Raises:
        InputError: even a few blocks take more than `MOST_BYTES`.
    """
    shapes = ModelShapes.of_config(source, dtype)
    taken = (BLOCKS * max(block.matrices for block in shapes.blocks) + 2 * shapes.head) * shapes.dtype.itemsize
    if taken > MOST_BYTES:
        raise InputError(
            f"{BLOCKS} blocks of {str(source)!r} take {taken / 2**30:.3g} GiB, expected at most "
            f"{MOST_BYTES / 2**30:.3g} GiB to measure a rate; give one by --rate, such as 2e14"
        )
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bars
        model = few_random_blocks(source, BLOCKS, device=device, dtype=dtype)
        targets = _targets(model)
        return {
            "moments": _moments(model),
            "targets": targets,
            "spreading": targets,
            "trace": _trace(model),
            "solving": _solving(model),
        }


def _rate(operations: float | int, run: Callable[[], object]) -> float:
    """Operations per second of what is repeated for a while, once it is warm."""
    run()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS:
        run()
        count += 1
    return count * operations / (time.perf_counter() - begin)


@torch.no_grad()
def _moments(model: Model) -> float:
    config = MomentsConfig()
    length, last = config.text_length(model), model.n_layers - 1
    rows = max(1, config.batch_tokens // length)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(model.vocab_size, (rows, length), generator=generator).tolist()
    reader, summed = KeyReader(model, [last], config.batch_tokens), MomentAccumulator(model.d_key, model.device)
    operations = Operations.of(model).text_pass([length] * rows, last)
    operations += rows * length * 2 * product_entries(model.d_key)
    return _rate(operations, lambda: summed.update(reader.read(texts)[last]).finite)


def _targets(model: Model) -> float:
    requests, config = load_requests("tiny")[:FACTS], TargetConfig(steps=4, threshold=1e-9)
    layer = model.n_layers // 2 - 1
    rows = search_prompts(model, requests, range(len(requests)), PREFIXES, config)
    operations = search_operations(Operations.of(model), rows, layer, config.updates)
    return _rate(operations, lambda: find_targets(model, requests, layer, PREFIXES, config))


@torch.no_grad()
def _trace(model: Model) -> float:
    config = TraceConfig(window=2)
    facts = [tokenize_fact(model, fact) for fact in load_facts("known")[:FACTS]]
    facts = [fact for fact in facts if fact.shape == facts[0].shape]
    operations = sum(fact_operations(Operations.of(model), fact, config) for fact in facts)
    return _rate(operations, lambda: trace_group(model, facts, 0.1, config))


def _solving(model: Model) -> float:
    size = min(model.d_key, 2048)
    matrix = torch.eye(size, dtype=torch.float64) * size + 1
    return _rate(size**3 / 3, lambda: torch.linalg.cholesky_ex(matrix))
