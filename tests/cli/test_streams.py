"""Standard streams that nobody reads, that are full or closed: no traceback, and no file gets what is printed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from mechedit.cli import main
from mechedit.cli.app import UNREAD, say
from mechedit.provenance import VERSION

ROOT = Path(__file__).parents[2]


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """A pipe whose reader has gone, as after `| head`."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as stream:
        yield stream


@pytest.fixture
def full() -> Iterator[TextIO]:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as stream:
        yield stream


def code_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(list(arguments))
    return int(leaving.value.code or 0)


def test_what_nobody_reads_ends_a_command_without_a_word(
    monkeypatch: pytest.MonkeyPatch, unread: TextIO, capsys: Any
) -> None:
    assert code_of("--version") == 0, "the control"
    assert capsys.readouterr().out
    monkeypatch.setattr(sys, "stdout", unread)
    assert code_of("--version") == UNREAD
    assert capsys.readouterr().err == ""
    print("what is printed later goes nowhere", flush=True)


@pytest.mark.parametrize("at_end", [True, False])
def test_progress_that_nobody_reads_ends_a_command(
    monkeypatch: pytest.MonkeyPatch, unread: TextIO, tmp_path: Path, at_end: bool
) -> None:
    """Also where it is the refusal itself."""

    def fail(*arguments: object) -> None:
        if not at_end:
            say("loading")
        raise KeyboardInterrupt

    monkeypatch.setattr("mechedit.cli.options.load_quietly", fail)
    assert code_of("trace", f"--out={tmp_path / 'run'}") == 130, "the control"
    monkeypatch.setattr(sys, "stderr", unread)
    assert code_of("trace", f"--out={tmp_path / 'run'}") == UNREAD
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_printed_is_said(monkeypatch: pytest.MonkeyPatch, full: TextIO, capsys: Any) -> None:
    monkeypatch.setattr(sys, "stdout", full)
    assert code_of("--version") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mechedit: what is printed cannot be written (No space left on device)")


SCRIPT = """
import os, sys
from mechedit.__main__ import open_streams
if sys.argv[2] == "open":
    open_streams()
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(1, b"of a library")
if sys.argv[2] == "open":
    print("to nobody", flush=True)
    print("to nobody", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path, closed: tuple[int, ...]) -> None:
    file = tmp_path / "file"

    def close() -> None:
        for number in closed:
            os.close(number)

    def run(how: str) -> int:
        command = [sys.executable, "-c", SCRIPT, str(file), how]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=close).returncode

    assert run("open") == 0
    assert file.read_bytes() == b""
    run("leave")
    assert file.read_bytes() == b"of a library" or 0 in closed, "the control"


def test_what_a_terminal_cannot_show_is_written_out() -> None:
    script = r"from mechedit.__main__ import open_streams; {}print('layers 2\u20135 \ud800')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    for call, code, printed in (("open_streams(); ", 0, b"layers 2\\u20135 \\ud800\n"), ("", 1, b"")):
        command = [sys.executable, "-c", script.format(call)]
        ended = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert (ended.returncode, ended.stdout) == (code, printed)


def test_odd_variables_of_the_terminal_end_no_command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Of such variables libraries of the command line end with 1 or in a traceback."""
    monkeypatch.setenv("_MECHEDIT_COMPLETE", "bash_source")
    monkeypatch.setenv("TERMINAL_WIDTH", "wide")
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out.strip() == VERSION
    with pytest.raises(SystemExit) as leaving:
        main(["report", "--help"])
    assert leaving.value.code == 0


def test_a_line_is_printed_by_one_write_so_that_nothing_comes_between_it_and_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys, "stderr", type("Stream", (), {"write": lambda self, text: written.append(text)})())
    say("layers 1–2")
    assert [text for text in written if text] == ["layers 1–2\n"]
    written.clear()
    print("layers 1–2", file=sys.stderr)
    assert written == ["layers 1–2", "\n"], "the control: print itself takes two"
