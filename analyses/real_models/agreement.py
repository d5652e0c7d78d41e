"""Hold approximate effects against exact ones, and their times against each other.

    python -m analyses.real_models.agreement MODEL [--facts known_1000] [--count 30] [--cells 100] [--points 1,2]
    python -m analyses.real_models.agreement MODEL --time 3

MODEL is smollm2, gemma3, tiny, or a folder. The first form prints a row per kind, severing and number of gradient
points, on cells drawn from all facts; states are also traced with modules severed, at the subject's last token. The
second form traces a few facts exactly and about eight times as many approximately, all tokens, layers and kinds, and
prints seconds per fact, as they are in a trace of a thousand facts: in groups of a trace of all known facts of the
file, drawn at random; cells that are drawn are a fixed number, and their share of a fact is added.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import torch

import mechedit as me
from analyses.common.command import run_script
from analyses.real_models.make import REAL_MODELS, make
from mechedit.statistics import spearman
from mechedit.trace import Approximation, TracePlan, plan_trace
from mechedit.trace.approximate import approximate_group, draw_for, key_of
from mechedit.trace.approximation import DrawnCells
from mechedit.trace.attribution import estimate_cells
from mechedit.trace.cells import all_cells, can_change, corrupted_scores, trace_cells, trace_group
from mechedit.trace.runs import run_clean_and_corrupted
from mechedit.trace.traced_fact import TracedFact, restored_positions

KINDS = ("state", "mlp", "attn")
GROUPS = [(kind, "nothing") for kind in KINDS]
OF_FACTS = 1000
"""Facts of the trace whose times are told."""
MORE = 8
"""Facts traced approximately for each that is traced exactly, about."""


def known(model: me.Model, source: str, config: me.TraceConfig, count: int | None = None) -> TracePlan:
    """A plan for some known facts, the first of a seeded order, or for all."""
    facts = me.load_facts(source)
    random.Random(0).shuffle(facts)
    plan = plan_trace(model, facts if count is None else facts[: 8 * count], config)  # small models know one in five
    return dataclasses.replace(plan, facts=plan.facts[:count])


@torch.no_grad()
def agreement(plan: TracePlan, points: tuple[int, ...]) -> Iterator[str]:
    """Rows of the table: estimates with each number of points against the same exact effects."""
    config, model = plan.config, plan.model
    drawn = draw_for(plan.facts, config, model.n_layers)
    pairs: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for group in plan.groups():
        runs = run_clean_and_corrupted(model, group, plan.std, config, None, plan.statistics)
        changing = [
            cell for cell in all_cells(runs) if can_change(group[cell.fact], cell.position, cell.first, model.n_layers)
        ]
        cells = [cell for cell in changing if key_of(cell) in drawn[group[cell.fact].fact.id].cells]
        exact, corrupted = trace_cells(runs, cells), corrupted_scores(runs)
        for number in points:
            estimates = estimate_cells(runs, cells, number)
            for cell in cells:
                base = corrupted[cell.fact]["probability"]
                pair = (estimates[cell]["probability"] - base, exact[cell]["probability"] - base)
                pairs.setdefault((cell.kind, cell.sever, number), []).append(pair)
    for (kind, sever, number), values in pairs.items():
        estimate, effect = np.array(values).T
        miss = 100 * np.abs(estimate - effect)
        correlation = spearman(estimate[None], effect[None])[0]
        yield (
            f"| {kind} | {sever} | {number} | {len(values)} | {correlation:.2f} | {100 * np.abs(effect).mean():.2f} | "
            f"{miss.mean():.2f} | {miss.max():.1f} |"
        )


def seconds_per_fact(plan: TracePlan, count: int) -> str:
    """Exact traces of so many facts, between two halves of approximate ones."""
    approximation = plan.config.approximation
    assert approximation is not None
    nothing = DrawnCells(cells=frozenset(), fact=False, cell_chances=dict.fromkeys(GROUPS, 0.0), fact_chance=0.0)
    settings = (plan.std, plan.config, None, plan.statistics)
    groups = some_groups(plan, MORE * count)
    facts = [traced for group in groups for traced in group]
    middle = (len(groups) + 1) // 2
    exact = approximate = cells = 0.0
    for half in (groups[:middle], None, groups[middle:]):
        start = time.monotonic()
        if half is None:
            cells = sum(len(trace_group(plan.model, [traced], *settings)) for traced in plan.facts[:count])
            exact = time.monotonic() - start
            continue
        for group in half:
            approximate_group(plan.model, group, *settings, {traced.fact.id: nothing for traced in group})
        approximate += time.monotonic() - start
    # Facts differ in length: what was traced exactly stands for all by its cells.
    every = sum(len(KINDS) * plan.model.n_layers * len(restored_positions(traced, plan.config)) for traced in facts)
    per_exact, per_approximate = exact / cells * every / len(facts), approximate / len(facts)
    at_last_token = len(GROUPS) * plan.model.n_layers
    drawn = (len(GROUPS) * approximation.exact_cells + at_last_token * approximation.exact_facts) / OF_FACTS
    of_drawn = drawn * exact / cells
    settings_used = f"{plan.config.samples} samples, points {approximation.points}"
    return (
        f"{count} facts of {cells / count:.0f} cells exactly, "
        f"{len(facts)} of {len(plan.facts)} in {len(groups)} groups approximately, {settings_used}: "
        f"exact {per_exact:.3g} s a fact, approximate {per_approximate:.3g} s and {of_drawn:.3g} s for drawn cells, "
        f"ratio {per_exact / (per_approximate + of_drawn):.0f}"
    )


def some_groups(plan: TracePlan, count: int) -> list[list[TracedFact]]:
    """Groups of a trace in a seeded order, until they hold so many facts."""
    groups = list(plan.groups())
    random.Random(0).shuffle(groups)
    before = accumulate(map(len, groups), initial=0)
    return [group for group, earlier in zip(groups, before, strict=False) if earlier < count]


def main() -> int:
    """Print the table, or the times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--facts", default="known_1000", help="known, known_1000, or a file of facts")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--points", default="1,2")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--time", type=int, default=0, help="trace so many facts both ways")
    options = parser.parse_args()
    model = me.load_model(make(options.model) if options.model in REAL_MODELS else options.model, device="cpu")
    points = tuple(map(int, options.points.split(",")))
    if options.time:
        for number in points:
            approximation = Approximation(points=number, least_correlation=0)
            config = me.TraceConfig(kinds=KINDS, samples=options.samples, approximation=approximation)
            plan = known(model, options.facts, config)
            print(seconds_per_fact(plan, options.time), flush=True)
        return 0
    unsevered = me.TraceConfig(
        kinds=KINDS, samples=options.samples, approximation=Approximation(exact_cells=options.cells)
    )
    severed = dataclasses.replace(unsevered, kinds=("state",), sever=("mlp", "attn"), roles=("subject_last",))
    print("| kind | severed | points | cells | rank correlation | mean effect, % | mean miss, % | largest miss, % |")
    print("|---|---|---|---|---|---|---|---|")
    for config in (unsevered, severed):
        for row in agreement(known(model, options.facts, config, options.count), points):
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
