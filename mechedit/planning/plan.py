"""What tracing, collecting moments and editing cost: operations, memory, disk and time.

Operations are those of matrix products (`Operations`), of what mechedit runs: what a cell or δ does not change is run
once. With T tokens of a row, s the position of the subject's last token, L blocks, u updates of δ:

    moments   tokens · (blocks up to the last layer's keys) + layers · tokens · d_mlp² (its upper half, in strips)
    targets   facts · Σ_prompts [all blocks, T tokens + (2u + 1) · blocks after l, T − s tokens behind s]
    spreading facts · Σ_prompts blocks up to the last layer, s tokens
              + layers · (d_mlp³/3 + 6 · facts · d_mlp²) in float64
    trace     facts · samples · [all blocks, T tokens + Σ_cells blocks after the cell, T − position tokens]

Memory is that of the weights, and what the step takes beside them. Time is operations over a rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mechedit.batching import GIB, HIDDEN_COPIES, LAUNCH_COST, MLP_COPIES
from mechedit.models import ModelShapes
from mechedit.models.readout import CHUNK
from mechedit.moments import MomentsConfig, plan_moments
from mechedit.moments.accumulator import product_entries
from mechedit.moments.memory import batch_bytes
from mechedit.planning.operations import Operations
from mechedit.planning.prompt_shape import PromptShape
from mechedit.targets import TargetConfig
from mechedit.targets.search_prompts import SearchPrompt
from mechedit.trace import TraceConfig
from mechedit.trace.cells import can_change, restored_spans
from mechedit.trace.folder import whole_and_severed
from mechedit.trace.memory import batch_row_bytes, group_row_bytes, least_enough_tokens, max_group_rows
from mechedit.trace.traced_fact import TracedFact, restored_positions

STEPS = ("trace", "moments", "targets", "spreading")
"""The steps that are planned."""
FLOAT64 = 8
"""Bytes of a number of a second moment."""
SYSTEM_COPIES = 4
"""Matrices of d_mlp² in float64 that are there while a layer's system is solved: moment, sum, factor, and one more."""

BASE_BYTES = 560 * 2**20
"""Bytes that Python, its libraries and what belongs to any model take on a CPU, measured with the tiny model."""
TOKEN_BYTES = 1100
"""Bytes that a tokenizer takes for each token of its vocabulary; measured: 0.9 KiB with SmolLM2's 49,152 tokens, and
1.3 KiB with Gemma 3's 262,144."""
_BATCHES_AT_ONCE = 2
"""Batches of cells that run at once, on two cores."""
_BYTES_PER_CELL = 12
"""Bytes that a cell takes in effects.parquet."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Operations per second."""

    blocks: Mapping[str, float]
    """Of the blocks, and of what surrounds them, in each step, by its name."""
    head: float
    """Of the unembedding, with what is computed from the logits."""
    solving: float
    """Of linear systems in float64."""

    @staticmethod
    def same(rate: float) -> Rates:
        """One rate for all."""
        return Rates(blocks=dict.fromkeys(STEPS, rate), head=rate, solving=rate)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step costs."""

    name: str
    operations: float | int
    """Multiplications and additions of matrix products in the model's dtype, and of k kᵀ."""
    head: float | int = 0
    """Those of the unembedding among them, which computes at another rate than the blocks."""
    solving: float | int = 0
    """Operations in float64 of linear systems, which are not among `operations`."""
    memory: int
    """Bytes beside the weights."""
    disk: int
    """Bytes of the files that the step leaves."""

    def minutes(self, rates: Rates) -> float:
        """Minutes that the step takes."""
        blocks = (self.operations - self.head) / rates.blocks[self.name]
        return (blocks + self.head / rates.head + self.solving / rates.solving) / 60


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The costs of some steps on one model."""

    shapes: ModelShapes
    steps: tuple[Step, ...]

    @property
    def peak(self) -> int:
        """Most bytes in use at once, the weights included."""
        return self.shapes.weight_bytes + max((step.memory for step in self.steps), default=0)


def surrounding_bytes(shapes: ModelShapes) -> int:
    """Bytes that are in use beside weights and steps: Python, its libraries and the tokenizer."""
    return BASE_BYTES + TOKEN_BYTES * shapes.vocab_size


def plan_moments_step(
    shapes: ModelShapes,
    tokens: int,
    layers: Sequence[int],
    config: MomentsConfig | None = None,
    *,
    text_tokens: int | None = None,
    device: str = "cpu",
) -> Step:
    """The second moments of some layers over so many tokens.

    Args:
        shapes: of the model.
        tokens: in all.
        layers: whose moments are collected.
        config: settings of the collection.
        text_tokens: most tokens of a text; by default as many as are read at most.
        device: type of the device, `cpu` or `cuda`.
    """
    config = config or MomentsConfig()
    length = min(tokens, config.text_length(shapes), text_tokens or tokens)
    batch_tokens = min(config.batch_tokens, tokens)
    plan = plan_moments(shapes, layers, replace(config, max_length=length, batch_tokens=batch_tokens))
    operations = Operations(shapes)
    rest = [tokens % length] if tokens % length else []
    total = 0
    for pass_layers in plan.passes:
        total += tokens // length * operations.text_pass([length], max(pass_layers))
        total += operations.text_pass(rest, max(pass_layers)) if rest else 0
    total += len(layers) * tokens * 2 * product_entries(shapes.d_key)
    if length < min(tokens, config.text_length(shapes)):
        at_once = _tokens_of_like_texts(shapes, plan.batch_tokens, length, device)
        n_layers = max(map(len, plan.passes))
        plan = replace(plan, batch=batch_bytes(shapes, n_layers, plan.batch_tokens, length, at_once=at_once))
    return Step(name="moments", operations=total, memory=plan.memory, disk=plan.finished)


def _tokens_of_like_texts(shapes: ModelShapes, tokens: int, length: int, device: str) -> int:
    """Tokens of the longest pass over a batch of whole texts, which run with those of like length (`length_batches`).

    With lengths w up to the longest, all as often, n texts differ by w/n from one to the next. k of them take
    k² w / 2n of padding; that is p, the padding that costs as much as another pass, for k w = √(4 p · tokens).
    """
    return min(tokens, max(length, round(math.sqrt(4 * _padding_budget(shapes, device) * tokens))))


def _padding_budget(shapes: ModelShapes, device: str) -> float:
    """Padding tokens that cost as much as starting another run of a block (`padding_budget` of a model)."""
    return LAUNCH_COST[device] * shapes.n_layers / (2 * sum(block.matrices for block in shapes.blocks))


def plan_trace_step(
    shapes: ModelShapes, facts: int, prompt: PromptShape | None = None, config: TraceConfig | None = None
) -> Step:
    """Tracing of so many facts of a size as `trace_to_folder` does: whole, and states with modules severed."""
    typical = (prompt or PromptShape()).traced_fact()
    parts = whole_and_severed(config or TraceConfig())
    total, of_blocks = (
        sum(fact_operations(counts, typical, part) for part in parts) for counts in _with_and_without_head(shapes)
    )
    cells = sum(len(restored_spans(part, shapes.n_layers)) * len(restored_positions(typical, part)) for part in parts)
    return Step(
        name="trace", operations=facts * total, head=facts * (total - of_blocks),
        memory=max(_trace_bytes(shapes, facts, typical, part) for part in parts), disk=facts * cells * _BYTES_PER_CELL,
    )  # fmt: skip


def _trace_bytes(shapes: ModelShapes, facts: int, typical: TracedFact, config: TraceConfig) -> int:
    """Bytes of a group's corrupted runs, and of the batches of its cells that run at once."""
    group = min(max_group_rows(shapes, typical, config), facts * config.samples)
    cells = len(restored_spans(config, shapes.n_layers)) * len(restored_positions(typical, config))
    enough = math.ceil(_BATCHES_AT_ONCE * least_enough_tokens(shapes) / len(typical.ids))
    rows = max(config.samples, min(group * cells, config.batch_rows, enough))
    return group * group_row_bytes(shapes, typical, config) + rows * batch_row_bytes(shapes, typical, config)


def _with_and_without_head(shapes: ModelShapes) -> tuple[Operations, Operations]:
    """Operations of a model, and of its blocks alone."""
    operations = Operations(shapes)
    return operations, operations.of_blocks


def fact_operations(operations: Operations, traced: TracedFact, config: TraceConfig) -> float | int:
    """Operations of tracing one fact: its clean and corrupted runs, and all cells."""
    tokens, read, last = len(traced.ids), len(traced.object_ids), operations.shapes.n_layers - 1
    row = operations.through(range(last), tokens) + operations.last_block(tokens, read)
    return (1 + config.samples) * row + cells_operations(operations, traced, config)


def cells_operations(operations: Operations, traced: TracedFact, config: TraceConfig) -> float | int:
    """Operations of all cells of a fact: the rows, positions and layers that a cell can change.

    Between the first restored block, where one token changes, and the last, where the later tokens' keys and values and
    the read tokens are needed, all later tokens change.
    """
    n_layers, tokens, read = operations.shapes.n_layers, len(traced.ids), len(traced.object_ids)
    last, total = n_layers - 1, 0
    positions = restored_positions(traced, config)
    for kind, _, _, span in restored_spans(config, n_layers):
        first = span.start
        for position in positions:
            if can_change(traced, position, first, n_layers):
                changed = tokens - position
                cost = operations.through(range(first, first + 1), 1, before=position) if kind == "attn" else 0
                if first < last:
                    cost += operations.through(range(first + 1, last), changed, before=position)
                    cost += operations.last_block(changed, read, before=position)
                else:
                    cost += read * operations.head
                total += config.samples * cost
    return total


def plan_edit(
    shapes: ModelShapes,
    facts: int,
    layers: Sequence[int],
    prompt: PromptShape | None = None,
    config: TargetConfig | None = None,
    device: str = "cpu",
) -> tuple[Step, Step]:
    """An edit of so many facts: the search for z at the last of the layers, and the spreading over them.

    A search that stops early takes less.

    Args:
        shapes: of the model.
        facts: to write.
        layers: to write into.
        prompt: size of a typical fact.
        config: settings of the search.
        device: type of the device, `cpu` or `cuda`.
    """
    config, prompt, layers = config or TargetConfig(), prompt or PromptShape(), sorted(layers)
    operations = Operations(shapes)
    rows = prompt.search_prompts(config.generated_prefixes, kl=config.kl_weight > 0)
    moments = len(layers) * FLOAT64 * shapes.d_key**2
    total, of_blocks = (
        search_operations(counts, rows, layers[-1], config.updates, prompt.shared(config.generated_prefixes))
        for counts in _with_and_without_head(shapes)
    )
    targets = Step(
        name="targets",
        operations=facts * total,
        head=facts * (total - of_blocks),
        memory=moments + _search_bytes(shapes, rows * min(facts, config.batch_size), layers[-1], config, device),
        disk=facts * 2 * 4 * shapes.d_model,
    )
    stream = facts * sum(row.at + 1 for row in rows if row.labels) * shapes.d_model * shapes.dtype.itemsize
    keys = facts * (config.generated_prefixes + 1) * shapes.d_key * 4 + 6 * FLOAT64 * facts * shapes.d_key
    spreading = Step(
        name="spreading",
        operations=facts * spread_operations(operations, rows, layers),
        solving=len(layers) * (shapes.d_key**3 / 3 + 6 * facts * shapes.d_key**2),
        memory=moments + SYSTEM_COPIES * FLOAT64 * shapes.d_key**2 + stream + keys,
        disk=len(layers) * facts * 4 * (shapes.d_key + shapes.d_model),
    )
    return targets, spreading


def search_operations(
    operations: Operations, rows: Sequence[SearchPrompt], layer: int, updates: int, shared: Mapping[int, int]
) -> int:
    """Operations of one search for z: a clean run, `updates` + 1 evaluations and `updates` gradients.

    A gradient costs what the evaluation of the parts that depend on δ costs; no weight has a gradient.

    Args:
        operations: of the model.
        rows: the prompts.
        layer: after which δ is added.
        updates: of δ.
        shared: tokens that all prompts behind a context template begin with, by its index. They run once for a batch of
            facts, which is not counted.
    """
    last, total = operations.shapes.n_layers - 1, 0
    for row in rows:
        tokens, read = len(row.ids), len(row.scored)
        # Clean, what comes before δ leaves keys and values in all blocks; of KL prompts alone the logits are wanted.
        start = min(shared.get(row.template, 0), row.at)
        total += operations.through(range(last + 1), row.at - start, before=start)
        total += operations.through(range(layer + 1 if row.labels else last + 1), tokens - row.at, before=row.at)
        total += 0 if row.labels else read * operations.head
        total += (2 * updates + 1) * operations.changed(layer, tokens, row.at, read)
    return total


def spread_operations(operations: Operations, rows: Sequence[SearchPrompt], layers: Sequence[int]) -> int:
    """Operations of the keys at some layers, behind every text, and of the states that the residual is left at."""
    first, last, total = layers[0], layers[-1], 0
    for row in rows:
        if not row.labels:
            continue
        tokens = row.at + 1
        # The stream is taken on from layer to layer; each layer's keys come from a run of its block of their own.
        total += operations.through(range(last), tokens)
        total += sum(operations.through(range(layer, layer + 1), tokens) for layer in layers)
        total -= sum(2 * tokens * operations.shapes.blocks[layer].down for layer in layers)
        if row.bare:
            starts = [first, *layers]
            total += sum(operations.through(range(start, last + 1), tokens) for start in starts)
    return total


def _search_bytes(
    shapes: ModelShapes, rows: Sequence[SearchPrompt], layer: int, config: TargetConfig, device: str
) -> int:
    """Bytes of a batch of facts: what the clean run leaves for all rows, and what the passes that run at once need.

    Args:
        shapes: of the model.
        rows: all prompts of the batch.
        layer: after which δ is added.
        config: settings of the search.
        device: type of the device.
    """
    size, before, width = shapes.dtype.itemsize, max(row.at for row in rows), sum(row.width for row in rows)
    later = range(min(layer + 1, shapes.n_layers - 1), shapes.n_layers)
    kv = [2 * block.kv_width for block in shapes.blocks]
    # Keys and values of all tokens before δ, and the inputs of two spans of blocks.
    cached = len(rows) * before * sum(kv[block] for block in later) + 2 * width * shapes.d_model
    kl_logits = sum(not row.labels for row in rows) * shapes.vocab_size * 4
    fraction = min(1.0, config.pass_tokens / width)
    # The clean run has the keys and values of all blocks, and again as they are cut to each row's length.
    preparing = fraction * len(rows) * before * (sum(kv) + sum(kv[block] for block in later))
    saved = fraction * sum(saved_for_gradient(shapes, row, block) for row in rows for block in later)
    block = fraction * width * (HIDDEN_COPIES * shapes.d_model + MLP_COPIES * shapes.d_mlp)
    logits = 3 * 4 * min(fraction * sum(len(row.scored) for row in rows) * shapes.vocab_size, CHUNK[device])
    return int(cached * size + kl_logits + max(preparing * size, (saved + block) * size + logits))


def saved_for_gradient(shapes: ModelShapes, row: SearchPrompt, layer: int) -> int:
    """Numbers that one block of a pass over one row keeps until its gradient has been computed.

    The inputs of its norms, queries, attention's probabilities, what the MLP multiplies and activates, for the tokens
    that δ reaches; and keys and values of these and of all tokens before, which stand together there.
    """
    block, tokens = shapes.blocks[layer], row.width
    keys = min(len(row.ids), tokens - 1 + (block.window or len(row.ids)))
    of_token = block.norms * shapes.d_model + block.heads_width + (3 if block.is_gated else 1) * shapes.d_mlp
    return tokens * (of_token + shapes.n_heads * keys) + 2 * block.kv_width * keys


def in_units(size: float | int) -> str:
    """Bytes as people read them."""
    return f"{size / GIB:.3g} GiB"
