"""Time three searches and traces on pretrained checkpoints, with all facts of the published schedule's targets.

    python -m benchmarks.checkpoints [--json PATH]

- targets on SmolLM2-135M: 12 facts × 6 prefixes, layer 12, 5 updates;
- targets on Gemma 3 270M: 8 facts × 6 prefixes, layer 9, 5 updates;
- trace on SmolLM2-135M: all tokens of 4 facts, single states and windows of MLPs and attention.

The checkpoints are those of `analyses.real_models.make`; where one is not there, its
shape with random weights takes its place, and the line says so.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable

from benchmarks.command import add_common_arguments, print_measurements
from benchmarks.edit import Setting, targets
from benchmarks.measurement import Measurement
from benchmarks.shapes import TimedModel, load_shape, with_amounts
from benchmarks.trace import WORKLOADS, compare

SEARCHES = {"llama": ("smollm2-135m", 12, 12), "gemma3": ("gemma3-270m", 9, 8)}
"""Name, layer of z and number of facts, by shape."""
TRACED = 4


def checkpoint(shape: str, device: str, dtype: str) -> TimedModel:
    """A checkpoint under its own name, so that its lines do not take the place of the shape's."""
    return dataclasses.replace(load_shape(shape, device, dtype), name=SEARCHES[shape][0])


def measurements(device: str, dtype: str, facts: int | None = None, updates: int = 5) -> Iterable[Measurement]:
    """The three lines.

    Args:
        device: where they run.
        dtype: of the weights.
        facts: how many, in place of those above.
        updates: of each δ.
    """
    for shape, (_, layer, count) in SEARCHES.items():
        timed = checkpoint(shape, device, dtype)
        timed = with_amounts(timed, facts=facts or count, drawn=facts or count, updates=updates)
        yield targets(Setting(timed, layer=layer))
        if shape == "llama":
            yield compare(with_amounts(timed, trace_facts=facts or TRACED), WORKLOADS[0])


def main() -> None:
    """Print the three lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--facts", type=int, help="facts of each line, in place of the numbers above")
    arguments = parser.parse_args()
    print_measurements(measurements(arguments.device, arguments.dtype, arguments.facts), arguments.json)


if __name__ == "__main__":
    main()
