"""Every number of every option and setting is checked where it enters; the checks and these tests follow the fields."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from typing import get_args

import pytest
import torch
import typer

import mechedit as me
from mechedit.bounds import LARGEST_WHOLE, check_numbers, numeric_fields
from mechedit.cli import main
from mechedit.cli.app import app
from mechedit.cli.config_file import config_defaults
from mechedit.methods import METHODS, SpreadConfig
from mechedit.models import Tokens, load_model
from mechedit.planning import PromptShape
from mechedit.trace import Approximation

SETTINGS = {
    *(value for name in me.__all__ if dataclasses.is_dataclass(value := getattr(me, name)) and name.endswith("Config")),
    *(method.config for method in METHODS.values()),
    SpreadConfig,
    me.Corruption,
    me.Convergence,
    me.StopRule,
    Approximation,
    PromptShape,
}
FIELDS = [(kind, name) for kind in sorted(SETTINGS, key=lambda kind: kind.__name__) for name in numeric_fields(kind)]
NUMBERS = [
    (command.name, "--" + name.replace("_", "-"), "1e31" if float in {hint, *get_args(hint)} else str(2**64))
    for command in app.registered_commands
    for name, parameter in inspect.signature(command.callback).parameters.items()  # type: ignore[arg-type]
    for hint in get_args(parameter.annotation)[:1]
    if {int, float} & {hint, *get_args(hint)}
]
REQUIRED = {"apply": ["--edit", "edit.safetensors", "--out", "model"], "select": ["."]}


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_every_number_of_every_setting_has_a_range(kind, name):
    whole, optional = numeric_fields(kind)[name]
    bad = [math.nan, math.inf, -math.inf, -1, 10**40, 10**5000, True, "3", *([1.5] if whole else [])]
    for value in [*bad, *([] if optional else [None])]:
        settings = kind()
        object.__setattr__(settings, name, value)  # types are checked before the code is reached while tests run
        with pytest.raises(me.InputError, match=r" is .*expected"):
            settings.__post_init__()
    default = kind.__dataclass_fields__[name].default
    assert getattr(kind(**{name: default}), name) == getattr(kind(), name)  # the control: the defaults are in range


def test_the_fields_are_all_there():
    """The control of the tests above, which would pass without any field."""
    assert len(FIELDS) > 60
    assert numeric_fields(me.TraceConfig).keys() >= {"samples", "noise", "noise_std", "window", "seed", "memory"}
    assert numeric_fields(me.MemitConfig).keys() >= {"lr", "clamp", "steps", "covariance_weight", "seed"}
    assert "plus" not in numeric_fields(me.EvaluationConfig)  # true or false is no number
    assert {option for _, option, _ in NUMBERS} >= {"--seed", "--noise", "--memory", "--weight", "--max-facts"}
    check_numbers(me.TraceConfig(seed=LARGEST_WHOLE, samples=100_000, noise=1e-9))


def test_no_noise_is_refused():
    for name in ("noise", "noise_std"):
        with pytest.raises(me.InputError, match=f"{name} is 0"):
            me.TraceConfig(**{name: 0})  # type: ignore[arg-type]


BOMB = ", ".join(["&a0 [x, x, x, x, x, x, x, x]", *(f"&a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 30))])
"""Lists of lists that are 8³⁰ texts when they are written out."""


def refuse_model(*arguments: object) -> None:
    raise me.InputError("the model was asked for")


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(list(arguments))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mechedit:")]
    assert leaving.value.code == 2
    return line


@pytest.mark.parametrize(("command", "option", "largest"), NUMBERS)
def test_every_number_of_the_command_line_is_refused_before_anything_is_read(
    capsys, tmp_path, monkeypatch, command, option, largest
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mechedit.cli.options.load_quietly", refuse_model)
    for value in ("nan", "inf", "-1", largest, "9" * 5000, "1e40", "three", ""):
        line = complaint(capsys, command, *REQUIRED.get(command, []), f"{option}={value}")
        assert "expected" in line or f"Invalid value for '{option}'" in line, (value, line)
        assert "the model was asked for" not in line
        assert len(line) < 1100
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 1\nseed: 2", "the key 'seed' is given twice"),
        ("max-facts: 1\nmax_facts: 2", "gives the option 'max-facts' twice"),
        ("seed: null", "the option 'seed' is None, expected text, a number"),
        ("model: [tiny]", "the option 'model' is ['tiny'], expected text, a number"),
        ("kinds: [[state]]", "the option 'kinds' has ['state'] in its list, expected texts or numbers without commas"),
        ("kinds: [state, null]", "the option 'kinds' has None in its list"),
        ("kinds: ['state,mlp']", "the option 'kinds' has 'state,mlp' in its list"),
        ("kinds: [states]", "an entry of kinds is 'states', expected one of state, mlp, attn"),
        ("out: {a: 1}", "the option 'out' is {'a': 1}, expected text"),
        ("out: 2024-02-31", "is neither YAML nor JSON (day is out of range for month)"),
        ("seed: " + "9" * 5000, "is neither YAML nor JSON"),
        ("a: " + "[" * 3000, "nested too deep"),
        ("seed: !!python/object/apply:os.mkdir [made]", "is neither YAML nor JSON (could not determine a constructor"),
        *(
            (f"seed: !!{tag}", "a value is not what its tag says")
            for tag in ("bool x", "timestamp x", "int ''", "float")
        ),
        ('joint: "\\ud800"', "holds half of a surrogate pair"),
        ('{"seed": -1}', "seed is -1"),
        (f"seed: [{BOMB}]", "the option 'seed' is [['x', 'x'"),
        ("? [1]\n: 2", "found unhashable key"),
        ("\n".join(f"{number}: 1" for number in range(60_000)), "names the option '0'"),
        ("[]", "holds a list"),
        ("5", "holds a int"),
    ],
)
def test_a_config_file_that_cannot_be_meant_is_refused(capsys, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(content)
    assert message in complaint(capsys, "trace", "--config", "config.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_config_file_is_read(capsys, tmp_path, monkeypatch):
    """The control: what is right reaches the model."""
    monkeypatch.setattr("mechedit.cli.options.load_quietly", refuse_model)
    (tmp_path / "config.yaml").write_text(json.dumps({"max-facts": 3, "noise": 2, "out": str(tmp_path), "chat": False}))
    assert "the model was asked for" in complaint(capsys, "trace", "--config", str(tmp_path / "config.yaml"))


@pytest.mark.parametrize(
    ("command", "content", "option", "text"),
    [
        ("trace", "kinds: [state, mlp]", "kinds", "state,mlp"),
        ("trace", "sever:\n- nothing\n- mlp@3\n", "sever", "nothing,mlp@3"),
        ("moments", "layers: [3, 4-5]", "layers", "3,4-5"),
        ("run", '{"layers": [3], "stop-words": ["."]}', "layers", "3"),
        ("select", "windows: [1-4, 2-5]", "windows", "1-4,2-5"),
    ],
)
def test_a_list_stands_for_text_between_commas(tmp_path, command, content, option, text):
    group = typer.main.get_command(app)
    (tmp_path / "config.yaml").write_text(content)
    listed = config_defaults(group, [command, "--config", str(tmp_path / "config.yaml")])
    assert listed[command][option] == text
    (tmp_path / "config.yaml").write_text(f"{option}: {text}")  # the control: as it is written without a list
    assert str(config_defaults(group, [command, "--config", str(tmp_path / "config.yaml")])[command][option]) == text


def test_a_list_reaches_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("mechedit.cli.options.load_quietly", refuse_model)
    (tmp_path / "config.yaml").write_text(f"kinds: [state, mlp]\nout: {tmp_path}\n")
    assert "the model was asked for" in complaint(capsys, "trace", "--config", str(tmp_path / "config.yaml"))


def test_a_device_without_numbers_is_refused():
    for device in ("meta", "meta:0", torch.device("meta")):
        with pytest.raises(me.InputError, match="'meta', which holds no numbers"):
            load_model("tiny", device=device)


def test_a_text_beyond_the_context_is_refused_by_every_run(make_model, backend):
    model = make_model("gpt2", backend)
    for length in (model.max_positions, model.max_positions + 1):
        ids = torch.ones(1, length, dtype=torch.long)
        if length == model.max_positions:
            assert model.run(Tokens(ids, torch.ones_like(ids))).logits.shape[1] == length
        else:
            with pytest.raises(me.InputError, match=f"a text has {length} tokens, expected at most {length - 1}"):
                model.run(Tokens(ids, torch.ones_like(ids)))
