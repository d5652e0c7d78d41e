"""README's map names every folder of the package, and goes from the topmost layer down."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.*?) \|", README.partition("## The map")[2].partition("Imports go one way")[0], re.MULTILINE)
ENTRIES = [entry for row in ROWS for entry in re.findall(r"`([^`]+)`", row)]


def test_the_map_names_every_folder_and_no_file_that_is_not_there() -> None:
    package = ROOT / "mechedit"
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert len(folders) > 15, "the control: there are folders to name"
    assert folders <= set(ENTRIES)
    assert all((package / entry).exists() for entry in ENTRIES)


def test_the_map_is_in_the_order_of_the_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    depth = {name: i for i, layer in enumerate(layers) for name in layer.split(" | ")}
    depths = [depth[entry.removesuffix("/").removesuffix(".py")] for entry in ENTRIES]
    assert len(set(depths)) > 10, "the control: entries of many layers"
    assert depths == sorted(depths)
