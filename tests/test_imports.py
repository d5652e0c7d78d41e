"""Rules about imports that import-linter does not state: no circle between modules, and one owner of `model.hf`."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mechedit"


def modules(package: Path) -> dict[str, Path]:
    """Dotted name of every module in a package."""
    parts = {path: path.relative_to(package.parent).with_suffix("").parts for path in package.rglob("*.py")}
    return {".".join(names[:-1] if names[-1] == "__init__" else names): path for path, names in parts.items()}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` needs the module, other names need the package.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else node.module for name in inner}
    return names & known.keys()


def check_no_circle(package: Path) -> None:
    known = modules(package)
    TopologicalSorter({name: imports(path, known) - {name} for name, path in known.items()}).prepare()


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert len(modules(PACKAGE)) > 100
    check_no_circle(PACKAGE)


def test_a_circle_through_a_function_is_noticed(tmp_path: Path) -> None:
    package = tmp_path / "toy"
    package.mkdir()
    (package / "__init__.py").write_text("from toy.first import one\n")
    (package / "first.py").write_text("from toy.second import two\n")
    (package / "second.py").write_text("two = 2\n")
    check_no_circle(package)
    (package / "second.py").write_text("def two():\n    from toy import first\n")
    with pytest.raises(CycleError, match=r"toy\.first"):
        check_no_circle(package)


def test_only_the_models_package_touches_the_transformers_model() -> None:
    """The rest asks the `Model` protocol, so that a backend may keep its weights elsewhere; `model.hf` is for users."""
    uses = {
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "hf"
    }
    assert any(use.startswith("models") for use in uses), "the search finds what it looks for"
    assert {use for use in uses if not use.startswith("models")} == set()
