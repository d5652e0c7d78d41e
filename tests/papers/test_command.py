"""How a script of the papers ends, and what it refuses before anything is loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analyses.common.command import open_experiment, options, run_script
from analyses.common.experiment import Experiment
from analyses.papers import (
    ablate_lambda,
    ablate_layers,
    finetune_decay,
    fresh_knowledge,
    integrated_gradients,
    mixtures,
    relations,
    rome_grid,
    runtime,
    scaling_curve,
    serac,
    table_counterfact,
    table_zsre,
)
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


class LoadedError(Exception):
    """The model was to be loaded."""


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise LoadedError

    monkeypatch.setattr("analyses.common.inputs.load_quietly", refuse)


REFUSED = [
    (ablate_layers, ["--damping", "nan"], "--damping is nan, expected a number from 0 to 1e\\+30"),
    (ablate_layers, ["--damping", "-1"], "--damping is -1.0"),
    (ablate_lambda, ["--decades", "nan"], "--decades is nan"),
    (ablate_lambda, ["--decades", "400"], "--decades is 400.0, expected a number from 0.5 to 20"),
    (ablate_lambda, ["--decades", "0"], "--decades is 0.0, expected a number from 0.5 to 20"),
    (finetune_decay, ["--decades", "400"], "--decades is 400.0, expected a number from 0 to 20"),
    (finetune_decay, ["--decades-below", "inf"], "--decades-below is inf"),
    (rome_grid, ["--tokens-at", ""], "a token of --tokens-at is ''"),
    (rome_grid, ["--damping", "nan"], "--damping is nan"),
    (integrated_gradients, ["--cases", "0"], "--cases is 0, expected at least 1"),
    (integrated_gradients, ["--quick", "--cases", "21"], "--cases is 21, expected 1 to 20"),
    (relations, ["--per-relation", "0"], "--per-relation is 0, expected at least 1"),
    (scaling_curve, ["--min-records", "0"], "--min-records is 0, expected at least 1"),
    (serac, ["--training", "0"], "--training is 0, expected at least 1"),
    (mixtures, ["--edits", ""], "--edits '' cannot be read"),
    (fresh_knowledge, ["--words", "0"], "--words is 0, expected at least 1"),
    (table_counterfact, ["--free", "-1"], "--free is -1"),
    *((script, ["--methods", ""], "the methods are none") for script in (runtime, table_counterfact, table_zsre)),
]


@pytest.mark.parametrize(("script", "words", "message"), REFUSED)
def test_an_option_that_cannot_be_meant_is_refused_before_the_model_is_loaded(
    script: Any, words: list[str], message: str, tmp_path: Path, no_model: None
) -> None:
    with pytest.raises(InputError, match=message):
        script.main([*words, "--out", str(tmp_path)])
    with pytest.raises(LoadedError):  # the control
        script.main(["--out", str(tmp_path)])


@pytest.mark.parametrize("option", ["--count", "--max-facts", "--samples", "--documents", "--max-length"])
def test_no_script_takes_0_for_a_default(option: str, tmp_path: Path) -> None:
    def opened(*words: str) -> Experiment:
        return open_experiment("try", options("Try."), ["--out", str(tmp_path), *words])

    name = option.removeprefix("--").replace("-", "[-_]")
    for text in ("0", "-1"):
        with pytest.raises(InputError, match=f"{name} is {text}, expected"):
            opened(option, text)
    assert getattr(opened(option, "3").arguments, option.removeprefix("--").replace("-", "_")) == 3
    assert opened("--tokens", "0").reading.tokens is None  # of the text, 0 are all of it
