"""A minute of the fuzz (`helpers.fuzz`; twenty by `make fuzz`), and that it finds each kind of fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.fuzz import finished_files, judge
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
        (2, f"mechedit: this{CUT}that", FOLDER, "fault: a line of 2"),
        (2, REFUSAL, {**FOLDER, "facts.json": "3"}, "fault: a refused command wrote ['facts.json']"),
        (2, REFUSAL, {**FOLDER, "out/selection.json": "3"}, "fault: a refused command wrote ['out/selection.json']"),
        (2, REFUSAL, {"facts.json": "1"}, "fault: a refused command wrote ['out/effects.parquet']"),
        (2, REFUSAL, {**FOLDER, "out/targets/1.parquet": "3"}, "refused"),
        (2, REFUSAL, {**FOLDER, "out/targets/2.parquet": "3"}, "fault: a refused command wrote ['out/targets/2"),
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


def test_planted_faults_are_found() -> None:
    """The control: commands that fail in each way, in children as the fuzz runs them."""
    script = """
import sys
from pathlib import Path
from helpers import fuzz
fuzz.CPU_SECONDS = 1
fuzz.make_base = lambda folder, model: (folder / "facts.json").write_text("1")
fuzz.small_model = lambda: None
def planted(words):
    match sum(map(ord, "".join(words))) % 5:
        case 0: raise KeyError("a fault")
        case 1: bytearray(2**40)
        case 2:
            while True: pass
        case 3:
            Path("facts.json").write_text("2"); print("mechedit: it is refused", file=sys.stderr); sys.exit(2)
        case 4: print("mechedit: it is refused", file=sys.stderr); sys.exit(2)
report = fuzz.fuzz(0, n_examples=25, command_line=planted)
kinds = ["KeyError", "MemoryError", "hangs", "wrote ['facts.json']"]
assert all(any(kind in fault for fault in report.faults) for kind in kinds), report.faults
assert len(report.faults) == 4 and report.outcomes["refused"] > 0 and not report.outcomes["accepted"], report
"""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
