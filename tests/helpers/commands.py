"""The command line, called in process."""

from __future__ import annotations

import pytest

from mechedit.cli import main


def call(*arguments: object) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command says as it refuses."""
    assert call(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mechedit:")]
    assert len(lines) == 1
    return lines[0]
