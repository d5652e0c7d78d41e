"""Ctrl-C while Python still imports: one line and exit code 130, from the first line of the entry module on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW = """
import sys, time
print("importing", flush=True)
time.sleep(60)
"""
SWALLOWS = """
import sys, time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:
    pass
time.sleep(60)
"""
"""A library that catches whatever happens while it looks for another one."""


def entries() -> dict[str, list[str]]:
    """The ways to start a command: the module, and the script that is installed for it."""
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["mechedit"]
    module, _, function = script.partition(":")
    return {
        "module": ["-m", "mechedit", "--version"],
        "script": ["-c", f"import sys; from {module} import {function}; sys.exit({function}())", "--version"],
    }


def heed_interrupts() -> None:
    """A shell starts what runs in its background deaf to Ctrl-C, and so would be what the tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("library", ["torch", "typer"])
@pytest.mark.parametrize("content", [SLOW, SWALLOWS], ids=["slow", "swallows"])
@pytest.mark.parametrize("entry", ["module", "script"])
def test_an_interrupt_during_imports_is_one_line(tmp_path: Path, library: str, content: str, entry: str) -> None:
    (tmp_path / f"{library}.py").write_text(content)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, *entries()[entry]]
    child = subprocess.Popen(
        command, text=True, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, preexec_fn=heed_interrupts, **pipes
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "importing\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert errors == "mechedit: interrupted; the same command goes on from what is finished\n"


def test_the_package_alone_imports_no_library() -> None:
    code = "import sys, mechedit; print(sorted({'torch', 'typer', 'pandas', 'transformers'} & set(sys.modules)))"
    code += "; mechedit.Edit; print('torch' in sys.modules, 'Edit' in dir(mechedit), mechedit.models.__name__)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout == "[]\nTrue True mechedit.models\n"


def test_all_names_of_the_package_are_there() -> None:
    import mechedit

    names: dict[str, object] = {}
    exec("from mechedit import *", names)
    assert set(mechedit.__all__) <= names.keys()
    assert len(mechedit.__all__) > 50
    modules = {path.stem for path in (ROOT / "mechedit").iterdir()}
    assert "models" in modules
    assert not modules & set(mechedit.__all__), "a name is that of a module or of something else"
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        mechedit.absent  # noqa: B018
