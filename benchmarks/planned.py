"""What `mechedit plan` states of moments, targets and a trace, against what the commands then take on this machine.

    python -m benchmarks.planned MODEL --texts FILE --requests FILE [--known FILE] [--layers 5-9]
        [--edits 8] [--facts 2]

Memory is the most that the process had resident. Each command is run twice, and the second time finds all finished: the
difference of the two is the time of the work, without the start of Python and the loading of the model. Time is that of
the processor, of one thread (OMP_NUM_THREADS=1), planned and taken, so that other jobs of the machine do not count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import mechedit as me
from mechedit.batching import GIB
from mechedit.cli.parsing import parse_layers
from mechedit.data import EditRequest
from mechedit.files import write_json
from mechedit.models import Model, ModelShapes
from mechedit.planning import (
    PromptShape,
    Step,
    measured_rates,
    plan_edit,
    plan_moments_step,
    plan_trace_step,
    surrounding_bytes,
)
from mechedit.prompt_tokens import encode_documents
from mechedit.trace.traced_fact import tokenize_fact

TRIED = 20
"""Facts that are tried for each that is traced."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a command took."""

    seconds: float
    """Of the processor."""
    memory: int
    """Most bytes resident."""


def main() -> None:
    """Plan, run and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", required=True, type=Path)
    parser.add_argument("--requests", required=True)
    parser.add_argument("--known", default="known", help="facts to trace, of which the first that the model knows")
    parser.add_argument("--layers", default="5-9")
    parser.add_argument("--edits", type=int, default=8)
    parser.add_argument("--facts", type=int, default=2)
    parser.add_argument("--only", help="one step")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        requests = me.load_requests(arguments.requests, conflicts="first")[: arguments.edits]
        steps, shapes = planned(arguments, requests, Path(folder) / "facts.json")
        rates = measured_rates(arguments.model, clock=time.process_time)
        print(arguments.model)
        for name, command in commands(arguments, requests, Path(folder)).items():
            if arguments.only not in (None, name):
                continue
            step, first, again = steps[name], run(command), run(command)
            memory = surrounding_bytes(shapes) + shapes.weight_bytes + step.memory
            minutes = step.minutes(rates)
            taken = (first.seconds - again.seconds) / 60
            print(
                f"{name:<8} GiB: {memory / GIB:.2f} planned, {first.memory / GIB:.2f} taken, "
                f"ratio {memory / first.memory:.2f}   minutes: {minutes:.3f} planned, {taken:.3f} taken, "
                f"ratio {minutes / taken:.2f}",
                flush=True,
            )


def planned(
    arguments: argparse.Namespace, requests: Sequence[EditRequest], file: Path
) -> tuple[dict[str, Step], ModelShapes]:
    """The steps as planned for these texts, requests and facts, and the sizes of the model.

    The facts that the model knows are written to the file.
    """
    model, layers = me.load_model(arguments.model), parse_layers(arguments.layers)
    shapes = ModelShapes.of(model)
    lengths = [len(ids) for ids in encode_documents(model.tokenizer, me.load_texts(arguments.texts), 1024)]
    config = me.TraceConfig(sever=("nothing", "mlp", "attn"))
    known = me.plan_trace(model, me.load_facts(arguments.known)[: TRIED * arguments.facts], config).facts
    facts = known[: arguments.facts]
    fields = ("id", "subject", "prompt", "object")
    write_json(file, [{name: getattr(traced.fact, name) for name in fields} for traced in facts])
    moments = plan_moments_step(shapes, sum(lengths), layers, text_tokens=max(lengths))
    targets, _ = plan_edit(shapes, len(requests), layers, prompt_shape(model, requests))
    # Targets are searched for without moments in memory.
    targets = Step(**{**vars(targets), "memory": targets.memory - len(layers) * 8 * shapes.d_key**2})
    trace = plan_trace_step(shapes, len(facts), PromptShape.of(facts), config)
    return {"moments": moments, "targets": targets, "trace": trace}, shapes


def prompt_shape(model: Model, requests: Sequence[EditRequest]) -> PromptShape:
    """The mean size of requests."""
    facts = [
        me.Fact(id=request.id, subject=request.subject, prompt=request.prompt, object=request.target_new)
        for request in requests
    ]
    return PromptShape.of([tokenize_fact(model, fact) for fact in facts])


def commands(arguments: argparse.Namespace, requests: Sequence[EditRequest], folder: Path) -> dict[str, list[str]]:
    """The commands, by step."""
    fields = ("id", "subject", "prompt", "target_new")
    write_json(folder / "requests.json", [{name: request.plain()[name] for name in fields} for request in requests])
    model, out = ["--model", arguments.model], ["--out", str(folder)]
    return {
        "moments": ["moments", *model, *out, "--layers", arguments.layers, "--texts", str(arguments.texts)],
        "targets": [
            "edit", *model, "--targets-only", "--layers", arguments.layers, "--set", "threshold=1e-9",
            "--requests", str(folder / "requests.json"), "--moments", str(folder),
        ],
        "trace": ["trace", *model, *out, "--facts", str(folder / "facts.json")],
    }  # fmt: skip


def run(command: Sequence[str]) -> Taken:
    """Run a command, and say what it took."""
    process = subprocess.Popen([sys.executable, "-m", "mechedit", *command], stdout=subprocess.DEVNULL)
    memory, ended = 0, 0
    while not ended:
        time.sleep(0.02)
        # Not `ru_maxrss`, which begins with what this process had when it started the other.
        memory = max(memory, _most_resident(process.pid))
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    return Taken(seconds=usage.ru_utime + usage.ru_stime, memory=memory)


def _most_resident(pid: int) -> int:
    """Most bytes that a process has had resident; 0 once it has ended. Linux alone says it of another process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


if __name__ == "__main__":
    main()
