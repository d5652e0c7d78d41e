"""Seconds of a command by N processes of one thread each, against one process with N threads.

    python -m benchmarks.several_processes [--model tiny] [--processes 2] [--facts 24] [--texts 4000] [--steps targets]

Each command is run twice: the second time all that is dealt out is finished, so that the difference is the work alone,
without the start of Python and of the processes. That start varies by seconds: take enough facts and texts that the
work is long beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import mechedit as me

STEPS = ("trace", "targets", "moments")


def main() -> None:
    """Trace, targets and moments, each both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--facts", type=int, default=24, help="facts to trace, and to search z for")
    parser.add_argument("--texts", type=int, default=4000, help="texts for the moments")
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS, help="which to time (default all)")
    arguments = parser.parse_args()
    print(f"{'step':<8} {'1 process':>10} {arguments.processes:>4} processes {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        commands_by_step = commands(arguments, Path(folder))
        for step in arguments.steps:
            command = commands_by_step[step]
            threads = work_seconds(command, Path(folder) / f"{step}_threads", 1, arguments.processes)
            processes = work_seconds(command, Path(folder) / f"{step}_processes", arguments.processes, 1)
            print(f"{step:<8} {threads:>8.1f} s {processes:>12.1f} s {threads / processes:>6.2f}", flush=True)


def commands(arguments: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The commands that are timed, by step; all but the folder for the results."""
    (folder / "texts.txt").write_text("\n".join(me.load_texts("tiny")[: arguments.texts]))
    requests = [request.plain() for request in me.load_requests("tiny")[: arguments.facts]]
    fields = ("id", "subject", "prompt", "target_new")
    (folder / "requests.json").write_text(
        json.dumps([{name: request[name] for name in fields} for request in requests])
    )
    return {
        "trace": ["trace", "--facts", "known", "--max-facts", str(arguments.facts)],
        "targets": [
            "edit", "--targets-only", "--layers", "3-4", "--set", "batch_size=6",
            "--requests", str(folder / "requests.json"),
        ],
        "moments": ["moments", "--layers", "3-4", "--texts", str(folder / "texts.txt")],
    }  # fmt: skip


def work_seconds(command: Sequence[str], folder: Path, processes: int, threads: int) -> float:
    """Seconds of the work of a command: of a run, less those of the same again, which finds all finished."""
    folder.mkdir()
    folder_option = ["--moments" if command[0] == "edit" else "--out", str(folder)]
    first, again = (run_seconds([*command, *folder_option], processes, threads) for _ in range(2))
    return first - again


def run_seconds(command: Sequence[str], processes: int, threads: int) -> float:
    """Seconds of a command by some processes with some threads each."""
    launcher = [] if processes == 1 else ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    modules = [*launcher, *(["-m"] if launcher else []), "mechedit"]
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", *modules, *command],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
