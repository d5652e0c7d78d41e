"""A fuzz of every option and loader: `python -m helpers.fuzz --seconds 1200`, or `make fuzz`.

Each example runs in process, in a forked child with limits on memory and time, in a fresh folder. Three outcomes are
right: accepted (0), refused (2, with one short line and nothing written), and no range of layers (3). All else is a
fault: a traceback, another code, a longer answer, a hang, a file changed by a command that was refused.

At the end it prints the seed, the counts of examples and of different options reached, and the share accepted.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from tqdm import tqdm

import mechedit as me
from helpers.fuzz_base import make_base, patched, small_model
from helpers.fuzz_inputs import COMMANDS, READ, Example, examples, parameters
from helpers.fuzz_settings import fuzz_settings
from mechedit.checksums import without_checksum
from mechedit.cli import main as run_command_line
from mechedit.cli.app import CUT, LONGEST_LINE
from mechedit.files import open_tensors, read_object, read_parquet, read_tensors
from mechedit.run_folder import check_step, read_stamps

CPU_SECONDS, WALL_SECONDS = 20, 120
"""Limits of one example, after which it hangs."""
SETTINGS = 100
"""Settings of each kind that are made in Python."""
TURN = 20
"""Examples for which one generator is asked: of many, those of hypothesis resemble each other."""
MEMORY = 4 * 2**30
"""Bytes of address space that an example may take beside what it begins with."""
STEPS = {
    "select": ("targets", "moments", "sweep_parts", "config.json"),
    "trace": ("trace_parts",),
    "edit": ("targets",),
    "evaluate": ("baseline", "baseline_zsre", "config.json"),
    "tune": ("targets", "moments", "parts", "ledger"),
    "run": (
        "targets", "moments", "sweep_parts", "baseline", "config.json", "effects.parquet", "facts.parquet",
        "selection.json", "edit.safetensors",
    ),
}  # fmt: skip
"""Commands of several steps, and the files or folders of those that may be finished when a later one is refused."""


@dataclass
class Report:
    """What happened so far."""

    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    options: set[tuple[str, str]] = field(default_factory=set)
    """Command and option, for all that were given another value."""
    faults: dict[str, str] = field(default_factory=dict)
    """The first example of each kind of fault."""

    @property
    def examples(self) -> int:
        """Examples so far."""
        return self.outcomes.total()

    def summary(self) -> dict[str, Any]:
        """The counts."""
        accepted = self.outcomes["accepted"]
        return {
            "seed": self.seed,
            "examples": self.examples,
            "options": len(self.options),
            "all options": sum(len(parameters(name)) for name in COMMANDS),
            "accepted": round(accepted / max(self.examples, 1), 3),
            "outcomes": dict(self.outcomes),
            "faults": len(self.faults),
        }


def tree(folder: Path) -> dict[str, str]:
    """The files of a folder with hashes of their bytes, and its folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "link"
        if path.is_symlink()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def run_example(example: Example, base: Path, model: Any, command_line: Callable[[list[str]], None]) -> str:
    """Run an example in a child, and say what came of it: `accepted`, `refused`, `no range`, or a fault in words."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        folder = Path(name) / "work"
        shutil.copytree(base, folder)
        if example.damage is not None:
            example.damage.apply(folder)
        before, log = tree(folder), Path(name) / "log"
        child = os.fork()
        if child == 0:
            _run_in_child(example, folder, log, model, command_line)
        status = _wait(child)
        said = log.read_text(errors="replace") if log.is_file() else ""
        finished = finished_files(folder, example.command)
        if "estimates do not stand for exact effects" not in said:  # else the exact cells are work that goes on
            finished = {name for name in finished if "trace_parts" not in Path(name).parts}
        return judge(status, said, before, tree(folder), finished)


def finished_files(folder: Path, command: str) -> set[str]:
    """Files that finished steps of a command left, each whole by its own checksum or by that in its step's stamp."""
    stamped: set[Path] = set()
    for file in folder.rglob("config.json"):
        with contextlib.suppress(me.InputError):
            steps = read_stamps(file.parent)
            check_step(file.parent, *steps)
            stamped |= {file.parent / name for stamp in steps.values() for name in stamp.get("files", ())}
            stamped |= {file} if steps else set()
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file()
        and set(path.relative_to(folder).parts) & set(STEPS.get(command, ()))
        and (path in stamped or _is_whole(path))
    }


def _is_whole(path: Path) -> bool:
    """Whether a file that no stamp names is as it was written."""
    try:
        match path.suffix:
            case ".json":
                content = read_object(path)
                return path.parent.name == "ledger" or (
                    "sha256" in content and bool(without_checksum(content, path.name, "make it again"))
                )
            case ".parquet":
                return path.parent.name in ("sweep_parts", "trace_parts", "parts") and len(read_parquet(path)) > 0
            case ".safetensors":
                with open_tensors(path) as reader:
                    (key,) = reader.metadata()
                return key != "manifest" and bool(read_tensors(path, key))
    except (me.InputError, ValueError):
        pass
    return False


def _run_in_child(
    example: Example, folder: Path, log: Path, model: Any, command_line: Callable[[list[str]], None]
) -> None:
    """Run the command line and leave the process with its code; 70 for an exception, which is written to the log."""
    code = 71
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        with patched(model, draws=example.draws):
            command_line(list(example.arguments))
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 72
    except BaseException:
        code = 70
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(child: int) -> int | None:
    """The exit code of a child; −N when signal N ended it, None when it took too long and was ended."""
    end = time.monotonic() + WALL_SECONDS
    pause = 0.002
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGXCPU else code
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def judge(
    code: int | None, said: str, before: dict[str, str], after: dict[str, str], finished: Collection[str] = ()
) -> str:
    """What came of an example.

    Args:
        code: of the process.
        said: what it printed.
        before: its folder, by `tree`.
        after: its folder then.
        finished: files that a refused command may leave or replace.
    """
    if code is None:
        return "fault: it hangs"
    if code == 0:
        return "accepted"
    if code == 3:
        return "no range"
    if code != 2:
        lines = [line for line in said.splitlines() if line.strip()]
        place = [line.strip() for line in lines if line.strip().startswith("File") and "/mechedit/" in line]
        where = place[-1].rpartition("/mechedit/")[2][:80] if place else ""
        return f"fault: code {code}, {lines[-1][:120] if lines else 'silent'} at {where}"
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("mechedit: ")]
    lines = [line for line in lines if not line.startswith("mechedit: warning: ")]
    if "Traceback" in said:
        return f"fault: a traceback beside the refusal, {said[-200:]}"
    if len(lines) != 1:
        return f"fault: {len(lines)} lines for a refusal"
    if len(lines[0]) > LONGEST_LINE or (CUT in lines[0] and len(lines[0]) > LONGEST_LINE - 2 * len(CUT)):
        return f"fault: a line of {len(lines[0])} characters: {lines[0][:60]}"
    changed = {name for name in {*before, *after} if after.get(name) != before.get(name)} - set(finished)
    changed -= {str(folder) for name in finished for folder in Path(name).parents}
    if changed:
        return f"fault: a refused command wrote {sorted(changed)}: {lines[0][:100]}"
    return "refused"


def fuzz(
    seed_number: int,
    *,
    n_examples: int | None = None,
    seconds: float | None = None,
    command_line: Callable[[list[str]], None] = run_command_line,
) -> Report:
    """Try examples, so many or for so long, and report what came of them.

    Args:
        seed_number: decides the examples.
        n_examples: how many; None for as many as there is time.
        seconds: how long; None for no limit.
        command_line: what is tried.
    """
    report, begin = Report(seed_number), time.monotonic()

    def done() -> bool:
        enough = n_examples is not None and report.examples >= n_examples
        return enough or (seconds is not None and time.monotonic() - begin > seconds)

    with tempfile.TemporaryDirectory(prefix="fuzzbase") as name:
        base, model = Path(name), small_model()
        make_base(base, model)
        absent = {file for files in READ.values() for file in files if not any(base.glob(file))}
        assert command_line is not run_command_line or not absent, f"what is damaged is there: {absent}"

        def try_example(example: Example) -> None:
            if done():
                return
            try:
                outcome = run_example(example, base, model, command_line)
            except Exception as error:
                outcome = f"fault: the fuzz itself, {error!r:.100}"
            report.outcomes[outcome.partition(":")[0]] += 1
            report.options |= {(example.command, option) for option in example.options}
            if report.examples % 50 == 0:
                print("\n" + json.dumps(report.summary()), flush=True)
            if outcome.startswith("fault") and outcome not in report.faults:
                report.faults[outcome] = str(example)
                print(f"\n{outcome}\n    {example}", flush=True)

        for turn in range(10**6):
            if done():
                break
            rules = settings(
                max_examples=TURN, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            seed(seed_number * 10_000 + turn)(rules(given(examples())(try_example)))()
    return report


def main() -> None:
    """Fuzz by the command line's settings; leaves with 1 where there are faults or too little is accepted."""
    parser = argparse.ArgumentParser(description="Fuzz every option and loader.")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--examples", type=int)
    parser.add_argument("--seed", type=int, help="by default drawn; printed either way")
    chosen = parser.parse_args()
    number = random.SystemRandom().randrange(10**6) if chosen.seed is None else chosen.seed
    print(f"seed {number}", flush=True)
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # a thread less in what is forked
    settings_made, settings_faults = fuzz_settings(number, SETTINGS if chosen.seconds is None else 20 * SETTINGS)
    for fault, example in settings_faults.items():
        print(f"{fault}\n    {example}", flush=True)
    report = fuzz(number, n_examples=chosen.examples, seconds=chosen.seconds)
    faults = len(report.faults) + len(settings_faults)
    summary = {**report.summary(), "settings": dict(settings_made), "faults": faults}
    print(json.dumps(summary, ensure_ascii=False))
    sys.exit(1 if faults or summary["accepted"] < 0.2 else 0)


if __name__ == "__main__":
    main()
