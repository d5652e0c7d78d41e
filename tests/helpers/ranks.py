"""Several processes of one command, as torchrun starts them, from a server that has imported everything already."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

TESTS = Path(__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["helpers.ranks_preload"])


@dataclass(frozen=True)
class Ended:
    """How one process has ended."""

    code: int
    """Exit code; negative: the signal that killed it."""
    out: str
    err: str
    seconds: float
    """Seconds until all had ended."""

    @property
    def complaints(self) -> list[str]:
        """What it said as it failed, without its warnings."""
        return [
            line
            for line in self.err.splitlines()
            if line.startswith("mechedit:") and not line.startswith("mechedit: warning")
        ]


def launch(
    count: int,
    arguments: Sequence[object],
    folder: Path,
    *,
    instead: Mapping[int, Sequence[object]] | None = None,
    first: Mapping[int, str] | None = None,
    environment: Mapping[str, str] | None = None,
    limit: float = 100,
) -> list[Ended]:
    """Run a command by `count` processes, and return how each has ended.

    Args:
        count: number of processes.
        arguments: of the command; none where `first` is all.
        folder: for what they print.
        instead: arguments of single ranks in place of these.
        first: Python code that single ranks run before the command.
        environment: further variables.
        limit: seconds after which all are killed and the test fails.
    """
    _start_server()
    # As torchrun's agent does: it serves at a port that is its own, so that nobody else can take that meanwhile.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder.mkdir(exist_ok=True)
    variables = {
        "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MECHEDIT_RANK_TIMEOUT": "20", **(environment or {}),
    }  # fmt: skip
    environments = [{**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    own_arguments = [(instead or {}).get(rank, arguments) for rank in range(count)]
    return _ended(own_arguments, environments, folder, [(first or {}).get(rank, "") for rank in range(count)], limit)


def launch_by(launcher: Sequence[str], count: int, arguments: Sequence[object], folder: Path) -> list[Ended]:
    """Run a command as a launcher does: it starts stand-ins, and the server a process for each, with its variables.

    Args:
        launcher: modules and options of Python, such as those of torchrun.
        count: number of processes that it starts.
        arguments: of the command.
        folder: for what they print.
    """
    _start_server()
    folder.mkdir(exist_ok=True)
    (folder / "stand_in.py").write_text(_STAND_IN)
    command = [sys.executable, "-m", *launcher, str(folder / "stand_in.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launched = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        files = [folder / f"environment_{rank}" for rank in range(count)]
        while not all(file.exists() for file in files):
            assert launched.poll() is None, "the launcher has ended"
            time.sleep(0.05)
        environments = [json.loads(file.read_text()) for file in files]
        ended = _ended([arguments] * count, environments, folder, [""] * count, 100)
        (folder / "ended").touch()
        assert launched.wait(60) == 0
    finally:
        launched.kill()
    return ended


_STAND_IN = """
import json, os, pathlib, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
(folder / f"new_{rank}").write_text(json.dumps(dict(os.environ)))
(folder / f"new_{rank}").rename(folder / f"environment_{rank}")
while not (folder / "ended").exists():
    time.sleep(0.05)
"""


def _ended(
    arguments: Sequence[Sequence[object]],
    environments: Sequence[Mapping[str, str]],
    folder: Path,
    codes: Sequence[str],
    limit: float,
) -> list[Ended]:
    """Start a process for each environment, and wait for all of them."""
    processes, begin, count = [], time.monotonic(), len(environments)
    for rank, environment in enumerate(environments):
        files = [str(folder / f"{name}_{rank}") for name in ("out", "err")]
        settings = ([str(argument) for argument in arguments[rank]], environment, files, codes[rank])
        processes.append(_CONTEXT.Process(target=_run, args=settings, daemon=True))
        processes[-1].start()
    for process in processes:
        process.join(max(0.0, begin + limit - time.monotonic()))
    seconds, hanging = time.monotonic() - begin, [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
        process.join()
    texts = [[(folder / f"{name}_{rank}").read_text() for name in ("out", "err")] for rank in range(count)]
    assert not hanging, f"{len(hanging)} processes hang: {texts}"
    return [
        Ended(code=process.exitcode or 0, out=out, err=err, seconds=seconds)
        for process, (out, err) in zip(processes, texts, strict=True)
    ]


@functools.cache
def _start_server() -> None:
    """Start the server, which takes long, so that it counts in no limit of time."""
    before = dict(os.environ)
    # It finds what it imports beforehand by this variable alone.
    os.environ.update({"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"})
    try:
        process = _CONTEXT.Process(target=_check_server)
        process.start()
        process.join()
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert process.exitcode == 0, "the server has imported nothing beforehand, and every process would take seconds"


def _check_server() -> None:
    """Fail where the server has not imported what it should."""
    sys.exit("helpers.ranks_preload" not in sys.modules)


def _run(arguments: list[str], environment: Mapping[str, str], files: Sequence[str], code: str) -> None:
    """A rank: the command with its own environment and files to print to."""
    os.environ.update(environment)
    for descriptor, path in zip((1, 2), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    import torch

    from mechedit.cli import main

    torch.set_num_threads(1)
    exec(code, {})
    if arguments:
        main(arguments)
