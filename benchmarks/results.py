"""The file of results: measurements with the commit and the command that made them."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measurement import Measurement

RESULTS = Path(__file__).parent / "results.json"
"""The results that the documentation shows."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A measurement and where it comes from."""

    measurement: Measurement
    commit: str
    command: str
    machine: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What a new result takes the place of."""
        return self.measurement.shape, self.measurement.step, self.measurement.device

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        origin = {"commit": self.commit, "command": self.command, "machine": self.machine}
        return {**self.measurement.plain(), **origin}

    @staticmethod
    def of(record: dict[str, Any]) -> Result:
        """The result that `plain` wrote."""
        origin = {name: record.pop(name) for name in ("commit", "command", "machine")}
        return Result(measurement=Measurement.of(record), **origin)


def read_results(path: Path = RESULTS) -> list[Result]:
    """The results in a file; none when there is no file."""
    return [Result.of(record) for record in json.loads(path.read_text())] if path.is_file() else []


def add_results(measurements: Sequence[Measurement], path: Path) -> None:
    """Write measurements made now; they take the place of those of the same shape, step and device."""
    commit, command, machine = _commit(), " ".join(map(shlex.quote, _command())), _machine()
    results = {result.key: result for result in read_results(path)}
    for measurement in measurements:
        result = Result(measurement=measurement, commit=commit, command=command, machine=machine)
        results[result.key] = result
    path.write_text(json.dumps([result.plain() for result in results.values()], indent=1, ensure_ascii=False) + "\n")


def _command() -> list[str]:
    """The command line, as a person types it."""
    module = getattr(sys.modules["__main__"].__spec__, "name", None) if "__main__" in sys.modules else None
    name = (module or "benchmarks").removesuffix(".__main__")
    return ["python", "-m", name, *sys.argv[1:]]


def _commit() -> str:
    """The commit, marked where files other than the results differ from it."""
    folder = Path(__file__).parent
    describe = ["git", "describe", "--always", "--exclude", "*"]
    commit = subprocess.run(describe, cwd=folder, capture_output=True, text=True).stdout.strip()
    if not commit:
        return "unknown"
    changed = ["git", "diff", "--quiet", "HEAD", "--", ":/", f":(exclude,top)benchmarks/{RESULTS.name}"]
    return f"{commit}-dirty" if subprocess.run(changed, cwd=folder).returncode else commit


def _machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads, {platform.machine()}"
