"""The notebooks are what their .py sources say, hold no outputs, and tell what a reader needs; CI runs them apart."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import jupytext
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
REAL = "5_a_real_model"
SOURCES = sorted(FOLDER.glob("*.py"))

pytestmark = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def cells(path, kind=None):
    """Kind and text of each cell, or the texts of one kind."""
    found = [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
    return found if kind is None else [text for of_kind, text in found if of_kind == kind]


def differences(source, notebook):
    """Places where a source and a notebook hold other cells."""
    one, other = cells(source), cells(notebook)
    return [place for place in range(max(len(one), len(other))) if one[place : place + 1] != other[place : place + 1]]


def test_there_are_five_stories_and_each_has_its_notebook(source):
    assert len(SOURCES) == 5
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in SOURCES}


def test_the_pair_holds_the_same_cells(source, tmp_path):
    assert differences(source, source.with_suffix(".ipynb")) == []
    changed = tmp_path / source.name
    changed.write_text(source.read_text(encoding="utf-8").replace("# the line to change", "# the same line"))
    assert len(differences(changed, source.with_suffix(".ipynb"))) == 1, "a change of one cell must be seen"


def test_the_notebook_holds_no_outputs_and_names_no_machine(source):
    content = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    for path in (source, source.with_suffix(".ipynb")):
        assert re.findall(r"[\"'](?:/|~|[A-Z]:\\\\)[\w.]", path.read_text(encoding="utf-8")) == []


def test_it_says_what_you_learn_what_to_change_and_what_next(source):
    first, last = cells(source)[0], cells(source)[-1]
    assert first[0] == last[0] == "markdown"
    assert first[1].startswith("# ")
    for wanted in ("What you will learn", "GPT-2 XL", "Llama", "change one line", "*Memory*", "*Time*"):
        assert wanted in first[1], wanted
    assert "## What to do next" in last[1]
    lines = "\n".join(cells(source, "code")).splitlines()
    changed = [line for line in lines if "the line to change" in line]
    assert len(changed) == 1
    assert re.fullmatch(r"model = me\.load_model\(.+\)  # the line to change", changed[0])
    assert ('me.load_model("tiny")' in changed[0]) == (source.stem != REAL), "one story alone is about another model"


def test_cells_import_call_and_look(source):
    """Whatever deserves a definition belongs in the package, with a test."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert any(isinstance(node, kinds) for node in ast.walk(ast.parse("f = lambda ax: ax"))), "what is looked for"
    for text in cells(source, "code"):
        assert not [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]


def test_what_a_notebook_writes_goes_to_a_temporary_folder(source):
    code = "\n".join(cells(source, "code"))
    writes = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
        and re.search(r"(^|\.)(save|save_figure|export|export_lora|to_\w*(csv|parquet))$", ast.unparse(node.func))
    ]
    for call in writes:
        assert any(isinstance(node, ast.Name) and node.id == "folder" for node in ast.walk(call)), ast.unparse(call)
    assert not writes or "folder = Path(tempfile.mkdtemp())" in code
    assert "tempfile" not in code or writes, "what is looked for"
