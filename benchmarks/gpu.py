"""Everything that is to be known on a GPU, in one run. It has not been run on one yet.

    python -m benchmarks.gpu [--json PATH] [--out DIR]
    python -m benchmarks.gpu --device cpu --shape small --dtype float32 --edits 8   (without a GPU: that it runs)

On GPT-J's shape in bfloat16, random weights:

- targets, keys, moments and both traces against the published schedule, side by side;
- many edits end to end, extrapolated to ten times as many: the searches and keys in proportion, the solve as measured
  for that number of facts;

and on the tiny model in float32 one full `mechedit run` on the device and one on the CPU, whose selection and scores
must be equal within the tolerances of `run_on_devices.py`. A part that fails does not end the others; the exit code is
1 when a part fails or when the numbers of both schedules or devices differ, and 0 even where a goal of speed is missed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.edit import WEIGHT, BulkEdit, Setting, edit_in_bulk, edit_measurements, made_system
from benchmarks.machine import timed
from benchmarks.measurement import Measurement, summary
from benchmarks.results import add_results
from benchmarks.run_on_devices import difference, run_on
from benchmarks.shapes import ALL_SHAPES, TimedModel, load_shape, with_amounts
from benchmarks.trace import trace_measurements
from mechedit.solve import factorize, ridge_update

STEPS = ("targets", "keys", "moments")
MINUTES_GOAL = 15
"""Most minutes for ten times `--edits`."""
TOLERANCES = {"float32": (1e-4, 1e-5), "bfloat16": (0.1, 0.05)}
"""Largest relative differences of δ and of a score, by dtype; numbers in bfloat16 have eight bits."""


def main() -> int:
    """Run all parts and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="gptj", choices=list(ALL_SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=list(TOLERANCES))
    parser.add_argument("--facts", type=int, default=64, help="facts whose targets are compared")
    parser.add_argument("--updates", type=int, default=10, help="updates of each δ in that comparison")
    parser.add_argument("--edits", type=int, default=1000, help="facts edited end to end")
    parser.add_argument("--texts", type=int, default=500, help="texts of the moments")
    parser.add_argument("--run-facts", type=int, default=50, help="facts that the full run traces")
    parser.add_argument("--run-samples", type=int, default=10, help="noise samples of its trace")
    parser.add_argument("--run-requests", type=int, default=50, help="requests that the full run edits")
    parser.add_argument("--json", type=Path, help="file to add the results to")
    parser.add_argument("--out", type=Path, help="folder for the full runs; by default a temporary one")
    arguments = parser.parse_args()
    script = GpuScript(arguments)
    for part in (script.load, script.steps, script.traces, script.bulk, script.runs):
        script.attempt(part)
    print(summary(script.measurements))
    print(f"{time.perf_counter() - script.begin:.0f} s in all; failed: {', '.join(script.failures) or 'nothing'}")
    return 1 if script.failures else 0


class GpuScript:
    """The parts, in order; what one leaves for the others."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.begin = arguments, time.perf_counter()
        self.measurements: list[Measurement] = []
        self.failures: list[str] = []
        self.timed: TimedModel | None = None

    def attempt(self, part: Callable[[], None]) -> None:
        """Run a part and say how long it took; a failure is reported and does not end the rest."""
        name, begin = part.__name__, time.perf_counter()
        try:
            part()
        except Exception:
            traceback.print_exc()
            self.failures.append(name)
        print(f"[{name}: {time.perf_counter() - begin:.1f} s]", flush=True)

    def load(self) -> None:
        """Make the model."""
        arguments = self.arguments
        timed_model = load_shape(arguments.shape, arguments.device, arguments.dtype, random=True)
        self.timed = with_amounts(
            timed_model, facts=arguments.facts, updates=arguments.updates, texts=arguments.texts, trace_drawn=0.03
        )
        print(f"{self.timed.about}, {arguments.dtype} on {arguments.device}")

    def steps(self) -> None:
        """Targets, keys and moments against the published schedule."""
        for measurement in edit_measurements(self._loaded, STEPS, TOLERANCES[self.arguments.dtype][0]):
            self._add(measurement)

    def traces(self) -> None:
        """Both traces against the published schedule."""
        for measurement in trace_measurements(self._loaded, TOLERANCES[self.arguments.dtype][1]):
            self._add(measurement)

    def bulk(self) -> None:
        """Many edits end to end, and ten times as many by extrapolation."""
        count = self.arguments.edits
        bulk = edit_in_bulk(Setting(self._loaded), count)
        solving = self._solve_seconds(10 * count) * len(self._loaded.early)
        print(bulk_line(bulk, bulk.minutes_for(10 * count, solving), solving), flush=True)

    def runs(self) -> None:
        """The full run on the device and on the CPU."""
        arguments, self.timed = self.arguments, None  # its memory is free for the runs
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.out or Path(temporary)
            for device in dict.fromkeys(("cpu", arguments.device)):
                code = run_on(
                    device,
                    folder / device,
                    facts=arguments.run_facts,
                    samples=arguments.run_samples,
                    requests=arguments.run_requests,
                    texts=arguments.texts,
                )
                assert code == 0, f"mechedit run on {device} ended with {code}"
            compared = difference(folder / "cpu", folder / arguments.device)
        print(f"mechedit run on cpu and {arguments.device}: {compared}", flush=True)
        assert compared.equal, "the devices differ"

    @property
    def _loaded(self) -> TimedModel:
        assert self.timed is not None, "the model was not loaded"
        return self.timed

    def _add(self, measurement: Measurement) -> None:
        print(measurement, flush=True)
        self.measurements.append(measurement)
        if self.arguments.json is not None:
            add_results([measurement], self.arguments.json)
        assert measurement.equal, f"the schedules differ by {measurement.difference}"

    def _solve_seconds(self, facts: int) -> float:
        """Seconds of one layer's solve for so many facts, with its factor at hand."""
        model = self._loaded.model
        moment, keys, residuals = made_system(model.d_mlp, model.d_model, facts, self._loaded.device)
        factor = factorize(moment.double())
        return timed(lambda: ridge_update(keys, residuals, factor, WEIGHT), self._loaded.device)[1]


def bulk_line(bulk: BulkEdit, minutes: float, solving: float) -> str:
    """What many edits took, and ten times as many would take."""
    reached = "reached" if minutes < MINUTES_GOAL else "MISSED"
    return (
        f"{bulk.facts} edits: {bulk.seconds:.1f} s (targets {bulk.targets:.1f}, keys and states {bulk.keys:.1f}, solve "
        f"{bulk.solving:.1f}), {bulk.memory:.1f} GiB; {10 * bulk.facts} edits, with {solving:.1f} s for their solves: "
        f"{minutes:.1f} minutes; goal {MINUTES_GOAL}: {reached}; the new object is the greedy answer for "
        f"{bulk.written[0]:.1%} before and {bulk.written[1]:.1%} after"
    )


if __name__ == "__main__":
    raise SystemExit(main())
