"""Names say what is in them, not that it was found, kept or wanted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"mechedit": 101, "analyses": 30, "benchmarks": 3}
"""Folders looked at, each with the least number of files it has: fewer, and the test looks in the wrong place."""
SILENT = {
    "found", "some", "one", "other", "own", "kept", "held", "wanted", "place", "alike", "together", "made", "said",
    "each", "lost", "left", "share", "named", "asked", "moved", "whole", "given",
}  # fmt: skip
"""Words that say nothing of what a variable holds."""
TERMS = {
    # The factors of ΔW = left · right, as edit files name them.
    "left": ("mechedit/edit/", "mechedit/solve/", "mechedit/methods/"),
    # SelectConfig.share; a layer's share of the residual; a field in the header of a checkpoint
    "share": ("mechedit/selection/", "mechedit/methods/", "mechedit/moments/checkpoints.py"),
    "place": ("mechedit/moments/checkpoints.py",),  # a field there too
    "found": ("mechedit/selection/early_site.py",),  # a field of selection.json
    "other": ("mechedit/evaluation/scores.py", "mechedit/solve/saddle_point.py"),  # the second operand of join and +
}
"""Where such a word is a term."""


def silent_names(source: str) -> Iterator[str]:
    """Every silent word that is assigned, looped over or taken as a parameter."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in SILENT:
            yield f"{node.lineno}: {node.id}"
        if isinstance(node, ast.arg) and node.arg in SILENT:
            yield f"{node.lineno}: {node.arg}"


def is_term(path: str, name: str) -> bool:
    return path.startswith(TERMS.get(name, ("/",)))


def test_no_name_is_silent() -> None:
    files_by_folder = {folder: sorted((ROOT / folder).rglob("*.py")) for folder in FOLDERS}
    assert all(len(files_by_folder[folder]) >= least for folder, least in FOLDERS.items())
    silent = {
        f"{path.relative_to(ROOT)}:{name}"
        for files in files_by_folder.values()
        for path in files
        for name in silent_names(path.read_text(encoding="utf-8"))
        if not is_term(path.relative_to(ROOT).as_posix(), name.rpartition(" ")[2])
    }
    assert silent == set()


def test_a_silent_name_would_be_seen() -> None:
    source = (
        "def read(wanted):\n    found = [one for one in wanted]\n    for place, rows in found:\n        rows = place\n"
    )
    assert list(silent_names(source)) != []
    assert {name.rpartition(" ")[2] for name in silent_names(source)} == {"wanted", "found", "one", "place"}
