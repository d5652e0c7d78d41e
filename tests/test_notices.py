"""Warnings name the line of the user's code that called, whatever decorators lie between."""

from __future__ import annotations

import ast
import json
import warnings
from pathlib import Path

import pytest
import torch

import mechedit as me
from mechedit import notices
from mechedit.notices import warn


@pytest.fixture(autouse=True)
def _checks_of_types_are_passed_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of shapes and types, which stand around our functions in tests alone."""
    monkeypatch.setattr(notices, "_PASSED_THROUGH", notices._PASSED_THROUGH | {"typechecks"})


def test_a_warning_names_the_line_that_called(tmp_path: Path) -> None:
    record = {"subject": "Rome", "prompt": "{} lies in", "target_new": "Spain"}
    file = tmp_path / "requests.json"
    file.write_text(json.dumps([{"id": "1", **record}, {"id": "2", **record, "target_new": "Peru"}]))
    with pytest.warns(UserWarning, match="left out") as caught:
        me.load_requests(file, conflicts="first")
    assert caught[0].filename == __file__
    assert "me.load_requests(file" in Path(__file__).read_text().splitlines()[caught[0].lineno - 1]


def test_decorators_are_passed_through() -> None:
    with pytest.warns(UserWarning, match="decorated") as caught:
        torch.no_grad()(warn)("decorated")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="the control") as caught:
        torch.no_grad()(warnings.warn)("the control")
    assert caught[0].filename != __file__


def test_all_warnings_of_ours_do() -> None:
    package = Path(me.__file__).parent
    calls = {
        path.name
        for path in package.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "warnings.warn"
    }
    assert calls == {"notices.py"}
