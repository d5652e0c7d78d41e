"""The results as a page of the documentation.

    python -m benchmarks.page

Writes `docs/reference/speed.md` from `results.json` beside this file, which `python -m benchmarks --json` fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.measurement import MOMENTS_GOAL, MOMENTS_RATE, RATE_GOAL, RATIO_GOALS, Measurement
from benchmarks.results import Result, read_results

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "speed.md"


def page(results: Sequence[Result]) -> str:
    """The page."""
    goals = RATIO_GOALS["cpu"]
    judged = [result.measurement for result in results if result.measurement.reached is not None]
    reached = sum(bool(measurement.reached) for measurement in judged)
    rows = "\n".join(map(_row, results))
    models = "\n".join(f"| `{shape}` | {about} |" for shape, about in _models(results).items())
    origins = "\n".join(
        dict.fromkeys(f"- `{result.command}` at {result.commit}, {result.machine}" for result in results)
    )
    return f"""# Speed

Each step beside the published schedule: what the code published with ROME and MEMIT does, in plain transformers with
hooks, on any family (`benchmarks/published.py`, `benchmarks/published_tracing.py`). Both run in one process, ours
between two halves of the published work, and give the same numbers: the table has the largest relative difference. A z
or a score that differs by more than the tolerance is held against the published schedule in float64, from which it may
be no further than the published one in float32 is.

- The published *search for z* takes a fact at a time, with full passes forward and backward and the logits of all
  positions, twice; its *moments* take a pass over the text for each layer, which ends at that layer; its *keys* take
  full passes of all prompts for each layer; its *trace* takes one pass of eleven rows for each cell.
- *Operations* is the quotient of the multiplications and additions that the published schedule computes and of those
  that are necessary for the same numbers (`benchmarks/necessary_work.py`): what can be won by computing no more than
  that, at the same rate. A trace needs its clean and its corrupted run, and of every cell what the cell can change.
  *Rate* is that of the necessary operations, as a share of the machine's rate on large matrices.
- Both have all threads. The published schedule's products use them together; mechedit gives each core passes of its
  own, whose products do not wait for another core, unless blocks are large (`mechedit/workers.py`).
- Goals: targets {goals["targets"]:g}×; keys {goals["keys"]:g}×; a trace {goals["trace"]:g}× or {RATE_GOAL:.0%} of the
  rate; moments {MOMENTS_GOAL} of the quotient of operations, and {MOMENTS_RATE:.0%} of the rate. {reached} of
  {len(judged)} are reached. Where one is missed, the table says in brackets at which share of the rate the necessary
  operations would reach it; *unequal* is a line whose numbers differ by more than 1e-4, or a trace's by more than 1e-5
  of its largest score, and are further from float64 than the published ones: it reaches no goal, whatever its ratio.
- Shares depend on the machine. These two cores multiply large matrices at about 190 GFLOP/s; on two that do so at about
  360 (commits b2ddd68 and 89444b3), where what surrounds the products weighs twice as much, 11 of the same 34 were
  reached.

Where the published schedule ran a drawn part of the work, its time is extrapolated by the operations. Memory is what
each took beyond what was there, in GiB: published, mechedit.

| model | |
|---|---|
{models}

| model | step | amount | published | mechedit | ratio | operations | rate | goal | difference | GiB |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}

## Why goals are missed

On one thread, where no pass waits for another (`python -m benchmarks.one_thread --shape tiny --steps 'severed trio'
moments 'late moments'`, `--shape llama --steps targets`, `--shape gptj --steps trace`, at commit 27bcc87):

| model | step | products | attention | other operations | between them | rate | with products alone | goal |
|---|---|---|---|---|---|---|---|---|
| `tiny` | severed trio | 57% | 6% | 23% | 14% | 56% | 99% | 61% |
| `tiny` | moments | 72% | 8% | 21% | 0% | 63% | 87% | 67% |
| `tiny` | late moments | 70% | 9% | 16% | 5% | 63% | 90% | 67% |
| `llama` | targets | 86% | 1% | 12% | 1% | 81% | 94% | 90% |
| `gptj` | trace | 91% | 0% | 4% | 5% | 79% | 87% | 80% |

*Products* to *between them* are parts of the time: the last is what Python takes, somewhat understated, because the
profiler that times the others makes small ones last longer. *Rate* is that of the necessary operations, as a share of
one thread's on large matrices; *with products alone* is what it would be if nothing else took time; *goal* is the
rate at which the goal would be reached. Each of these steps stays below its goal on one thread already, and two
threads only add waiting. At d 128 products are so small that norms, GELU, attention and copies take 25 to 29% of the
time; a z of SmolLM2 would have to leave 4% of the time to everything but products; and the weights of GPT-J's four
blocks are read for the 7 and 70 tokens of its clean and corrupted run, too.

## Measured by

{origins}

A moment of GPT-J's shape has 16,384² entries in float64 and needs as many tokens of text, so it is measured on a GPU
alone; the published writing does not know the norms behind Gemma's MLPs, so there is no line for it. `python -m
benchmarks --shape tiny gpt2 llama gemma3 qwen2 gptj` runs all steps on all shapes, `python -m benchmarks.checkpoints`
three of them on more facts of pretrained models, and `python -m benchmarks.gpu` those that want a GPU. Steps and shapes
without a line have not been measured.
"""


def write_page(results: Sequence[Result], path: Path = PAGE) -> Path:
    """Write the page and return where it is."""
    path.write_text(page(results))
    return path


def _models(results: Sequence[Result]) -> dict[str, str]:
    return {result.measurement.shape: result.measurement.about for result in results}


def _row(result: Result) -> str:
    line = result.measurement
    verdict = "" if line.reached is None else "reached" if line.reached else _missed(line)
    columns = (
        f"`{line.shape}`",
        f"{line.step}{'' if line.device == 'cpu' else f', {line.device}, {line.dtype}'}",
        line.what,
        f"{line.published:.3g} {line.unit}",
        f"{line.mechedit:.3g}",
        f"{line.ratio:.1f}",
        "" if line.quotient is None else f"{line.quotient:.1f}",
        "" if line.rate is None else f"{line.rate:.0%}",
        verdict,
        f"{line.difference:.1e}",
        f"{line.memory[0]:.2f}, {line.memory[1]:.2f}",
    )
    return f"| {' | '.join(columns)} |"


def _missed(line: Measurement) -> str:
    if not line.equal:
        return "**unequal**"
    needed = line.rate_for_goal
    return "**missed**" if needed is None else f"**missed** ({needed:.0%})"


def main() -> None:
    """Write the page."""
    print(f"wrote {write_page(read_results())}")


if __name__ == "__main__":
    main()
