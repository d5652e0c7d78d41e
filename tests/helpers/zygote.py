"""Commands in children forked from a process that has imported everything and loaded the model: starting takes nothing.

`Zygote` is used by tests; run as a script, this file is the process that forks. It reads one request in a line of JSON
(arguments, folder, limits) and answers with the exit code, the seconds, how often something was about to change in the
folder, and what was printed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Its exit code, or the number of the signal that killed it, negative."""
    seconds: float
    changes: int
    """How often Python was about to open a file for writing, or to make, rename or remove something; 0 if killed."""
    printed: str
    """What it printed, on stdout and stderr."""

    @property
    def refusals(self) -> list[str]:
        """The lines by which the command line refuses."""
        lines = [line for line in self.printed.replace("\r", "\n").splitlines() if line.startswith("mechedit: ")]
        return [line for line in lines if not line.startswith("mechedit: warning: ")]


class Zygote:
    """Starts the forking process, and asks it for one command at a time."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([sys.executable, __file__], text=True, env=environment, **pipes)

    def run(self, arguments: Sequence[str], folder: Path, **limits: float | bool | None) -> Ended:
        """Run a command in a folder.

        Args:
            arguments: of the command line; `session FOLDER` writes a session from Python.
            folder: the current folder of the command.
            **limits: it gets the `signal`, SIGKILL by default, `kill_after` seconds, or before the change `kill_at`;
                `largest` is the size in bytes of the largest file that it may write; `unprivileged` lets permissions
                bind it, also where root runs it; `sketched` has it write what figures show in place of pictures.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"arguments": list(arguments), "folder": str(folder), "limits": limits}) + "\n")
        stdin.flush()
        return Ended(**json.loads(stdout.readline()))

    def close(self) -> None:
        """End the forking process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _serve() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare_for = _prepare()
    for line in sys.stdin:
        request = json.loads(line)
        prepare_for(request["arguments"])
        (reading, writing), (counted, counting) = os.pipe(), os.pipe()
        start = time.perf_counter()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.close(counted)
            _run(request["arguments"], request["folder"], request["limits"], writing, counting)
        os.close(writing)
        os.close(counting)
        printed = _read(reading, child, start, request["limits"].get("kill_after"), _signal(request["limits"]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with os.fdopen(counted) as count:
            changes = int(count.read() or 0)
        seconds = time.perf_counter() - start
        ended = {"code": code, "seconds": seconds, "changes": changes, "printed": printed}
        answers.write(json.dumps(ended) + "\n")
        answers.flush()
    os._exit(0)  # without all that libraries do as they end


def _signal(limits: dict[str, Any]) -> int:
    return limits.get("signal") or signal.SIGKILL


def _read(reading: int, child: int, start: float, kill_after: float | None, number: int) -> str:
    """What the child prints until it ends; it is killed when its time has come."""
    printed, killed = b"", False
    with os.fdopen(reading, "rb", buffering=0) as stream:
        while True:
            rest = None if kill_after is None or killed else max(0.0, start + kill_after - time.perf_counter())
            if not select.select([stream], [], [], rest)[0]:
                os.kill(child, number)
                killed = True
                continue
            data = stream.read(65536)
            if not data:
                return printed.decode(errors="replace")
            printed += data


def _prepare() -> Callable[[Sequence[str]], None]:
    """Import everything and load the smallest model, so that no child has to.

    Returns:
        What loads the tiny model before the first command that takes it.
    """
    import nltk.tokenize
    import peft
    import torch
    import typer
    from tqdm.std import tqdm

    from helpers.smallest import NAME, smallest_model
    from mechedit.cli import app, options
    from mechedit.evaluation import references
    from mechedit.figures import style
    from mechedit.models import load_model

    del nltk, peft, references  # which commands import when they need them
    typer.main.get_command(app)  # reads the notes of all settings, which stay read

    # Figures take most of the time of a command: coarse ones, with fonts that no file has to hold.
    style._STYLE.update({"savefig.dpi": 20, "pdf.use14corefonts": True})
    torch.set_num_threads(1)
    # Progress bars take a lock that all forked processes share: a child that is killed as it holds it would block them.
    tqdm.set_lock(threading.RLock())
    models, load = {NAME: smallest_model()}, options.load_quietly

    def load_quietly(name: str, *arguments: Any) -> Any:
        return models[name] if name in models else load(name, *arguments)

    options.load_quietly = load_quietly

    def prepare_for(arguments: Sequence[str]) -> None:
        named = any(NAME in word for word in arguments)
        if "tiny" not in models and arguments[0] in LOADING and not named and "--merge" not in arguments:
            models["tiny"] = load_model("tiny")

    return prepare_for


LOADING = ("trace", "moments", "edit", "evaluate", "apply")
"""Commands that load the tiny model where they name no other one."""


class _Sketch:
    """In place of a figure, whose picture takes most of the time of a command: what is drawn, as text."""

    def __init__(self, *shown: Any, **_: Any) -> None:
        self.shown = [getattr(part, "args", part) for part in shown]

    def savefig(self, path: Path, **_: Any) -> None:
        """Write it, a few bytes at a time."""
        with path.open("w", encoding="utf-8", buffering=1) as stream:
            stream.writelines(f"{part}\n" for part in [path.suffix, *self.shown])


def _sketch_figures() -> None:
    """Let figures be sketches."""
    from mechedit.cli import tune
    from mechedit.figures import run_folder
    from mechedit.provenance import file_hash

    def trace_figures(effects: Path, layers: Any) -> dict[str, Any]:
        return {name: _Sketch(file_hash(effects), layers) for name in ("severed", "roles", "fact", "lines")}

    def tuning_figures(record: Any) -> dict[str, Any]:
        return {name: _Sketch(record) for name in ("windows", "weights")}

    run_folder.trace_figures, run_folder.draw, run_folder.sweep_figure = trace_figures, _Sketch, _Sketch
    tune.tuning_figures = tuning_figures


CHANGES = frozenset(
    ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
)
"""Events of Python's audit hooks, besides the opening of files, before something changes in a folder."""


class _Changes:
    """Counts the changes in a folder, and kills the process before one of them."""

    def __init__(self, folder: str, kill_at: int | None, number: int) -> None:
        self.folder, self.kill_at, self.number, self.count = folder, kill_at, number, 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            _, mode, flags = arguments
            if not (set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
        elif event not in CHANGES:
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        path = os.fsdecode(path)
        if os.path.isabs(path) and not path.startswith(self.folder):
            return
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), self.number)


def _run(arguments: list[str], folder: str, limits: dict[str, Any], output: int, counting: int) -> None:
    """Be the command, in the child, which an interrupt reaches only here."""
    from mechedit.__main__ import LINE

    counted: list[_Changes] = []
    try:
        try:
            code = _code(arguments, folder, limits, output, counted)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    except KeyboardInterrupt:  # as the entry module does
        print(f"\n{LINE}", end="")  # below the bars of a session, which nobody ends
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(counting, str(counted[0].count if counted else 0).encode())
    os._exit(code)


def _code(arguments: list[str], folder: str, limits: dict[str, Any], output: int, counted: list[_Changes]) -> int:
    """The exit code of the command."""
    import resource
    import traceback

    import torch

    from mechedit.errors import InputError

    torch.set_num_threads(1)  # before threads do so at once, each for the first time after the fork
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.chdir(folder)
        sys.stdin.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which may be ignored in the background
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        if limits.get("largest") is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits["largest"], limits["largest"]))
        if limits.get("unprivileged"):
            _drop_privileges()
        if limits.get("sketched"):
            _sketch_figures()
        if arguments[0] in ("tune", "train-mend"):
            _stop_the_clock()
        counted.append(_Changes(folder, limits.get("kill_at"), _signal(limits)))
        if arguments[0] == "session":
            _session(arguments[1])
        else:
            from mechedit.cli import main

            main(arguments)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except InputError as error:  # of a session, which no command line writes
        print(f"mechedit: {error}")
        return 2
    except Exception:
        traceback.print_exc()
        return 99
    return 0


def _drop_privileges() -> None:
    """Let permissions bind this process as they bind others: without root's capabilities."""
    import ctypes

    if os.geteuid():
        return
    version, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(version, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _stop_the_clock() -> None:
    """Let trials take no time: what was tried holds seconds. Trainings are checkpointed at each step."""
    from mechedit.methods import mend_training
    from mechedit.tuning import ledger

    ledger.monotonic = lambda: 0.0
    mend_training.SECONDS = -1


def _session(folder: str) -> None:
    """Write three batches, without a clock: a history holds seconds."""
    import torch

    import mechedit as me
    from mechedit.cli.options import load_quietly
    from mechedit.session import session

    session.time.perf_counter = lambda: 0.0
    model, requests = load_quietly("smallest", "transformer_lens", None, None), me.load_requests("held_out.json")
    moments = {layer: torch.eye(model.d_mlp, dtype=torch.float64) for layer in (1, 2)}
    config = me.MemitConfig(steps=2, covariance_weight=10.0)
    rule = me.StopRule(perplexity=None, earlier=None)
    with me.EditSession(model, [1, 2], moments, config=config, prefixes=["{}"], rule=rule, folder=folder) as writer:
        for start in range(0, 6, 2):
            if not writer.stopped:
                writer.write(requests[start : start + 2])


if __name__ == "__main__":
    _serve()
