"""The fuzz (`helpers.fuzz`, twenty minutes of it by `make fuzz`) finds each kind of fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fuzz import LONGEST, judge

TESTS = Path(__file__).parent


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
        (2, "mechedit: " + "a" * LONGEST, FOLDER, "fault: a line of 4"),
        (2, REFUSAL, {**FOLDER, "facts.json": "3"}, "fault: a refused command wrote ['facts.json']"),
        (2, REFUSAL, {**FOLDER, "out/selection.json": "3"}, "fault: a refused command wrote ['out/selection.json']"),
        (2, REFUSAL, {"facts.json": "1"}, "fault: a refused command wrote ['out/effects.parquet']"),
        (2, REFUSAL, {**FOLDER, "out/targets/1.parquet": "3"}, "refused"),
    ],
)
def test_each_outcome_is_told_from_the_others(code: int | None, said: str, after: dict[str, str], outcome: str) -> None:
    assert judge(code, said, FOLDER, after).startswith(outcome)


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
