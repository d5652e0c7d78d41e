"""The scripts of the page on clusters run: by bash, in a faked environment, with options that the commands have."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import typer

from mechedit.cli.app import UsageError, app

PAGE = Path(__file__).parents[1] / "docs" / "how_to" / "cluster.md"
ONE_JOB, ARRAY, MERGE = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
FAKES = {
    "mechedit": 'printf "%s\\n" "$*" >> "$LOG"',
    "srun": '"$@"',
    "scontrol": "printf 'node1\\nnode2\\n'",
    # What stands behind -m mechedit.
    "torchrun": 'printf "%s\\n" "torchrun $*" >> "$LOG.torchrun"; while [ "$1" != mechedit ]; do shift; done; "$@"',
}


def run(script: str, folder: Path, **environment: str) -> list[list[str]]:
    """The arguments of every mechedit command that a script runs."""
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\nset -e\n{body}\n")
        (folder / name).chmod(0o755)
    variables = {"MODEL": "tiny", "RUN": str(folder / "run"), "REQUESTS": "requests.json", "LOG": str(folder / "log")}
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": path, **variables, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in (folder / "log").read_text().splitlines()]


def check_options(arguments: list[str]) -> None:
    """The command line reads them."""
    command = typer.main.get_command(app).commands[arguments[0]]
    command.make_context(arguments[0], arguments[1:])


def test_one_job_on_two_machines(tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    commands = run(ONE_JOB, tmp_path, **slurm)
    assert [arguments[0] for arguments in commands] == ["trace", "moments", "edit", "evaluate"]
    for arguments in commands:
        check_options(arguments)
    launches = (tmp_path / "log.torchrun").read_text().splitlines()
    assert all("--nnodes 2 --nproc-per-node 4" in line and "node1:29500" in line for line in launches)


def test_an_array_covers_every_shard_and_then_merges(tmp_path: Path) -> None:
    for index in range(8):
        commands = run(ARRAY, tmp_path, SLURM_ARRAY_TASK_ID=str(index), SLURM_ARRAY_TASK_COUNT="8")
    shards = [arguments[arguments.index("--shard") + 1] for arguments in commands]
    assert sorted(shards) == sorted(f"{index}/8" for index in range(8) for _ in range(3))
    merges = run(MERGE, tmp_path)[len(commands) :]
    assert [arguments[0] for arguments in merges] == ["trace", "moments", "edit"]
    assert all("--merge" in arguments for arguments in merges)
    for arguments in [*commands, *merges]:
        check_options(arguments)


def test_a_script_that_fails_and_options_that_are_not_there_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="unbound variable"):
        run(ARRAY, tmp_path)
    with pytest.raises(UsageError, match="--shards"):
        check_options(["trace", "--shards", "0/2"])
