"""Where the time of our steps goes on one thread: in matrix products, attention, other operations, and between them.

    python -m benchmarks.one_thread --shape tiny --steps trace 'severed trio' targets moments

It shows what keeps a step from a share of the machine's rate: each line ends with the rate at which its necessary
operations would run if nothing but the products took time. Several threads at once only add waiting.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

import mechedit as me
from benchmarks.command import add_arguments, load_shapes
from benchmarks.edit import Setting, target_config
from benchmarks.facts import traced_facts
from benchmarks.machine import matrix_rate, timed
from benchmarks.necessary_work import Work, moments_work, targets_work, trace_work
from benchmarks.shapes import TimedModel
from benchmarks.trace import SAMPLES, WORKLOADS, Workload, groups_of
from mechedit.trace.cells import trace_group
from mechedit.trace.corruption import embedding_statistics

PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::dot", "aten::mv")
ATTENTION = "scaled_dot_product"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Seconds of a step on one thread, and where they went."""

    seconds: float
    products: float
    attention: float
    others: float
    """Of all other operations."""
    rate: float
    """Share of one thread's rate on large matrices at which the necessary operations ran."""

    def __str__(self) -> str:
        between = max(0.0, self.seconds - self.products - self.attention - self.others)
        shares = [part / self.seconds for part in (self.products, self.attention, self.others, between)]
        return (
            f"{self.seconds:.1f} s: products {shares[0]:.0%}, attention {shares[1]:.0%}, other operations "
            f"{shares[2]:.0%}, between operations {shares[3]:.0%}; necessary operations at {self.rate:.0%} of the "
            f"rate, {self.rate / shares[0]:.0%} if products took all of the time"
        )


def parts_of(run: Callable[[], object], work: Work) -> Parts:
    """Run a step three times: to warm up, for its seconds, and under a profiler, where small operations last longer."""
    run()
    _, seconds = timed(run, "cpu")
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    by_name = {event.key: event.self_cpu_time_total / 1e6 for event in profiled.key_averages()}
    products = sum(by_name.get(name, 0.0) for name in PRODUCTS)
    attention = sum(value for name, value in by_name.items() if ATTENTION in name)
    rate = work.necessary / seconds / matrix_rate("cpu", "float32")
    others = sum(by_name.values()) - products - attention
    return Parts(seconds=seconds, products=products, attention=attention, others=others, rate=rate)


@torch.no_grad()
def trace_parts(timed_model: TimedModel, workload: Workload) -> Parts:
    """Parts of a trace."""
    model = timed_model.model
    facts = traced_facts(timed_model, workload.times * timed_model.shape.amounts.trace_facts)
    config = me.TraceConfig(kinds=workload.kinds, sever=workload.sever, roles=workload.roles, samples=SAMPLES)
    std = config.noise * embedding_statistics(model, [traced.fact.subject for traced in facts]).std
    groups = groups_of(model, facts, config)
    return parts_of(
        lambda: [trace_group(model, group, std, config) for group in groups], trace_work(model, facts, config)
    )


def target_parts(setting: Setting) -> Parts:
    """Parts of a search for z."""
    model, facts, layer = setting.model, setting.requests, setting.target
    config = target_config(setting.amounts.updates)
    return parts_of(
        partial(me.find_targets, model, facts, layer, setting.prefixes, config),
        targets_work(model, facts, layer, setting.prefixes, config),
    )


def moments_parts(setting: Setting, *, late: bool) -> Parts:
    """Parts of a pass over the text."""
    layers = list(setting.timed.late if late else setting.timed.early)
    return parts_of(
        partial(me.collect_moments, setting.model, setting.texts, layers),
        moments_work(setting.model, setting.texts, layers),
    )


def main() -> None:
    """Measure the steps that the command line names."""
    steps: dict[str, Callable[[TimedModel], Parts]] = {
        **{work.step: partial(trace_parts, workload=work) for work in WORKLOADS},
        "targets": lambda timed_model: target_parts(Setting(timed_model)),
        "moments": lambda timed_model: moments_parts(Setting(timed_model), late=False),
        "late moments": lambda timed_model: moments_parts(Setting(timed_model), late=True),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--steps", nargs="+", default=list(steps), choices=list(steps))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for timed_model in load_shapes(arguments):
        for step in arguments.steps:
            print(f"{timed_model.name}, {step}: {steps[step](timed_model)}", flush=True)


if __name__ == "__main__":
    main()
