"""What the command lines of the benchmarks share: which shapes, how much of them, and where the results go."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from benchmarks.measurement import Measurement, summary
from benchmarks.results import add_results
from benchmarks.shapes import ALL_SHAPES, SHAPES, TimedModel, load_shape, with_amounts


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all have."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="file to add the results to")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of those that run on any shape."""
    add_common_arguments(parser)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(ALL_SHAPES))
    parser.add_argument("--facts", type=int, help="facts that are edited")
    parser.add_argument("--updates", type=int, help="updates of each δ")
    parser.add_argument("--drawn", type=int, help="facts that the published search takes")
    parser.add_argument("--texts", type=int, help="texts that the moments are timed on")
    parser.add_argument("--trace-facts", type=int, help="facts that are traced")
    parser.add_argument("--trace-drawn", type=float, help="part of the cells, drawn, that the published schedule runs")
    parser.add_argument("--random", action="store_true", help="random weights where a checkpoint is there, too")


def load_shapes(arguments: argparse.Namespace) -> Iterator[TimedModel]:
    """Load the shapes one after another."""
    for name in arguments.shape:
        timed = load_shape(name, arguments.device, arguments.dtype, random=arguments.random)
        print(f"{timed.name}: {timed.about}, {torch.get_num_threads()} threads", flush=True)
        yield with_amounts(
            timed,
            facts=arguments.facts,
            updates=arguments.updates,
            drawn=arguments.drawn,
            texts=arguments.texts,
            trace_facts=arguments.trace_facts,
            trace_drawn=arguments.trace_drawn,
        )


def print_all(arguments: argparse.Namespace, measure: Callable[[TimedModel], Iterable[Measurement]]) -> None:
    """Measure every shape that the command line names."""
    print_measurements((line for timed in load_shapes(arguments) for line in measure(timed)), arguments.json)


def print_measurements(measurements: Iterable[Measurement], file: Path | None = None) -> None:
    """Print and store each line as it comes, then the summary; exit with 1 where numbers differ."""
    lines: list[Measurement] = []
    for measurement in measurements:
        print(measurement, flush=True)
        lines.append(measurement)
        if file is not None:
            add_results([measurement], file)
    print(summary(lines))
    unequal = [f"{line.shape} {line.step}" for line in lines if not line.equal]
    if unequal:
        raise SystemExit(f"the schedules differ: {', '.join(unequal)}")
