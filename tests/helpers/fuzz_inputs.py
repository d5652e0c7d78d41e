"""What the fuzz tries: command lines built from the parsers and settings, and files damaged in their structure.

An `Example` is a command that works, with some of its options replaced and perhaps one of the files that it reads
damaged. Options and their types come from the command line's own parameters, choices from the settings' annotations.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pandas as pd
from hypothesis import strategies as st

from mechedit.cli.app import app
from mechedit.evaluation import EvaluationConfig
from mechedit.methods import METHODS
from mechedit.moments import MomentsConfig
from mechedit.selection import RULES, SelectConfig
from mechedit.sweep import SweepConfig
from mechedit.trace import METRICS, Approximation, Corruption, TraceConfig
from mechedit.tuning import TuneConfig

COMMANDS: Mapping[str, Any] = {command.name: command.callback for command in app.registered_commands}  # type: ignore[misc]

BASE: dict[str, dict[str, str]] = {
    "trace": {
        "facts": "facts.json",
        "samples": "1",
        "kinds": "state",
        "sever": "nothing,mlp",
        "roles": "subject_last,last",
        "max-facts": "2",
        "out": "out",
    },
    "select": {"": "run"},
    "moments": {"layers": "0", "texts": "texts.txt", "out": "out"},
    "edit": {"requests": "requests.json", "layers": "0", "moments": "run", "set": "steps=1", "out": "new.safetensors"},
    "evaluate": {
        "requests": "requests.json",
        "generation-prompts": "1",
        "generation-tokens": "2",
        "edit": "edit.safetensors",
        "out": "out",
    },
    "apply": {"edit": "edit.safetensors", "format": "lora", "out": "out"},
    "report": {"": "run"},
    "tune": {
        "": "tiny",
        "requests": "many.json",
        "moments": "run",
        "windows": "0-0,0-1",
        "facts": "4",
        "edits": "8",
        "set": "steps=1",
        "out": "out",
    },
    "run": {
        "facts": "facts.json",
        "requests": "requests.json",
        "texts": "texts.txt",
        "layers": "0",
        "samples": "1",
        "max-facts": "1",
        "max-requests": "1",
        "generation-prompts": "1",
        "generation-tokens": "2",
        "set": "steps=1",
        "out": "out",
    },
}
"""For each command, options with which it works in the folder that `make_base` fills; "" is its argument."""
READ: dict[str, tuple[str, ...]] = {
    "trace": ("facts.json", "facts.csv", "facts.jsonl", "config.yaml"),
    "select": ("run/effects.parquet", "run/facts.parquet", "run/config.json", "run/selection.json", "config.yaml"),
    "moments": ("texts.txt", "texts.jsonl", "run/moments/layer_0.safetensors"),
    "edit": ("requests.json", "requests.csv", "run/moments/layer_0.safetensors", "run/selection.json", "config.yaml"),
    "evaluate": ("requests.json", "edit.safetensors", "texts.txt", "run/selection.json"),
    "apply": ("edit.safetensors",),
    "report": (
        "run/effects.parquet",
        "run/facts.parquet",
        "run/config.json",
        "run/summary.json",
        "run/selection.json",
        "run/scores.parquet",
        "edit.safetensors",
    ),
    "tune": ("many.json", "run/moments/layer_0.safetensors", "config.yaml"),
    "run": ("facts.json", "requests.json", "texts.txt", "config.yaml"),
}
"""Files that a command reads, which may be damaged; the command is pointed to them."""
READERS = {"facts": "facts", "requests": "requests", "texts": "texts", "edit": "edit", "config": "config"}
"""The option that takes a file, by the beginning of its name."""

GOOD_TEXT: dict[str, list[str]] = {
    "layers": ["0", "1", "0-1", "0,2", "0-2"],
    "windows": ["0-1", "0,1", "0-1,1-2"],
    "sever": ["nothing", "mlp", "attn", "nothing,mlp@0-1", "mlp@1:last"],
    "roles": ["subject_last", "last", "subject_last,last", "subject_first"],
    "kinds": ["state", "mlp", "attn", "state,mlp"],
    "corruption": ["gaussian", "uniform", "student"],
    "metrics": [*METRICS, "probability,kl"],
    "metric": list(METRICS),
    "method": list(METHODS),
    "rule": list(RULES),
    "model": ["tiny"],
    "backend": ["transformer_lens", "nnsight"],
    "device": ["cpu"],
    "dtype": ["float32"],
    "facts": ["facts.json", "facts.csv", "facts.jsonl"],
    "requests": ["requests.json", "requests.csv", "many.json"],
    "texts": ["texts.txt", "texts.jsonl"],
    "references": [],
    "out": ["out", "run", "deeper/out"],
    "edit": ["edit.safetensors"],
    "moments": ["run"],
    "selection": ["run/selection.json"],
    "show": ["edit.safetensors"],
    "config": ["config.yaml"],
    "npz": ["stats"],
    "shard": ["0/1", "0/2", "1/2"],
    "joint": ["", " ", "\n"],
    "stop-words": [".", ",", "a"],
    "by": ["trace"],
    "replace": ["run"],
    "points": ["1", "2"],
}
BAD_TEXT = [
    "", " ", ",", "=", "x=y", "-1", "nan", "null", "[]", "{}", "{}{}", "%s", "../..", "3-1", "1,,2", "0,0", "0-0-0",
    "1-999999999", "mlp@1-99999999999", "mlp@", "9" * 5000, "a" * 5000, "é" * 300, "a\x00b", "\ud800", "\n", "\u202e",
    "nothing", "a/b", "run", "facts.json", "run/effects.parquet", "edit.safetensors", "no_such_file", "/dev/null",
    "steps=", "steps=nan", "steps=-1", "steps=9" + "9" * 400, "lr=inf", "=1", "steps=1=2", "damping=-1", "damping=nan",
]  # fmt: skip
BAD_NUMBERS = ["nan", "inf", "-inf", "-1", "-0.5", "1e31", "1e400", str(2**63), str(2**64), "9" * 5000, "", "x", "1_0",
               "0x10", "１", " 1", "1e-320", "0", "1.5", "1000000000"]  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """A change of one file, repeatable by its seed."""

    file: str
    seed: int

    def apply(self, folder: Path) -> None:
        """Damage the file in a folder; mostly one without checksums, which would hide what its readers do."""
        draw = random.Random(self.seed)
        path = folder / self.file
        if draw.random() < 0.75:
            forget_checksums(path)
        damage_file(path, draw)


@dataclass(frozen=True)
class Example:
    """A command line, and the damage done to the files before it runs."""

    command: str
    arguments: tuple[str, ...]
    options: tuple[str, ...]
    """Names of the options that were changed."""
    damage: Damage | None
    draws: bool
    """Whether figures are drawn, which takes most of the time."""

    def __str__(self) -> str:
        shown = [f"{word[:60]}… ({len(word)})" if len(word) > 80 else word for word in self.arguments]
        return f"{shown} damage={self.damage}".encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Parameter:
    """An option of a command."""

    name: str
    """With dashes; "" for the command's argument."""
    hint: Any
    """What it is annotated as."""

    @property
    def kinds(self) -> set[Any]:
        """The types that it may have."""
        return {self.hint, *get_args(self.hint)}


def parameters(command: str) -> dict[str, Parameter]:
    """A command's parameters by name."""
    by_name = {}
    for name, parameter in inspect.signature(COMMANDS[command]).parameters.items():
        hint, declared = get_args(parameter.annotation)[:2]
        dashed = "" if type(declared).__name__ == "ArgumentInfo" else name.replace("_", "-")
        by_name[dashed] = Parameter(dashed, hint)
    return by_name


def choices() -> dict[str, list[str]]:
    """The values of every field of the settings that is annotated as a Literal."""
    kinds = [
        TraceConfig,
        Corruption,
        Approximation,
        SelectConfig,
        SweepConfig,
        EvaluationConfig,
        MomentsConfig,
        TuneConfig,
    ]
    by_name: dict[str, list[str]] = {}
    for kind in [*kinds, *(method.config for method in METHODS.values())]:
        for name, hint in get_type_hints(kind).items():
            values = list(_literals(hint))
            if values:
                by_name.setdefault(name.replace("_", "-"), []).extend(map(str, values))
    return by_name


def _literals(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for part in get_args(hint):
            yield from _literals(part)


def settings_of_methods() -> list[str]:
    """`name=value` for every setting of every method, with its default."""
    return sorted(
        {
            f"{field.name}={field.default}"
            for method in METHODS.values()
            for field in dataclasses.fields(method.config)
            if field.name not in ("steps", "kl_prompt")
        }
    )


_CHOICES = choices()
_SETTINGS = settings_of_methods()


def good_values(name: str, param: Parameter) -> st.SearchStrategy[str]:
    """Values of an option that can be meant."""
    if name == "set":
        return st.sampled_from([*_SETTINGS, "steps=1", "steps=2"])
    if GOOD_TEXT.get(name):
        return st.sampled_from(GOOD_TEXT[name])
    if name in _CHOICES:
        return st.sampled_from(_CHOICES[name])
    if literals := list(_literals(param.hint)):
        return st.sampled_from(literals)
    if int in param.kinds:
        return st.integers(1, 4).map(str)
    if float in param.kinds:
        return st.sampled_from(["1", "2", "0.5", "3.0"])
    return st.sampled_from(["a", "b c"])


def bad_values(param: Parameter) -> st.SearchStrategy[str]:
    """Values of an option that cannot be meant, and some that can."""
    if {int, float} & param.kinds:
        return st.sampled_from(BAD_NUMBERS) | st.floats().map(str) | st.integers().map(str)
    return st.sampled_from(BAD_TEXT) | st.text(max_size=20)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """A command that works, with up to three options replaced and perhaps a file damaged."""
    weights = {
        "trace": 3,
        "select": 3,
        "moments": 3,
        "edit": 4,
        "evaluate": 3,
        "apply": 2,
        "report": 1,
        "run": 1,
        "tune": 1,
    }
    command = draw(st.sampled_from([name for name, weight in weights.items() for _ in range(weight)]))
    available = parameters(command)
    values: dict[str, str | None] = dict(BASE[command])
    changed = draw(st.lists(st.sampled_from(sorted(available)), max_size=3, unique=True))
    for name in changed:
        param = available[name]
        if bool in param.kinds:
            values[name] = None
        elif draw(st.integers(0, 9)) < 6 and name:
            values[name] = draw(good_values(name, param))
        else:
            values[name] = draw(bad_values(param))
    damage = None
    if draw(st.integers(0, 9)) < 4:
        damage = Damage(draw(st.sampled_from(READ[command])), draw(st.integers(0, 2**32)))
        option = next((name for start, name in READERS.items() if Path(damage.file).name.startswith(start)), None)
        if option in available and "/" not in damage.file and option not in changed:
            values[option] = damage.file
        elif damage.file == "run/selection.json" and command == "edit":
            values |= {"selection": damage.file}
            values.pop("layers", None)
    words = [] if "" not in values else [str(values.pop(""))]
    for name, value in values.items():
        words += [f"--{name}"] if value is None else [f"--{name}={value}"]
    return Example(command, (command, *words), tuple(changed), damage, draw(st.integers(0, 19)) == 0)


# -- damage ------------------------------------------------------------------------------------------------------------

_VALUES: list[Any] = [
    None, True, [], {}, "", 0, -1, 1.5, 10**30, 1e308, float("nan"), float("inf"), "\ud800", "a" * 20_000, "{}", "\x00",
    [[[[]]]], {"a": {"b": None}}, "1", ["a"], -(2**63), "é\n",
]  # fmt: skip


def forget_checksums(path: Path) -> None:
    """Make a file one of an earlier release, and its folder's stamps too."""
    stamps = path.parent / "config.json"
    if stamps.is_file():
        content = json.loads(stamps.read_text())
        for stamp in content["steps"].values():
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
         "out: ''", "seed: ~", "seed: 'x'", "seed: true", "\t", "%YAML 9", "seed: " + "9" * 5000, "overwrite: maybe"]
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
