"""Time causal tracing against the published schedule, side by side, and assert that both give the same numbers.

    python -m benchmarks.trace [--shape tiny gpt2 ...] [--trace-facts N] [--trace-drawn PART] [--memory GIB]

The published schedule is that of `published_tracing.py`; its run that is made once per fact counts as part of its time.
Shapes are those of `shapes.py`. Steps:

- trace: every cell of single states and of windows of MLP and attention outputs;
- severed trio: the subject's last token, with nothing, MLPs and attention severed; it takes three times as many facts.

Group of facts by group, ours runs between two halves of the drawn cells of the published schedule, so that whatever
else the machine does slows both. Each line has the milliseconds per cell of both and their ratio, that of the
operations, the rate of the *necessary* ones (of the rows, positions and layers that a cell can change) as a share of
the machine's rate on large matrix products, the largest difference of a score relative to the largest score, and the
memory that each took.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

import mechedit as me
from benchmarks.command import add_arguments, print_all
from benchmarks.facts import traced_facts
from benchmarks.machine import matrix_rate, timed
from benchmarks.measurement import Measurement
from benchmarks.necessary_work import trace_work
from benchmarks.plain_model import PlainModel
from benchmarks.published_tracing import PublishedTracing
from benchmarks.shapes import TimedModel
from benchmarks.side_by_side import side_by_side
from mechedit.trace import TracePlan, window_span
from mechedit.trace.cells import trace_group
from mechedit.trace.corruption import embedding_statistics
from mechedit.trace.traced_fact import TracedFact

SAMPLES = 10
TOLERANCE = 1e-5
"""Largest difference of a score in float32, relative to the largest."""
KEYS = ["fact", "kind", "sever", "layer", "position"]


@dataclass(frozen=True)
class Workload:
    """Restored kinds, severings and tokens, and on how many facts."""

    step: str
    kinds: tuple[str, ...]
    sever: tuple[str, ...]
    roles: tuple[str, ...] | None
    times: int
    """More facts than the other workload takes."""


WORKLOADS = (
    Workload("trace", ("state", "mlp", "attn"), ("nothing",), None, 1),
    Workload("severed trio", ("state",), ("nothing", "mlp", "attn"), ("subject_last",), 3),
)


@dataclass(kw_only=True)
class TraceComparison:
    """Both schedules' scores on one workload, and their seconds."""

    cells: int = 0
    drawn: int = 0
    """Cells that the published schedule ran too."""
    seconds: float = 0.0
    """Of ours."""
    published_runs: float = 0.0
    """Seconds of the published schedule's runs that are made once per fact."""
    published_cells: float = 0.0
    """Seconds of its drawn cells, scaled to all cells of their group."""
    memory: tuple[float, float] = (0.0, 0.0)
    """GiB that the published schedule and ours took, of the group that took most."""
    scores: list[pd.DataFrame] = field(default_factory=list)

    @property
    def published(self) -> float:
        """Seconds of the published schedule on all cells."""
        return self.published_runs + self.published_cells

    @property
    def errors(self) -> tuple[float, float, float]:
        """The largest difference of a score, of a published one from float64, and the largest effect.

        Each is relative to the largest score.
        """
        frame = pd.concat(self.scores)
        ours, theirs, reference, effects = (
            frame[name].to_numpy(dtype=float) for name in ("score", "score_published", "reference", "effect")
        )
        largest = reference.max()
        return (
            float(np.abs(ours - reference).max() / largest),
            float(np.abs(theirs - reference).max() / largest),
            float(np.abs(effects).max() / largest),
        )

    @property
    def held(self) -> int:
        """Cells that were held against float64."""
        frame = pd.concat(self.scores)
        return int(np.count_nonzero(frame["reference"].to_numpy() != frame["score_published"].to_numpy()))

    def add(
        self,
        timed_model: TimedModel,
        group: list[TracedFact],
        config: me.TraceConfig,
        std: float,
        drawn_part: float,
        tolerance: float,
    ) -> None:
        """Trace a group between two halves of a drawn part of its cells by the published schedule.

        Scores that differ by more than the tolerance, of the largest, are held against that schedule in float64.
        """
        model, device = timed_model.model, timed_model.device
        cells = group_cells(model, group, config)
        drawn = cells.sample(n=min(len(cells), max(2, round(drawn_part * len(cells)))), random_state=0)
        schedules, once = timed(
            lambda: {traced.fact.id: PublishedTracing(model, traced, config, std) for traced in group}, device
        )
        records: list[dict[Any, Any]] = drawn.to_dict("records")
        compared = side_by_side(
            lambda: trace_group(model, group, std, config),
            [partial(_published_score, schedules[cell["fact"]], cell, model.n_layers, config) for cell in records],
            device,
            drawn_part=len(drawn) / len(cells),
        )
        joined = compared.ours.merge(
            drawn.assign(score=compared.published), on=KEYS, suffixes=("", "_published"), validate="one_to_one"
        )
        assert (len(joined), len(compared.ours)) == (len(drawn), len(cells))
        self.cells += len(cells)
        self.drawn += len(drawn)
        self.seconds += compared.seconds
        self.published_runs += once
        self.published_cells += compared.published_seconds
        self.memory = (max(self.memory[0], compared.memory[0]), max(self.memory[1], compared.memory[1]))
        joined["reference"] = references(model, group, joined, config, std, tolerance)
        self.scores.append(joined)


def _published_score(schedule: PublishedTracing, cell: dict[Any, Any], n_layers: int, config: me.TraceConfig) -> float:
    span = window_span(cell["kind"], cell["layer"], n_layers, config.window)
    return schedule.cell(cell["kind"], cell["sever"], span, cell["position"])


def references(
    model: me.Model,
    group: Sequence[TracedFact],
    scores: pd.DataFrame,
    config: me.TraceConfig,
    std: float,
    tolerance: float,
) -> list[float]:
    """What each score is held against: the published one, in float64 where the two differ by more than the tolerance.

    Both round, over large vocabularies by more than the tolerance, and float64 says who is right.
    """
    cells: list[dict[Any, Any]] = scores.to_dict("records")
    largest = max(cell["score_published"] for cell in cells)
    differ = {
        index: cell
        for index, cell in enumerate(cells)
        if abs(cell["score"] - cell["score_published"]) > tolerance * largest
    }
    exact: dict[int, float] = {}
    if differ and model.dtype == torch.float32:
        with PlainModel(model).in_float64():
            for traced in group:
                of_fact = {index: cell for index, cell in differ.items() if cell["fact"] == traced.fact.id}
                if of_fact:
                    schedule = PublishedTracing(model, traced, config, std)
                    exact |= {
                        i: _published_score(schedule, cell, model.n_layers, config) for i, cell in of_fact.items()
                    }
    return [exact[i] if i in exact else float(cell["score_published"]) for i, cell in enumerate(cells)]


def group_cells(model: me.Model, group: Sequence[TracedFact], config: me.TraceConfig) -> pd.DataFrame:
    """The cells of a group of facts."""
    rows = [
        (traced.fact.id, kind, sever, layer, position)
        for traced in group
        for kind in config.kinds
        for sever in config.sever
        for layer in range(model.n_layers)
        for position, role in enumerate(traced.roles)
        if config.roles is None or role in config.roles
    ]
    return pd.DataFrame(rows, columns=KEYS)


def groups_of(model: me.Model, facts: Sequence[TracedFact], config: me.TraceConfig) -> list[list[TracedFact]]:
    """Facts as `trace_facts` groups them."""
    plan = TracePlan(
        model=model,
        facts=facts,
        dropped=(),
        config=config,
        std=0.0,
        statistics=None,
        noise=None,
        parts=None,
        provenance={},
    )
    return list(plan.groups())


@torch.no_grad()
def compare(
    timed_model: TimedModel, work: Workload, tolerance: float = TOLERANCE, memory: float | None = None
) -> Measurement:
    """Run both schedules in turn, group by group."""
    model, amounts = timed_model.model, timed_model.shape.amounts
    facts = traced_facts(timed_model, work.times * amounts.trace_facts)
    config = me.TraceConfig(kinds=work.kinds, sever=work.sever, roles=work.roles, samples=SAMPLES, memory=memory)
    std = config.noise * embedding_statistics(model, [traced.fact.subject for traced in facts]).std
    # The same code on little work, so that neither side pays for what happens once.
    trace_group(model, list(facts[:1]), std, me.TraceConfig(kinds=work.kinds, roles=("last",), samples=1))
    comparison = TraceComparison()
    for group in groups_of(model, facts, config):
        comparison.add(timed_model, group, config, std, min(1, work.times * amounts.trace_drawn), tolerance)
    error, rounding, largest_effect = comparison.errors
    assert largest_effect > 10 * error, "restoring changes nothing, so equality says nothing"
    counted = trace_work(model, facts, config)
    per_cell = 1000 / comparison.cells
    lengths = sorted({len(traced.ids) for traced in facts})
    return Measurement(
        shape=timed_model.name,
        about=timed_model.about,
        step=work.step,
        what=f"{len(facts)} facts of {' and '.join(map(str, lengths[:: max(1, len(lengths) - 1)]))} tokens, "
        f"{comparison.cells} cells, {comparison.drawn} published"
        + (f"; {comparison.held} held against float64" if comparison.held else ""),
        unit="ms a cell",
        published=per_cell * comparison.published,
        mechedit=per_cell * comparison.seconds,
        difference=error,
        rounding=rounding,
        tolerance=tolerance,
        quotient=counted.quotient,
        rate=counted.necessary / comparison.seconds / matrix_rate(timed_model.device, timed_model.dtype),
        memory=comparison.memory,
        device=timed_model.device,
        dtype=timed_model.dtype,
        threads=torch.get_num_threads(),
    )


def trace_measurements(
    timed_model: TimedModel, tolerance: float = TOLERANCE, memory: float | None = None
) -> Iterator[Measurement]:
    """Both workloads on a model."""
    for work in WORKLOADS:
        yield compare(timed_model, work, tolerance, memory)


def main() -> None:
    """Both workloads on shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest difference, of the largest score")
    parser.add_argument("--memory", type=float, help="GiB that a trace may take beside the weights")
    arguments = parser.parse_args()
    print_all(arguments, lambda timed_model: trace_measurements(timed_model, arguments.tolerance, arguments.memory))


if __name__ == "__main__":
    main()
