"""Take every model type for causal language modeling through all steps, on both backends, and write the table.

    python -m benchmarks.families [TYPE ...] [--jobs 1] [--table]

Each type is a small random model (`small_models`) that is loaded, traced, severed, edited, undone, exported and
reloaded (`steps`). Results go to `results.json` beside this file, one entry a type, so that some types can be run
again; then the table is written to `docs/reference/models.md` (`table`). Types run in processes of a few types each:
one that dies or takes too long is recorded as a crash and takes no other with it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.families.table import read_results, write_page, write_results

BACKENDS = ("transformer_lens", "nnsight")
CRASH = "crash"
_LIMIT_S = 300
_BATCH = 16


def main() -> None:
    """Run the types named, or all, and write results and table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("types", nargs="*", help="model types; all when none is given")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--table", action="store_true", help="write the table from the results, and run nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.types)
        return
    if not arguments.table:
        run(arguments.types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), arguments.jobs)
    print(f"wrote {write_page(read_results())}")


def work(types: Sequence[str]) -> None:
    """Run types one after another, and print a line of JSON for each."""
    import transformers

    from benchmarks.families.steps import Outcome, outcome_of

    transformers.logging.set_verbosity_error()
    for model_type in types:
        outcomes = []
        for backend in BACKENDS:
            try:
                outcomes.append(outcome_of(model_type, backend))
            except Exception as error:
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
                outcomes.append(Outcome(backend, category=CRASH, reason=reason))
        print(json.dumps({"type": model_type, "outcomes": [outcome.plain for outcome in outcomes]}), flush=True)


def run(types: Sequence[str], jobs: int) -> None:
    """Run types in processes of a few types each, and write each result as it comes."""
    waiting: queue.Queue[list[str]] = queue.Queue()
    for start in range(0, len(types), _BATCH):
        waiting.put(list(types[start : start + _BATCH]))
    lock = threading.Lock()

    def record(entry: dict[str, Any]) -> None:
        with lock:
            write_results({**read_results(), entry["type"]: entry["outcomes"]})
            short = {outcome["backend"]: outcome["category"] or "all steps" for outcome in entry["outcomes"]}
            print(entry["type"], short, flush=True)

    def drain() -> None:
        while True:
            try:
                batch = waiting.get_nowait()
            except queue.Empty:
                return
            while batch:
                batch = _run_batch(batch, record)

    threads = [threading.Thread(target=drain) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _run_batch(batch: list[str], record: Any) -> list[str]:
    """Run a batch in a process; return the types that are still to be run when the process died at one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "benchmarks.families", "--worker", *batch]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    rest = list(batch)
    timer = threading.Timer(_LIMIT_S, process.kill)
    timer.start()
    for line in process.stdout:
        if not line.startswith('{"type"'):
            continue
        entry = json.loads(line)
        record(entry)
        rest.remove(entry["type"])
        timer.cancel()
        timer = threading.Timer(_LIMIT_S, process.kill)
        timer.start()
    timer.cancel()
    process.wait()
    if rest:
        reason = f"the process ended with {process.returncode}, or after {_LIMIT_S} s"
        failed = [
            {
                "backend": backend,
                "traced": False,
                "severed": False,
                "edited": False,
                "category": CRASH,
                "reason": reason,
            }
            for backend in BACKENDS
        ]
        record({"type": rest[0], "outcomes": failed})
    return rest[1:]


if __name__ == "__main__":
    main()
