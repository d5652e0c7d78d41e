"""MEMIT Appendix B: seconds of each stage of an edit, and of each method, against the number of facts.

    python -m analyses.papers.runtime [--model tiny] [--requests known] [--count 32] [--methods memit,rome] [--quick]

For n = N, N/2, N/4 … of N requests, MEMIT's stages through the functions that it is made of: the search for z
(`find_targets`), and the writing (`spread`), of which the update rule's own seconds are *solve* and the rest, keys and
states recollected layer by layer, *keys*. The second moments are collected once, for any number of facts. Then every
method whole, its search included, from nothing. MEMIT is timed before and after each of them, for its ratio: machines
are noisy. Timings of another machine are not taken over. Writes:

- `runtime.parquet`: facts, method, stage, seconds, cpu (of this process, all threads), memit (seconds of the MEMIT runs
  beside it), and the machine: processor, threads, torch, device, dtype;
- `runtime.csv`: one row per stage or method: seconds at the largest n, CPU seconds, seconds per fact, the exponent of n
  (slope of log seconds against log n; of CPU seconds too, which others' work beside it disturbs less), and the ratio
  to MEMIT; then the paper's rows;
- `runtime.pdf`, `.png`.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from analyses.common.beside import paper_name, with_paper
from analyses.common.command import open_experiment, options, run_script
from analyses.common.experiment import Experiment
from analyses.common.frames import groups_of
from analyses.common.variants import Variant, by_name
from benchmarks.machine import wait
from mechedit.data import EditRequest
from mechedit.figures import PAGE_WIDTH, legend_above, line_styles, number_axis, paper_style
from mechedit.methods import METHODS, MemitConfig, UpdateRule
from mechedit.methods.spread import spread
from mechedit.moments import collect_moments
from mechedit.published import published_table
from mechedit.solve import Update
from mechedit.tables import where
from mechedit.targets import find_targets

Result = TypeVar("Result")
STAGES = ("search", "keys", "solve", "total")
MOMENTS = "second moments"
QUICK_METHODS = ("memit", "rome", "ft")


def main(arguments: Sequence[str] | None = None) -> int:
    """Time, fit, draw, write."""
    parser = options(__doc__, count=32, quick_count=4)
    parser.add_argument("--methods", help="such as memit,rome@5,ft (default: all; some with --quick)")
    experiment = open_experiment("runtime", parser, arguments)
    variants = by_name(experiment.requested_variants(lambda: QUICK_METHODS if experiment.quick else experiment.methods))
    table = timed(experiment, variants, halvings(len(experiment.requests)))
    experiment.write(table, with_paper(format_table(table), paper_seconds()), runtime_figure(table))
    print(f"on {', '.join(str(value) for value in machine(experiment).values())}")
    return 0


def halvings(most: int) -> list[int]:
    """N, N/2, N/4 … down to 2 facts or to five numbers, ascending."""
    counts = [most // 2**i for i in range(5)]
    return sorted({count for count in counts if count >= 2} or {most})


def timed(experiment: Experiment, variants: Mapping[str, Variant], counts: Sequence[int]) -> pd.DataFrame:
    """Seconds of every stage and method; timings of this machine that lie in the folder are read."""
    about = machine(experiment)
    reference = experiment.variants(["memit"])[0]
    moments = experiment.moments(
        sorted({layer for variant in (reference, *variants.values()) for layer in variant.layers})
    )
    for layer in reference.layers:
        _ = moments[layer].factor  # made once, for any number of facts; else the first solve has it

    def cached(what: str, count: int, variant: Variant, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        requests = experiment.requests[:count]
        key = {**experiment.key(requests), **experiment.variant_key(variant), "what": what, "machine": about}
        return experiment.cached("runtime", key, make)

    frames = [cached("moments", 0, reference, partial(moments_seconds, experiment, reference))]
    for count in tqdm(counts, desc="runtime", unit="size"):
        requests = experiment.requests[:count]
        frames.append(cached("stages", count, reference, partial(stage_seconds, experiment, reference, requests)))
        for name, variant in variants.items():
            make = partial(method_seconds, experiment, variant, reference, requests)
            frames.append(cached("method", count, variant, make).assign(method=name))
    return pd.concat(frames, ignore_index=True).assign(**about)


def machine(experiment: Experiment) -> dict[str, Any]:
    """The machine, its software and the precision: all that the seconds depend on besides the work."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": str(experiment.model.device),
        "dtype": str(experiment.model.dtype).removeprefix("torch."),
    }


def processor() -> str:
    """The processor's name, or the accelerator's where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass
class Clock:
    """Seconds of the blocks `with clock.running(name)`, by name."""

    device: str
    seconds: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def running(self, name: str):
        """Add what the block takes; an accelerator is waited for."""
        wait(self.device)
        begin, begin_cpu = time.perf_counter(), time.process_time()
        yield
        wait(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - begin_cpu

    def take(self, name: str, make: Callable[[], Result]) -> Result:
        """The result of a call, its seconds added."""
        with self.running(name):
            return make()


@dataclass(frozen=True, kw_only=True)
class TimedRule:
    """An update rule whose own seconds are counted as `solve`."""

    rule: UpdateRule
    clock: Clock

    def update(self, layer: int, keys: Float[Tensor, "d_mlp fact"], residuals: Float[Tensor, "d_model fact"]) -> Update:
        """The rule's own update; its seconds are counted."""
        return self.clock.take("solve", lambda: self.rule.update(layer, keys, residuals))


def moments_seconds(experiment: Experiment, variant: Variant) -> pd.DataFrame:
    """Seconds of E[k kᵀ] over the text, all layers in one pass; nothing is read from the folder."""
    clock = Clock(device=str(experiment.model.device))
    layers = sorted(variant.layers)
    clock.take(
        MOMENTS, lambda: collect_moments(experiment.model, experiment.arguments.texts, layers, experiment.reading)
    )
    return rows(clock, 0, "memit")


def stage_seconds(experiment: Experiment, variant: Variant, requests: Sequence[EditRequest]) -> pd.DataFrame:
    """Seconds of MEMIT's search, keys and solve, and of all of it."""
    model, config, clock = experiment.model, experiment.config(variant), Clock(device=str(experiment.model.device))
    assert isinstance(config, MemitConfig)
    layers, layer = list(variant.layers), config.target_layer(variant.layers)
    rule = TimedRule(rule=config.rule(experiment.moments(layers), {}), clock=clock)
    with clock.running("total"):
        targets = clock.take("search", lambda: find_targets(model, requests, layer, config=config.targets))
        clock.take("write", lambda: spread(model, requests, targets, layers, rule, config=config.spread))
    for seconds in (clock.seconds, clock.cpu):
        seconds["keys"] = seconds.pop("write") - seconds["solve"]
    return rows(clock, len(requests), "memit").set_index("stage").loc[list(STAGES)].reset_index()


def method_seconds(
    experiment: Experiment, variant: Variant, reference: Variant, requests: Sequence[EditRequest]
) -> pd.DataFrame:
    """Seconds of a method, and the mean of MEMIT's just before and just after it."""
    clock = Clock(device=str(experiment.model.device))
    for name, timed_variant in (("memit", reference), ("whole", variant), ("memit", reference)):
        clock.take(name, partial(make_edit, experiment, timed_variant, requests))
    table = where(rows(clock, len(requests), variant.method), stage="whole")
    return table.assign(memit=clock.seconds["memit"] / 2)


def make_edit(experiment: Experiment, variant: Variant, requests: Sequence[EditRequest]) -> None:
    """One edit from nothing: targets of earlier edits are not used."""
    moments = experiment.moments(variant.layers)
    METHODS[variant.method](
        experiment.model, requests, list(variant.layers), moments, config=experiment.config(variant)
    )


def rows(clock: Clock, count: int, method: str) -> pd.DataFrame:
    """One row per stage."""
    return pd.DataFrame(
        [
            {"facts": count, "method": method, "stage": stage, "seconds": seconds, "cpu": clock.cpu[stage]}
            for stage, seconds in clock.seconds.items()
        ]
    ).assign(memit=np.nan)


def exponent(seconds_by_facts: pd.DataFrame, of: str = "seconds") -> float:
    """The power b in seconds = a·n^b, by least squares in logarithms; NaN with less than two numbers of facts."""
    if len(set(seconds_by_facts["facts"])) < 2:
        return np.nan
    return float(np.polyfit(np.log(seconds_by_facts["facts"]), np.log(seconds_by_facts[of]), 1)[0])


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per stage, then one row per method."""
    lines = []
    for (stage, method), group in groups_of(table, ["stage", "method"]):
        last = group.loc[group["facts"].idxmax(), :]
        name = f"memit: {stage}" if stage in STAGES else MOMENTS if stage == MOMENTS else str(method)
        count = int(last["facts"])
        lines.append(
            {
                "what": name,
                "facts": count or "any",
                "seconds": round(float(last["seconds"]), 2),
                "cpu": round(float(last["cpu"]), 2),
                "a fact": round(float(last["seconds"]) / count, 4) if count else "",
                **{
                    name: "" if np.isnan(power := exponent(group, of)) else f"{power:.2f}"
                    for name, of in (("exponent", "seconds"), ("cpu exponent", "cpu"))
                },
                "of memit": "" if pd.isna(last["memit"]) else f"{last['seconds'] / last['memit']:.2f}",
            }
        )
    return pd.DataFrame(lines)


def paper_seconds() -> pd.DataFrame:
    """The paper's rows, of 10,000 edits of GPT-J on an A6000: MEMIT's two stages, and the methods whole."""
    table = published_table("memit_seconds")
    memit = float(np.sum(where(table, method="memit")["seconds"].to_numpy(dtype=float)))
    total = pd.DataFrame([{**where(table, method="memit").iloc[0].to_dict(), "stage": "whole", "seconds": memit}])
    rows = pd.concat([table, total], ignore_index=True).to_dict("records")
    return pd.DataFrame(
        {
            "what": paper_name(f"memit: {row['stage']}" if row["stage"] != "whole" else row["method"], row["model"]),
            "facts": row["edits"],
            "seconds": round(row["seconds"], 2),
            "a fact": round(row["seconds"] / row["edits"], 4),
            "of memit": f"{row['seconds'] / memit:.2f}",
        }
        for row in rows
    )


def runtime_figure(table: pd.DataFrame) -> Figure:
    """Seconds against facts, both logarithmic: MEMIT's stages on the left, the methods on the right."""
    stages = table.loc[table["stage"].isin(STAGES), :]
    methods = where(table, stage="whole")
    with paper_style():
        figure = Figure(figsize=(PAGE_WIDTH, 2.6))
        stage_axes, method_axes = figure.subplots(1, 2, sharey=True)
        plot_seconds(stages, stage_axes, "stage").set(ylabel="seconds", xlabel="facts edited at once: memit by stages")
        (once,) = where(table, stage=MOMENTS)["seconds"]
        stage_axes.axhline(once, color="#8C8C8C", linestyle="--", linewidth=0.8, label=f"{MOMENTS} (once)")
        legend_above(stage_axes, columns=3)
        plot_seconds(methods, method_axes, "method").set_xlabel("facts edited at once: whole methods")
        legend_above(method_axes, columns=4)
    return figure


def plot_seconds(table: pd.DataFrame, ax: Axes, hue: str) -> Axes:
    """One line per stage or method."""
    names = list(dict.fromkeys(table[hue]))
    for name, style in line_styles(names).items():
        seconds = where(table, **{hue: name}).sort_values("facts")
        ax.plot(seconds["facts"], seconds["seconds"], label=name, markersize=3, markeredgewidth=0, **style)
    ax.set_yscale("log")
    return number_axis(ax, pd.Series(table["facts"]))


if __name__ == "__main__":
    run_script(main)
