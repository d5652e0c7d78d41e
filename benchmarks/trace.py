"""Time causal tracing against the published schedule, side by side, and assert that both give the same numbers.

    python -m benchmarks.trace [--shape tiny gpt2] [--facts N] [--share S] [--memory GIB]

The published schedule is plain transformers with torch hooks: for every cell one forward pass of 11 rows (one
clean, ten corrupted), all layers, all positions, all logits. What it severs is precomputed here, which spares it
the second pass that the published notebook takes; that run, one per fact, counts as part of its time. Shapes: `tiny`
is the model that ships; `gpt2` (12 layers, d 768) and `gptj` (28 layers, d 4096) have random weights.

The schedules take turns, group of facts by group: ours, a drawn share of the group's cells by the published one, ours
again, so that whatever else the machine does slows both. For each workload it prints: cells, milliseconds per cell of
both and their ratio; the largest difference of a score; the rate of the *necessary* operations (of the rows, positions
and layers that a cell can change) as a share of the machine's rate on large matrix products; and the memory that ours
took. The severed trio, with few cells per fact, takes four times as many facts.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import mechedit as me
from benchmarks.machine import Peak, load, matrix_rate, timed
from mechedit.trace import TracePlan, tokenize_fact, window_span
from mechedit.trace.cells import trace_group
from mechedit.trace.corruption import draw_noise
from mechedit.trace.traced_fact import TracedFact

SAMPLES = 10
STD = 0.1


@dataclass(frozen=True)
class Workload:
    """Restored kinds, severings and tokens, and on how many facts."""

    name: str
    kinds: tuple[str, ...]
    sever: tuple[str, ...]
    roles: tuple[str, ...] | None
    times: int
    """More facts than the other workload takes."""


WORKLOADS = (
    Workload("all cells of three kinds", ("state", "mlp", "attn"), ("nothing",), None, 1),
    Workload("severed trio, subject's last token", ("state",), ("nothing", "mlp", "attn"), ("subject_last",), 4),
)
FACTS = {"tiny": 16, "gpt2": 3, "gptj": 3}
SHARES = {"tiny": 0.02, "gpt2": 0.03, "gptj": 0.02}


class PublishedTracing:
    """The published schedule on one fact."""

    def __init__(self, model: me.Model, traced: TracedFact, config: me.TraceConfig):
        self.hf, self.traced = model.hf, traced
        self.blocks = model.hf.transformer.h
        self.ids = torch.tensor([traced.ids], device=model.device).repeat(SAMPLES + 1, 1)
        self.subject = list(traced.subject)
        shape = (SAMPLES, len(traced.subject), model.d_model)
        draws = draw_noise(traced.fact, shape, config.corrupted_by, None, config.seed)
        self.noise = STD * draws.to(model.device, model.dtype)
        self.outputs: dict[tuple[str, int], Tensor] = {}
        with self._hooks([self._noisy(), *self._keeping()]):
            self.corrupted = self._probability(self.hf(self.ids).logits)

    def cell(self, kind: str, sever: str, span: range, position: int) -> float:
        """Mean probability of the object over the noise samples, one state or window put back."""
        hooks = [self._noisy()]
        if sever != "nothing":
            last = self.subject[-1]
            for layer, block in enumerate(self.blocks):
                corrupted = self.outputs[sever, layer][:, last]
                hooks.append((self._module(block, sever), self._writer(last, corrupted)))
        for layer in span:
            clean = self.outputs[kind, layer][:1, position].expand(SAMPLES + 1, -1)
            hooks.append((self._module(self.blocks[layer], kind), self._writer(position, clean)))
        with self._hooks(hooks):
            return self._probability(self.hf(self.ids).logits)

    def _probability(self, logits: Tensor) -> float:
        objects = self.traced.object_ids
        log_probs = logits[1:, self.traced.prompt_length - 1 :].float().log_softmax(-1)
        return log_probs[:, range(len(objects)), list(objects)].sum(1).exp().mean().item()

    def _noisy(self) -> tuple[Any, Callable[..., Any]]:
        def add(module: Any, inputs: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[1:, self.subject] += self.noise
            return output

        return self.hf.transformer.wte, add

    def _keeping(self) -> Iterator[tuple[Any, Callable[..., Any]]]:
        for kind in ("state", "mlp", "attn"):
            for layer, block in enumerate(self.blocks):

                def keep(module: Any, inputs: Any, output: Any, key: tuple[str, int] = (kind, layer)) -> None:
                    self.outputs[key] = (output[0] if isinstance(output, tuple) else output).clone()

                yield self._module(block, kind), keep

    @staticmethod
    def _writer(position: int, values: Tensor) -> Callable[..., Any]:
        def write(module: Any, inputs: Any, output: Any) -> Any:
            written = (output[0] if isinstance(output, tuple) else output).clone()
            written[1:, position] = values[1:]
            return (written, *output[1:]) if isinstance(output, tuple) else written

        return write

    @staticmethod
    def _module(block: Any, kind: str) -> Any:
        return {"state": block, "mlp": block.mlp, "attn": block.attn}[kind]

    @staticmethod
    @contextlib.contextmanager
    def _hooks(hooks: Sequence[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
        handles = [module.register_forward_hook(hook) for module, hook in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def published(
    model: me.Model, facts: Sequence[TracedFact], cells: pd.DataFrame, config: me.TraceConfig, device: str
) -> tuple[pd.DataFrame, float, float]:
    """The cells' scores, one forward pass each; seconds of the runs made once per fact, and seconds of the cells."""
    schedules, before = timed(
        lambda: {traced.fact.id: PublishedTracing(model, traced, config) for traced in facts}, device
    )
    cell_records: list[dict[Any, Any]] = cells.to_dict("records")
    scores, seconds = timed(
        lambda: [
            schedules[cell["fact"]].cell(
                cell["kind"],
                cell["sever"],
                window_span(cell["kind"], cell["layer"], model.n_layers, config.window),
                cell["position"],
            )
            for cell in cell_records
        ],
        device,
    )
    return cells.assign(score=scores), before, seconds


def groups_of(model: me.Model, facts: Sequence[TracedFact], config: me.TraceConfig) -> list[list[TracedFact]]:
    """Facts as `trace_facts` groups them."""
    plan = TracePlan(
        model=model,
        facts=facts,
        dropped=(),
        config=config,
        std=STD,
        statistics=None,
        noise=None,
        parts=None,
        provenance={},
    )
    return list(plan.groups())


def necessary_operations(model: me.Model, facts: Sequence[TracedFact], work: Workload, config: me.TraceConfig) -> float:
    """Multiplications and additions of all activations that a cell can change, and of the logits that are read.

    A block costs 2 · its matrix parameters per token, attention's products with n keys 4·n·d_model. Between the first
    restored block, where one token changes, and the last, where the later tokens' keys and values and the read
    tokens are needed, all later tokens change.
    """
    block = 2 * sum(p.numel() for p in model.hf.transformer.h[0].parameters() if p.ndim == 2)
    unembed = 2 * model.hf.get_output_embeddings().weight.numel()
    last, total = model.n_layers - 1, 0.0
    for traced in facts:
        restored = [p for p, role in enumerate(traced.roles) if work.roles is None or role in work.roles]
        tokens, read = len(traced.ids), len(traced.object_ids)
        for kind in work.kinds:
            for layer in range(model.n_layers):
                first = window_span(kind, layer, model.n_layers, config.window).start
                for position in (p for p in restored if p >= traced.subject.start):
                    if first == last and position < traced.prompt_length - 1:
                        continue
                    changed = tokens - position
                    keys = 4 * model.d_model * (position + changed / 2)
                    cost = read * unembed + (0 if kind == "state" else block)
                    cost += max(last - first - 1, 0) * changed * (block + keys)
                    cost += (first < last) * (changed * 4 * model.d_model**2 + read * (block + keys))
                    total += len(work.sever) * SAMPLES * cost
    return total


@dataclass(kw_only=True)
class TraceComparison:
    """Both schedules' scores on one workload, and their seconds."""

    cells: int = 0
    drawn: int = 0
    """Cells that the published schedule ran too."""
    ours: float = 0.0
    """Seconds of ours, the mean of the two times of every group."""
    quickest: float = 0.0
    """The quicker of the two times of every group."""
    published_runs: float = 0.0
    """Seconds of the published schedule's runs that are made once per fact."""
    published_cells: float = 0.0
    """Seconds of its drawn cells, scaled to all cells of their group."""
    memory: float = 0.0
    """GiB that ours took, of the group that took most."""
    scores: list[pd.DataFrame] = field(default_factory=list)

    def add(self, model: me.Model, group: list[TracedFact], config: me.TraceConfig, drawn_part: float) -> None:
        """Trace a group, then a drawn share of its cells by the published schedule, then the group again."""
        device, keys = str(model.device), ["fact", "kind", "sever", "layer", "position"]
        peak = Peak(device)
        fast, before = timed(lambda: trace_group(model, group, STD, config), device)
        self.memory = max(self.memory, peak.taken())
        drawn_cells = fast.loc[:, keys].sample(n=max(1, round(drawn_part * len(fast))), random_state=0)
        slow, once, part = published(model, group, drawn_cells, config, device)
        after = timed(lambda: trace_group(model, group, STD, config), device)[1]
        joined = fast.merge(slow, on=keys, suffixes=("", "_published"))
        assert len(joined) == len(slow)
        self.cells += len(fast)
        self.drawn += len(slow)
        self.ours += (before + after) / 2
        self.quickest += min(before, after)
        self.published_runs += once
        self.published_cells += part * len(fast) / len(slow)
        self.scores.append(joined)


def compare(
    model: me.Model, facts: Sequence[TracedFact], work: Workload, drawn_part: float, arguments: argparse.Namespace
) -> None:
    """Run both schedules in turn, group by group, print the line and assert equality."""
    config = me.TraceConfig(
        kinds=work.kinds, sever=work.sever, roles=work.roles, samples=SAMPLES, memory=arguments.memory
    )
    trace_group(model, list(facts[:1]), STD, config)
    comparison = TraceComparison()
    for group in groups_of(model, facts, config):
        comparison.add(model, group, config, min(1, work.times * drawn_part))
    scores = pd.concat(comparison.scores)
    # Objects of a random model have tiny probabilities, so the difference is taken relative to them.
    ours, theirs, effects = (scores[name].to_numpy(dtype=float) for name in ("score", "score_published", "effect"))
    error = float(np.abs(ours - theirs).max() / theirs.max())
    largest_effect = float(np.abs(effects).max() / theirs.max())
    rate = necessary_operations(model, facts, work, config) / comparison.quickest
    reached = rate / matrix_rate(arguments.device, arguments.dtype)
    published_seconds = comparison.published_cells + comparison.published_runs
    slow, fast, at_best = (
        1000 * seconds / comparison.cells for seconds in (published_seconds, comparison.ours, comparison.quickest)
    )
    print(
        f"{work.name}: {comparison.cells} cells of {len(facts)} facts; published {slow:.1f} ms per cell "
        f"({comparison.drawn} drawn), mechedit {fast:.2f} (at best {at_best:.2f}): {slow / fast:.1f}x; largest "
        f"difference {error:.1e} of the largest score, largest effect {largest_effect:.1e} of it; necessary "
        f"operations at {reached:.0%} of the rate of matrix products; {comparison.memory:.2f} GiB",
        flush=True,
    )
    assert error < arguments.tolerance, f"the schedules differ by {error}"
    assert largest_effect > 10 * error, "restoring changes nothing, so equality says nothing"


def main() -> None:
    """Compare on every shape and workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["tiny", "gpt2"], choices=["tiny", "gpt2", "gptj"])
    parser.add_argument("--facts", type=int, help="by default what takes about two minutes per shape")
    parser.add_argument("--share", type=float, help="part of the cells, drawn, that the published schedule takes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest difference, of the largest score")
    parser.add_argument("--memory", type=float, help="GiB that a trace may take beside the weights")
    arguments = parser.parse_args()
    for shape in arguments.shape:
        model = load(shape, arguments.device, arguments.dtype)
        print(f"{shape}: {model.n_layers} layers, d {model.d_model}, {torch.get_num_threads()} threads")
        with torch.no_grad():
            for work in WORKLOADS:
                count = work.times * (arguments.facts or FACTS[shape])
                facts = [tokenize_fact(model, fact) for fact in me.load_facts("known")[:count]]
                compare(model, facts, work, arguments.share or SHARES[shape], arguments)


if __name__ == "__main__":
    main()
