"""How many operations a second each step computes on this machine: measured on a few random blocks of a model's sizes.

A model of a few blocks with random weights does a little of each step, and its operations are divided by the seconds.
So the rate holds what surrounds the matrix products, too: the start of operations, norms, the softmax, Python.
"""

from __future__ import annotations

import contextlib
import functools
import io
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from mechedit.data import EditRequest, load_facts, load_requests
from mechedit.errors import InputError
from mechedit.models import Model, ModelShapes, few_random_blocks
from mechedit.moments import MomentsConfig
from mechedit.moments.accumulator import MomentAccumulator, product_entries
from mechedit.moments.key_reader import KeyReader
from mechedit.planning.operations import Operations
from mechedit.planning.plan import Rates, fact_operations, search_operations
from mechedit.prefixes import BARE
from mechedit.targets import TargetConfig, find_targets
from mechedit.targets.prompt_batch import common_starts
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
TRACED, SEARCHED = 8, 16
"""Facts that are traced, and whose z is searched for, at a time; more are no faster a fact."""
HEAD_ROWS = 64
"""Positions whose logits are computed at a time."""
_TEXT = "{} stands in the old city near the river. {{}}"
PREFIXES = (
    BARE,
    *(_TEXT.format(what) for what in ("The tower", "A bridge", "One house", "The school", "Their church")),
)
"""Texts before the prompts, as many as a search generates."""


Clock = Callable[[], float]
"""Seconds since some time."""
Timer = Callable[[Callable[[], object]], float]
"""Seconds of what is repeated."""


def measured_rates(
    source: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    clock: Clock = time.perf_counter,
) -> Rates:
    """Operations per second of the blocks in each step, of the unembedding, and of the linear systems.

    The unembedding of a few blocks is a larger part of their work than that of all blocks, and its product is a larger
    one; so it is measured by itself, and its seconds are taken off those of the steps.

    Args:
        source: as in `ModelShapes.of_config`.
        device: where it is measured.
        dtype: of the weights.
        clock: what counts as time; that of one thread alone, `time.process_time`, leaves out other jobs.

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
        seconds = functools.partial(_seconds, clock=clock)
        head = _head(model, seconds)
        targets, trace = _targets(model, head, seconds), _trace(model, head, seconds)
        blocks = {"trace": trace, "moments": _moments(model, seconds), "targets": targets, "spreading": targets}
        return Rates(blocks=blocks, head=head, solving=_solving(model, seconds))


def _seconds(run: Callable[[], object], clock: Clock) -> float:
    """Seconds of what is repeated for a while, once it is warm."""
    run()
    begin, count = clock(), 0
    while clock() - begin < SECONDS:
        run()
        count += 1
    return (clock() - begin) / count


def _blocks_rate(total: float | int, of_blocks: float | int, seconds: float, head_rate: float) -> float:
    """Operations per second of the blocks, once the unembedding's seconds are taken off (half of all at most)."""
    return of_blocks / max(seconds - (total - of_blocks) / head_rate, seconds / 2)


def _head(model: Model, seconds: Timer) -> float:
    """Of the unembedding, its log-probabilities and their gradient."""
    readout, generator = model.readout(), torch.Generator().manual_seed(0)
    width = model.d_model if readout.chunked else model.vocab_size
    states = torch.randn(HEAD_ROWS, width, generator=generator).to(model.device, model.dtype).requires_grad_()
    labels = torch.arange(HEAD_ROWS, device=model.device) % model.vocab_size
    products = 2 if readout.chunked else 0

    def score() -> None:
        with torch.enable_grad():
            torch.autograd.grad(readout.score(states, labels).log_prob.sum(), states)

    if not products:  # the logits are computed by the model itself
        resid = torch.randn(HEAD_ROWS, model.d_model, generator=generator).to(model.device, model.dtype)
        return HEAD_ROWS * Operations.of(model).head / seconds(lambda: model.unembed(resid))
    return products * HEAD_ROWS * Operations.of(model).head / seconds(score)


@torch.no_grad()
def _moments(model: Model, seconds: Timer) -> float:
    config = MomentsConfig()
    length, last = config.text_length(model), model.n_layers - 1
    rows = max(1, config.batch_tokens // length)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(model.vocab_size, (rows, length), generator=generator).tolist()
    reader, summed = KeyReader(model, [last], config.batch_tokens), MomentAccumulator(model.d_key, model.device)
    operations = Operations.of(model).text_pass([length] * rows, last)
    operations += rows * length * 2 * product_entries(model.d_key)
    return operations / seconds(lambda: summed.update(reader.read(texts)[last]).finite)


def _targets(model: Model, head_rate: float, seconds: Timer) -> float:
    config = TargetConfig(steps=4, threshold=1e-9)
    # Prompts of one width run together, as those of a large batch do.
    by_width: dict[int, list[EditRequest]] = defaultdict(list)
    for request in load_requests("tiny"):
        (prompt, *_) = search_prompts(model, [request], [0], PREFIXES[:1], config)
        by_width[prompt.width].append(request)
    requests = max(by_width.values(), key=len)[:SEARCHED]
    rows, operations = search_prompts(model, requests, range(len(requests)), PREFIXES, config), Operations.of(model)
    shared = common_starts(rows)
    total, of_blocks = (
        search_operations(counts, rows, 0, config.updates, shared) for counts in (operations, operations.of_blocks)
    )
    taken = seconds(lambda: find_targets(model, requests, 0, PREFIXES, config))
    return _blocks_rate(total, of_blocks, taken, head_rate)


@torch.no_grad()
def _trace(model: Model, head_rate: float, seconds: Timer) -> float:
    config, operations = TraceConfig(window=2, sever=("nothing", "mlp", "attn")), Operations.of(model)
    facts = [tokenize_fact(model, fact) for fact in load_facts("known")[:TRACED]]
    facts = [fact for fact in facts if fact.shape == facts[0].shape]
    total, of_blocks = (
        sum(fact_operations(counts, fact, config) for fact in facts) for counts in (operations, operations.of_blocks)
    )
    return _blocks_rate(total, of_blocks, seconds(lambda: trace_group(model, facts, 0.1, config)), head_rate)


def _solving(model: Model, seconds: Timer) -> float:
    size = min(model.d_key, 2048)
    matrix = torch.eye(size, dtype=torch.float64) * size + 1
    return size**3 / 3 / seconds(lambda: torch.linalg.cholesky_ex(matrix))
