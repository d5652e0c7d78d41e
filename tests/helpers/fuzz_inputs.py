"""What the fuzz tries: command lines built from the parsers and settings, and which file is damaged (`fuzz_damage`).

An `Example` is a command that works, with some of its options replaced and perhaps one of the files that it reads
damaged. Options and their types come from the command line's own parameters, choices from the settings' annotations.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from helpers.fuzz_base import TRAINING
from helpers.fuzz_damage import OBSTACLES, Damage, Obstacle
from mechedit.cli.app import app
from mechedit.evaluation import EvaluationConfig
from mechedit.methods import METHODS, MendTrainingConfig
from mechedit.moments import MomentsConfig
from mechedit.planning import PromptShape
from mechedit.selection import RULES, SelectConfig
from mechedit.sweep import SweepConfig
from mechedit.trace import METRICS, Approximation, Corruption, TraceConfig
from mechedit.tuning import TuneConfig

SETTINGS = (
    TraceConfig, Corruption, Approximation, SelectConfig, SweepConfig, EvaluationConfig, MomentsConfig, TuneConfig,
    MendTrainingConfig, PromptShape,
)  # fmt: skip
"""Settings whose fields are options."""
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
    "plan": {"": "tiny", "rate": "1e12"},
    "train-mend": {**TRAINING, "out": "out/mend.safetensors"},
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
WEIGHTS = {
    "trace": 3, "select": 3, "moments": 3, "edit": 4, "evaluate": 3, "apply": 2, "report": 1, "run": 1, "tune": 1,
    "train-mend": 2, "plan": 2,
}  # fmt: skip
"""How often each command is tried, beside the others."""
READ: dict[str, tuple[str, ...]] = {
    "trace": ("facts.json", "facts.csv", "facts.jsonl", "config.yaml"),
    "select": ("run/effects.parquet", "run/facts.parquet", "run/config.json", "run/selection.json", "config.yaml"),
    "moments": ("texts.txt", "texts.jsonl", "run/moments/layer_0.safetensors"),
    "edit": (
        "requests.json", "requests.csv", "run/moments/layer_0.safetensors", "run/selection.json", "config.yaml",
        "tuned/tuned.json", "mend.safetensors", "edit.safetensors",
    ),
    "evaluate": ("requests.json", "edit.safetensors", "texts.txt", "run/selection.json"),
    "apply": ("edit.safetensors",),
    "report": (
        "run/effects.parquet", "run/facts.parquet", "run/config.json", "run/summary.json", "run/selection.json",
        "run/scores.parquet", "edit.safetensors",
    ),
    "plan": ("model/config.json", "config.yaml"),
    "train-mend": ("many.json", "texts.txt", "mend.safetensors", "half.training.safetensors", "config.yaml"),
    "tune": ("many.json", "run/moments/layer_0.safetensors", "config.yaml", "tuned/ledger/*.json"),
    "run": ("facts.json", "requests.json", "texts.txt", "config.yaml"),
}  # fmt: skip
"""Files that a command reads, which may be damaged; the command is pointed to them."""
WRITTEN: dict[str, tuple[str, ...]] = {
    "trace": ("out", "out/effects.parquet", "out/facts.parquet", "out/config.json", "out/trace_parts"),
    "select": ("run/selection.json", "run/config.json"),
    "moments": ("out", "out/moments", "out/moments/layer_0.safetensors", "out/moments/parts"),
    "edit": ("new.safetensors", "cache"),
    "evaluate": ("out", "out/summary.json", "out/scores.parquet", "out/config.json", "out/baseline"),
    "apply": ("out",),
    "report": ("run/report.html",),
    "plan": ("models",),
    "train-mend": ("out", "out/mend.safetensors", "out/mend.training.safetensors"),
    "tune": ("out", "out/tuned.json", "out/ledger", "out/targets", "out/parts"),
    "run": ("out", "out/effects.parquet", "out/moments", "out/edit.safetensors", "out/summary.json"),
}
"""Files and folders that a command writes, in whose place something else may lie."""
READERS = {"facts": "facts", "requests": "requests", "many": "requests", "texts": "texts", "config": "config"}
"""The option that takes a file of the folder itself, by the beginning of its name."""
POINTED: dict[tuple[str, str], dict[str, str | None]] = {
    ("edit", "run/selection.json"): {"selection": "run/selection.json"},
    ("edit", "tuned/tuned.json"): {"tuned": "tuned/tuned.json"},
    ("edit", "mend.safetensors"): {"method": "mend", "set": "editor=mend.safetensors"},
    ("edit", "edit.safetensors"): {"show": "edit.safetensors"},
    ("evaluate", "edit.safetensors"): {"edit": "edit.safetensors"},
    ("plan", "model/config.json"): {"": "model"},
    ("train-mend", "mend.safetensors"): {"out": "mend.safetensors"},
    ("train-mend", "half.training.safetensors"): {"out": "half.safetensors"},
    ("tune", "tuned/ledger/*.json"): {"out": "tuned"},
}
"""Options by which a command is pointed to other files that it reads."""
LEFT_OUT = {"run/selection.json": "layers", "tuned/tuned.json": "layers", "mend.safetensors": "layers"}
"""The option that stands in the way of a file."""

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
    "argument of plan": ["tiny", "model", "model/config.json"],
    "argument of train-mend": ["tiny"],
    "argument of tune": ["tiny"],
    "argument of select": ["run"],
    "argument of report": ["run"],
    "backend": ["transformer_lens", "nnsight"],
    "device": ["cpu"],
    "dtype": ["float32"],
    "facts": ["facts.json", "facts.csv", "facts.jsonl"],
    "requests": ["requests.json", "requests.csv", "many.json"],
    "texts": ["texts.txt", "texts.jsonl"],
    "references": [],
    "out": ["out", "run", "deeper/out"],
    "out of train-mend": ["deeper/mend.safetensors", "mend.safetensors", "half.safetensors"],
    "tuned": ["tuned/tuned.json"],
    "trace": ["run"],
    "with": ["many.json"],
    "without": ["0", "1"],
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
               "0x10", "１", " 1", "1e-320", "0", "1.5", "1000000000", str(10**15), str(2**63 - 1)]  # fmt: skip
LONG = {("train-mend", "steps"): 2**63, ("trace", "samples"): 100_000, ("run", "samples"): 100_000}
"""Numbers of which a large one is meant, and takes as long as it says, with the largest that is allowed."""
OPTIONAL = {("plan", "rate"), ("edit", "layers"), ("train-mend", "layers")}
"""Options that a command does without in good time."""


@dataclass(frozen=True)
class Example:
    """A command line, and the damage done to the files before it runs."""

    command: str
    arguments: tuple[str, ...]
    options: tuple[str, ...]
    """Names of the options that were changed."""
    damage: Damage | Obstacle | None
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
        dashed = "" if type(declared).__name__ == "ArgumentInfo" else name.rstrip("_").replace("_", "-")
        by_name[dashed] = Parameter(dashed, hint)
    return by_name


def choices() -> dict[str, list[str]]:
    """The values of every field of the settings that is annotated as a Literal."""
    by_name: dict[str, list[str]] = {}
    for kind in [*SETTINGS, *(method.config for method in METHODS.values())]:
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


def good_values(command: str, param: Parameter) -> st.SearchStrategy[str]:
    """Values of an option that can be meant."""
    name = param.name
    if name == "set":
        return st.sampled_from([*_SETTINGS, "steps=1", "steps=2"])
    texts = GOOD_TEXT.get(f"{name or 'argument'} of {command}") or GOOD_TEXT.get(name)
    if texts:
        return st.sampled_from(texts)
    if name in _CHOICES:
        return st.sampled_from(_CHOICES[name])
    if literals := list(_literals(param.hint)):
        return st.sampled_from(literals)
    if int in param.kinds:
        return st.integers(1, 4).map(str)
    if float in param.kinds:
        return st.sampled_from(["1", "2", "0.5", "3.0"])
    return st.sampled_from(["a", "b c"])


def bad_values(command: str, param: Parameter) -> st.SearchStrategy[str]:
    """Values of an option that cannot be meant, and some that can."""
    if {int, float} & param.kinds:
        numbers = st.sampled_from(BAD_NUMBERS) | st.floats().map(str) | st.integers().map(str)
        longest = LONG.get((command, param.name), 0)
        return numbers.filter(lambda text: not (text.isdecimal() and len(text) < 30 and 9 < int(text) <= longest))
    return st.sampled_from(BAD_TEXT) | st.text(max_size=20)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """A command that works, with up to three options replaced and perhaps a file damaged."""
    command = draw(st.sampled_from([name for name, weight in WEIGHTS.items() for _ in range(weight)]))
    available = parameters(command)
    values: dict[str, str | None] = dict(BASE[command])
    changed = draw(st.lists(st.sampled_from(sorted(available)), max_size=3, unique=True))
    for name in changed:
        param = available[name]
        if bool in param.kinds:
            values[name] = None
        elif (command, name) in OPTIONAL and draw(st.integers(0, 3)) == 0:
            values.pop(name, None)
        elif draw(st.integers(0, 9)) < 6:
            values[name] = draw(good_values(command, param))
        else:
            values[name] = draw(bad_values(command, param))
    damage: Damage | Obstacle | None = None
    chance = draw(st.integers(0, 9))
    if chance == 9:
        damage = Obstacle(draw(st.sampled_from(WRITTEN[command])), draw(st.sampled_from(OBSTACLES)))
    elif chance < 4:
        damage = Damage(draw(st.sampled_from(READ[command])), draw(st.integers(0, 2**32)))
        option = next((name for start, name in READERS.items() if damage.file.startswith(start)), None)
        pointed = POINTED.get((command, damage.file)) or ({option: damage.file} if option in available else {})
        values |= {name: value for name, value in pointed.items() if name not in changed}
        if pointed and command == "edit" and damage.file in LEFT_OUT:
            values.pop(LEFT_OUT[damage.file], None)
    words = [] if "" not in values else [str(values.pop(""))]
    for name, value in values.items():
        words += [f"--{name}"] if value is None else [f"--{name}={value}"]
    return Example(command, (command, *words), tuple(changed), damage, draw(st.integers(0, 19)) == 0)
