"""The operations that the published schedule computes in a step, and those that are necessary for the same numbers.

Their quotient is the speed that can be won by computing no more than is necessary, at the same rate of operations; more
than that can only come from larger batches and from what surrounds the matrix products. Necessary is what depends on
what is changed, once: a prompt's beginning that other prompts share, or that nothing changes, is run once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mechedit as me
from benchmarks.operations import moment_operations
from mechedit.data import fill
from mechedit.planning import Operations
from mechedit.planning.plan import fact_operations
from mechedit.prefixes import BARE, completed_prompts, prefixed_prompts
from mechedit.prompt_tokens import encode_documents, tokenize_prompt
from mechedit.trace.traced_fact import TracedFact, restored_positions


@dataclass(frozen=True)
class Work:
    """Multiplications and additions of both schedules."""

    published: float
    necessary: float

    @property
    def quotient(self) -> float:
        """How many times more the published schedule computes."""
        return self.published / self.necessary


def targets_work(
    model: me.Model, requests: Sequence[me.EditRequest], layer: int, prefixes: Sequence[str], config: me.TargetConfig
) -> Work:
    """Those of the search for z: `updates` + 1 evaluations and `updates` gradients.

    A gradient costs what the evaluation of the parts that depend on δ costs; no weight has a gradient.
    """
    operations, last = Operations.of(model), model.n_layers - 1
    published = necessary = 0.0
    passes = config.updates + 1, config.updates
    starts: list[Sequence[int]] = []
    for request in requests:
        kl = tokenize_prompt(model.tokenizer, fill(request.turn, config.kl_prompt), request.subject)
        completed = completed_prompts(model, request, prefixes)
        rows = [(*prompt.ids, *target[:-1]) for prompt, target in completed]
        reads = [(prompt.last_subject, len(target)) for prompt, target in completed]
        starts += [*rows, kl.ids]
        longest = max(map(len, [*rows, kl.ids]))
        # The logits of all rows, and those of the object's rows a second time.
        heads = longest * (2 * len(rows) + 1) * operations.head
        forward = (len(rows) + 1) * operations.through(range(last + 1), longest) + heads
        backward = (len(rows) + 1) * operations.through(range(layer + 1, last + 1), longest) + heads
        published += passes[0] * forward + passes[1] * backward
        for ids, (subject, read) in zip([*rows, kl.ids], [*reads, (kl.last_subject, 1)], strict=True):
            necessary += sum(passes) * operations.changed(layer, len(ids), subject, read)
    # What δ leaves as it is, once.
    return Work(published, necessary + sum(_once(operations, range(last), starts)))


def _once(operations: Operations, layers: range, rows: Iterable[Sequence[int]]) -> Iterable[int]:
    """Every different beginning of the rows through some blocks, once."""
    beginnings = {tuple(ids[:end]) for ids in rows for end in range(1, len(ids) + 1)}
    return (operations.through(layers, 1, before=len(ids) - 1) for ids in beginnings)


def keys_work(
    model: me.Model, requests: Sequence[me.EditRequest], layers: Sequence[int], prefixes: Sequence[str], rows: int
) -> Work:
    """Those of the keys at some layers and the states after the last of them; `rows` prompts share a published pass."""
    operations, every = Operations.of(model), range(model.n_layers)
    prompts = [prompt for request in requests for prompt in prefixed_prompts(model, request, prefixes)]
    bare = [prompt for request in requests for prompt in prefixed_prompts(model, request, [BARE])]
    published = 0.0
    for group in (prompts, bare):
        for start in range(0, len(group), rows):
            batch = group[start : start + rows]
            longest = max(len(prompt.ids) for prompt in batch)
            published += len(batch) * (operations.through(every, longest) + longest * operations.head)
    up_to_subject = [prompt.ids[: prompt.last_subject + 1] for prompt in (*prompts, *bare)]
    return Work(len(layers) * published, sum(_once(operations, range(layers[-1] + 1), up_to_subject)))


def moments_work(model: me.Model, texts: Sequence[str], layers: Sequence[int]) -> Work:
    """Those of E[k kᵀ] over texts."""
    lengths = [len(ids) for ids in encode_documents(model.tokenizer, texts, model.max_positions)]
    counted = moment_operations(model, lengths, layers)
    return Work(2 * counted.published, 2 * counted.necessary)


def trace_work(model: me.Model, facts: Sequence[TracedFact], config: me.TraceConfig) -> Work:
    """Those of the clean and the corrupted runs, which both schedules make once, and of all cells.

    A cell of the published schedule is a pass of all its rows. Of those only the rows, positions and layers are
    necessary that the cell can change (`fact_operations`).
    """
    operations, last = Operations.of(model), model.n_layers - 1
    published = necessary = 0.0
    for traced in facts:
        tokens = len(traced.ids)
        n_cells = len(restored_positions(traced, config)) * model.n_layers * len(config.kinds) * len(config.sever)
        row = operations.through(range(last + 1), tokens) + tokens * operations.head
        published += (config.samples + 1) * row * (n_cells + 1)
        necessary += fact_operations(operations, traced, config)
    return Work(published, necessary)
