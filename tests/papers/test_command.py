"""How a script of the papers ends, and what it refuses before anything is loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from analyses.common.command import run_script
from mechedit import InputError

ROOT = Path(__file__).parents[2]
LINE = "interrupted; the same command goes on from what is finished\n"


def fail(error: BaseException, cause: BaseException | None = None) -> int:
    raise error from cause


@pytest.mark.parametrize(
    ("error", "cause", "code", "line"),
    [
        (KeyboardInterrupt(), None, 130, LINE),
        (InputError("it cannot be read"), KeyboardInterrupt(), 130, LINE),
        (RuntimeError("half of it is there"), KeyboardInterrupt(), 130, LINE),
        (InputError("--count is 0"), None, 2, "--count is 0\n"),
    ],
)
def test_a_script_ends_with_one_line(
    error: BaseException, cause: BaseException | None, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        run_script(lambda: fail(error, cause))
    assert leaving.value.code == code
    assert capsys.readouterr().err == f"{Path(sys.argv[0]).stem}: {line}"


def test_a_defect_keeps_its_traceback_and_a_result_its_code() -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        run_script(lambda: fail(RuntimeError("a defect")))
    for answer, code in ((None, 0), (3, 3)):
        with pytest.raises(SystemExit) as leaving:
            run_script(lambda answer=answer: answer)
        assert leaving.value.code == code


SLOW = """
import sys, time
from analyses.common import command
def main():
    print("working", flush=True)
    time.sleep(60)
sys.argv = ["runtime.py"]
command.run_script(main)
"""


def test_ctrl_c_reaches_the_person_as_one_line() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "working\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (130, f"runtime: {LINE}")
