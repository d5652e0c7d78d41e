"""A minute of the fuzz (`helpers.fuzz`; twenty by `make fuzz`), and that it finds each kind of fault."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from helpers import fuzz, fuzz_settings
from helpers.fuzz import finished_files, judge
from helpers.fuzz_inputs import BASE, COMMANDS, READ, SETTINGS, WEIGHTS
from helpers.fuzz_settings import KINDS, values_of
from helpers.run_folder import write_run

from mechedit.cache import Codec
from mechedit.cli.app import CUT, LONGEST_LINE
from mechedit.files import read_json, write_checked_json, write_json, write_tensors
from mechedit.run_folder import RunFolder

TESTS = Path(__file__).parent
EXAMPLES = 120
"""Examples of the derandomized fuzz, about a minute's."""


def test_a_minute_of_the_fuzz() -> None:
    """In a process of its own, where no types are checked before the code is reached."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "helpers.fuzz", "--examples", str(EXAMPLES), "--seed", "0"]
    done = subprocess.run(command, env={**os.environ, **quiet, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["examples"] == EXAMPLES
    assert summary["faults"] == 0
    assert summary["accepted"] >= 0.2
    assert summary["options"] > 50
    assert summary["outcomes"]["refused"] > EXAMPLES / 5
    assert min(summary["settings"].values()) > 100


def test_every_command_and_setting_is_tried() -> None:
    """All options are those of the commands themselves; a new command is noticed here."""
    assert COMMANDS.keys() == BASE.keys() == READ.keys() == WEIGHTS.keys()
    assert set(SETTINGS) < set(KINDS), "settings that are options are made in Python, too"
    for kind in KINDS:
        names = {field.name for field in dataclasses.fields(kind)}
        assert names - {name for name, hint in get_type_hints(kind).items() if values_of(hint)} <= HOLD_OTHERS, kind


HOLD_OTHERS = {"approximation"}
"""Fields that hold other settings."""


def test_settings_that_are_neither_made_nor_refused_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: checks that are not there."""
    monkeypatch.setattr(fuzz_settings, "KINDS", (Unchecked,))
    outcomes, faults = fuzz_settings.fuzz_settings(0, 50)
    assert outcomes["accepted"]
    assert all("of Unchecked" in fault for fault in faults)
    assert {fault.split()[0] for fault in faults} >= {"TypeError", "OverflowError"}


@dataclasses.dataclass(frozen=True)
class Unchecked:
    """Settings that nothing checks before they are used."""

    steps: int = 1
    window: float | None = None

    def __post_init__(self) -> None:
        math.isqrt(abs(int(self.steps)))
        math.exp(self.window or 0)


REFUSAL = "mechedit: seed is -1, expected a whole number\n"
FOLDER = {"facts.json": "1", "out/effects.parquet": "2"}


@pytest.mark.parametrize(
    ("code", "said", "after", "outcome"),
    [
        (0, "", FOLDER, "accepted"),
        (2, REFUSAL, FOLDER, "refused"),
        (2, "mechedit: warning: few facts\n" + REFUSAL, FOLDER, "refused"),
        (3, "", FOLDER, "no range"),
        (1, 'File "/x/mechedit/files.py", line 3\nValueError: no', FOLDER, "fault: code 1, ValueError: no at files.py"),
        (70, "MemoryError", FOLDER, "fault: code 70, MemoryError"),
        (-9, "", FOLDER, "fault: code -9"),
        (None, "", FOLDER, "fault: it hangs"),
        (2, "", FOLDER, "fault: 0 lines for a refusal"),
        (2, REFUSAL + REFUSAL, FOLDER, "fault: 2 lines for a refusal"),
        (2, "Traceback (most recent call last)\n" + REFUSAL, FOLDER, "fault: a traceback beside the refusal"),
        (2, "mechedit: " + "a" * LONGEST_LINE, FOLDER, "fault: a line of 4"),
        (2, f"mechedit: {'a' * (LONGEST_LINE // 2)}{CUT}".ljust(LONGEST_LINE - 4, "b"), FOLDER, "fault: a line of 39"),
        (2, f"mechedit: a value {CUT} that is long", FOLDER, "refused"),
        (2, REFUSAL, {**FOLDER, "facts.json": "3"}, "fault: a refused command wrote ['facts.json']"),
        (2, REFUSAL, {**FOLDER, "out/selection.json": "3"}, "fault: a refused command wrote ['out/selection.json']"),
        (2, REFUSAL, {"facts.json": "1"}, "fault: a refused command wrote ['out/effects.parquet']"),
        (2, REFUSAL, {**FOLDER, "out/targets/1.parquet": "3"}, "refused"),
        (2, REFUSAL, {**FOLDER, "out/targets/2.parquet": "3"}, "fault: a refused command wrote ['out/targets/2"),
        (2, REFUSAL, {**FOLDER, "out/targets": "folder", "out/targets/1.parquet": "3"}, "refused"),
        (2, REFUSAL, {**FOLDER, "out/other": "folder"}, "fault: a refused command wrote ['out/other']"),
    ],
)
def test_each_outcome_is_told_from_the_others(code: int | None, said: str, after: dict[str, str], outcome: str) -> None:
    assert judge(code, said, FOLDER, after, {"out/targets/1.parquet"}).startswith(outcome)


def test_only_whole_files_of_finished_steps_may_be_left(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write_run(folder)
    RunFolder.at(folder, overwrite=True).step(
        "evaluate", {"edit": "e"}, lambda: [1], Codec(read=read_json, write=write_json), "answers.json"
    )
    write_checked_json(folder / "selection.json", {"layers": [1]})
    write_tensors(folder / "targets" / "1.safetensors", {"z": torch.ones(3)}, "targets", {"stopped": "steps"})
    write_json(folder / "targets" / "half.json", {})
    left = finished_files(tmp_path, "run")
    assert {"out/config.json", "out/selection.json", "out/targets/1.safetensors"} <= left
    assert not {"out/targets/half.json", "out/answers.json", "out/edit.safetensors", "out/summary.json"} & left
    assert "out/targets/1.safetensors" in finished_files(tmp_path, "edit")
    assert not finished_files(tmp_path, "trace"), "it has one step"
    data = (folder / "targets" / "1.safetensors").read_bytes()
    (folder / "targets" / "1.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (folder / "selection.json").write_text((folder / "selection.json").read_text().replace("1", "2", 1))
    (folder / "answers.json").write_text("[2]")
    left = finished_files(tmp_path, "run")
    assert {Path(name).parent.name for name in left} == {"moments"}, "all others are damaged, or stamps of what is"


def planted(words: list[str]) -> None:
    """A command that fails in each way."""
    match sum(map(ord, "".join(words))) % 5:
        case 0:
            raise KeyError("a fault")
        case 1:
            bytearray(2**40)
        case 2:
            while True:
                pass
        case 3:
            Path("facts.json").write_text("2")
            Path("folder").mkdir()
    print("mechedit: it is refused", file=sys.stderr)
    sys.exit(2)


def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control, in children as the fuzz runs them."""
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 1)
    monkeypatch.setattr(fuzz, "make_base", lambda folder, model: (folder / "facts.json").write_text("1"))
    monkeypatch.setattr(fuzz, "small_model", lambda: None)
    report = fuzz.fuzz(0, n_examples=25, command_line=planted)
    kinds = ["KeyError", "MemoryError", "hangs", "wrote ['facts.json', 'folder']"]
    assert all(any(kind in fault for fault in report.faults) for kind in kinds), report.faults
    assert len(report.faults) == 4, report.faults
    assert report.outcomes["refused"]
    assert not report.outcomes["accepted"]
