"""Damaged files: their structure, as their format has it, or their bytes; what the fuzz does to what commands read."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Damage:
    """A change of one file, repeatable by its seed."""

    file: str
    """Its path, or a pattern of which the first file is meant."""
    seed: int

    def apply(self, folder: Path) -> None:
        """Damage the file in a folder; mostly one without checksums, which would hide what its readers do."""
        draw = random.Random(self.seed)
        path = min(folder.glob(self.file), default=folder / self.file)
        if draw.random() < 0.75:
            forget_checksums(path)
        damage_file(path, draw)


@dataclass(frozen=True)
class Obstacle:
    """Something in the place of what a command writes: it is replaced or refused, and nothing else is touched."""

    file: str
    """Its path."""
    thing: str
    """One of `OBSTACLES`."""

    def apply(self, folder: Path) -> None:
        """Put it there."""
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if self.thing == "folder":
            path.mkdir()
            (path / "precious").write_text("of the user")
        elif self.thing == "file":
            path.write_text("of the user")
        else:
            path.symlink_to(self.thing)


OBSTACLES = ("folder", "file", "/dev/null", "/dev/full", "nowhere", "no/where", ".")
"""A folder or file of the user's, or where a link leads."""

_VALUES: list[Any] = [
    None, True, [], {}, "", 0, -1, 1.5, 10**30, 1e308, float("nan"), float("inf"), "\ud800", "a" * 20_000, "{}", "\x00",
    [[[[]]]], {"a": {"b": None}}, "1", ["a"], -(2**63), "é\n",
]  # fmt: skip


def forget_checksums(path: Path) -> None:
    """Make a file one of an earlier release, and its folder's stamps too."""
    stamps = path.parent / "config.json"
    if stamps.is_file():
        content = json.loads(stamps.read_text())
        for stamp in content.get("steps", {}).values():
            stamp.pop("files", None)
        stamps.write_text(json.dumps(content))
    if path.name in ("selection.json", "summary.json") and path.is_file():
        content = json.loads(path.read_text())
        content.pop("sha256", None)
        path.write_text(json.dumps(content))
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        for name, text in header["__metadata__"].items():
            fields = json.loads(text)
            if isinstance(fields, dict):
                header["__metadata__"][name] = json.dumps(
                    {key: value for key, value in fields.items() if key not in ("header_sha256", "sha256")}
                )
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def damage_file(path: Path, draw: random.Random) -> None:
    """Damage a file: its structure, as its format has it, or its bytes."""
    if not path.is_file():
        return
    by_structure: dict[str, Callable[[Path, random.Random], None]] = {
        ".json": damage_json,
        ".jsonl": damage_jsonl,
        ".csv": damage_csv,
        ".parquet": damage_parquet,
        ".safetensors": damage_safetensors,
        ".yaml": damage_yaml,
    }
    if path.suffix in by_structure and draw.random() < 0.75:
        by_structure[path.suffix](path, draw)
    else:
        damage_bytes(path, draw)


def damage_bytes(path: Path, draw: random.Random) -> None:
    """Cut the file, flip bits, put bytes in, empty it, or replace it by something else."""
    content = bytearray(path.read_bytes())
    match draw.randrange(7):
        case 0:
            content = content[: draw.randrange(len(content) + 1)]
        case 1:
            for _ in range(draw.choice([1, 1, 3, 30])):
                if content:
                    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        case 2:
            place = draw.randrange(len(content) + 1)
            content[place:place] = draw.choice([b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\xc3\x28", b"\n" * 9])
        case 3:
            content = bytearray(draw.choice([b"", b"\n", b"null", b"[]", b"{}", b"0", b"\xff", b"<html></html>"]))
        case 4:
            content = bytearray(draw.choice([b"[" * 100_000, b'{"a":' * 5_000, b"9" * 5_000, b"a" * 200_000]))
        case 5:
            content = content + bytes(content)
        case _:
            content = bytearray(bytes(content).replace(b'"', b"'")[: draw.randrange(1, len(content) + 2)])
    path.write_bytes(bytes(content))


def damaged_tree(tree: Any, draw: random.Random) -> Any:
    """A JSON value with one node changed: replaced, left out, doubled or renamed."""
    places = list(_places(tree, ()))
    place = draw.choice(places)
    if not place:
        return draw.choice(_VALUES)
    parent = tree
    for step in place[:-1]:
        parent = parent[step]
    key = place[-1]
    match draw.randrange(5):
        case 0 | 1:
            parent[key] = draw.choice(_VALUES)
        case 2:
            del parent[key]
        case 3 if isinstance(parent, list):
            parent.extend([parent[key]] * draw.choice([1, 3]))
        case 3:
            parent[f"{key}2"] = parent.pop(key)
        case _:
            parent[key] = [parent[key]] if draw.random() < 0.5 else {"str": parent[key]}
    return tree


def _places(tree: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield place
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children:
        yield from _places(child, (*place, key))


def damage_json(path: Path, draw: random.Random) -> None:
    """Change some nodes."""
    tree = json.loads(path.read_text())
    for _ in range(draw.choice([1, 1, 2])):
        tree = damaged_tree(tree, draw)
    path.write_text(json.dumps(tree))


def damage_jsonl(path: Path, draw: random.Random) -> None:
    """Change a line."""
    lines = path.read_text().splitlines()
    index = draw.randrange(len(lines))
    lines[index] = json.dumps(damaged_tree(json.loads(lines[index]), draw))
    path.write_text("\n".join(lines))


def damage_yaml(path: Path, draw: random.Random) -> None:
    """Add a line."""
    line = draw.choice(
        ["seed: null", "seed: 1\nseed: 2", "seed: [1]", "a: {", "2024-02-31", "seed: 2024-02-31", "no-such: 1", "- a",
         "*a", "seed: &a [*a]", "seed: !!python/object:os.system x", "? [1]\n: 2", "seed: 1e400", "seed: 0o17",
         "out: ''", "seed: ~", "seed: 'x'", "seed: true", "\t", "%YAML 9", "seed: " + "9" * 5000, "overwrite: maybe",
         "seed: !!bool x", "seed: !!timestamp x", "seed: !!int ''", "seed: !!float", "joint: \"\\ud800\"",
         "? !!bool x\n: 1", "seed: !!set {a}", "seed: 0b_", "seed: 1:30"]
    )  # fmt: skip
    path.write_text(path.read_text() + line + "\n")


def damage_csv(path: Path, draw: random.Random) -> None:
    """Change a cell, a row or the heading."""
    rows = [line.split(",") for line in path.read_text().splitlines()]
    row = draw.randrange(len(rows))
    cell = draw.randrange(len(rows[row]))
    match draw.randrange(5):
        case 0:
            rows[row][cell] = draw.choice(["", " ", '"', "a" * 200_000, "\x00", "{}", "nan", "a,b", "é", "1e999"])
        case 1:
            del rows[row][cell]
        case 2:
            rows[row].append("more")
        case 3:
            rows.append(rows[row])
        case _:
            rows = rows[:1]
    path.write_text("\n".join(",".join(cells) for cells in rows))


def damage_parquet(path: Path, draw: random.Random) -> None:
    """Change a column, the rows or the attributes."""
    frame = pd.read_parquet(path)
    attrs = dict(frame.attrs)
    column = draw.choice(list(frame.columns))
    match draw.randrange(8):
        case 0:
            frame = frame.drop(columns=column)
        case 1:
            frame[column] = frame[column].astype(str)
        case 2:
            frame[column] = draw.choice([None, float("nan"), float("inf"), -1, 10**18, "", "x", 1e308])
        case 3:
            frame = frame.iloc[: draw.choice([0, 1, len(frame) // 2])]
        case 4:
            frame = pd.concat([frame, frame])
        case 5:
            frame = frame.rename(columns={column: f"{column}2"})
        case 6:
            attrs = draw.choice([{}, {"provenance": 1}, damaged_tree(json.loads(json.dumps(attrs, default=str)), draw)])
            attrs = attrs if isinstance(attrs, dict) else {}
        case _:
            frame = frame.sample(frac=1, random_state=draw.randrange(2**31))
    frame.attrs = attrs
    frame.to_parquet(path)


def damage_safetensors(path: Path, draw: random.Random) -> None:
    """Change the header: its metadata, a dtype, a shape or an offset; or the size that stands before it."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if draw.random() < 0.6:
        metadata = header.get("__metadata__", {})
        for name, text in list(metadata.items()):
            changed = damaged_tree(json.loads(text), draw)
            metadata[name] = json.dumps(changed)
    elif draw.random() < 0.8:
        header = damaged_tree(header, draw)
    else:
        size = draw.choice([0, 1, 2**40, 2**63, size - 1, size + 1])
        path.write_bytes(struct.pack("<Q", size) + content[8:])
        return
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
