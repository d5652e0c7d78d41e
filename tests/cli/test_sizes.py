"""Sizes from the command line are checked before anything of that size is made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.commands import limited_memory
from helpers.smallest import write_data
from helpers.zygote import Zygote

from mechedit import InputError, Sever, TraceConfig, load_facts
from mechedit.cli import main, parse_layers, parse_windows
from mechedit.cli.app import LONGEST_LINE
from mechedit.cli.parsing import parse_shard
from mechedit.paths import checked_path

DIGITS = "9" * 5000
"""More digits than Python reads."""


def refuse_model(*arguments: object) -> None:
    raise InputError("the model was asked for")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--layers", "1-999999999"], "expected a whole number from 0 to 9,999"),
        (["moments", "--layers", DIGITS], "expected a whole number from 0 to 9,999"),
        (["moments", "--layers", f"1-{DIGITS}"], "expected a whole number from 0 to 9,999"),
        (["moments", "--layers", "0-9000," * 1000 + "1"], "name a layer twice"),
        (["moments", "--layers", "1", "--shard", f"0/{DIGITS}"], "the number of shards is 999"),
        (["trace", "--sever", "mlp@1-99999999999"], "expected a whole number from 0 to 9,999"),
        (["trace", "--sever", f"mlp@{DIGITS}"], "expected a whole number from 0 to 9,999"),
        (["trace", "--sever", f"mlp:-{DIGITS}"], "a position is 999"),
        (["trace", "--samples", "1000000000"], "samples is 1000000000, expected a whole number"),
        (["trace", "--kinds", "s" * 100_000], "an entry of kinds is"),
        (["select", ".", "--validate", "--windows", "1-99999999999"], "expected a whole number from 0 to 9,999"),
        (["trace", "--out", ""], "it is empty, expected a path"),
        (["trace", "--" + "a" * 600], f"No such option: --{'a' * 48}…{'a' * 20}"),
        (["edit", "--conflicts", "9" * 600], "9…99999999999999999999' is not one of 'refuse', 'first'"),
        *(
            ([*arguments, path], "cannot be a path")
            for path in ("p" * 5000, "a\0b")
            for arguments in (
                ["trace", "--facts"],
                ["trace", "--out"],
                ["trace", "--config"],
                ["select"],
                ["report"],
                ["edit", "--show"],
                ["edit", "--layers", "1", "--requests"],
                ["edit", "--layers", "1", "--moments"],
                ["edit", "--selection"],
                ["evaluate", "--texts"],
                ["evaluate", "--references"],
                ["apply", "--edit", "edit.safetensors", "--out"],
            )
        ),
    ],
)
def test_an_absurd_size_is_refused_in_a_short_line_before_it_is_made(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mechedit.cli.options.load_quietly", refuse_model)
    with limited_memory(), pytest.raises(SystemExit) as leaving:
        main(arguments)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mechedit:")]
    assert leaving.value.code == 2
    assert message in line
    assert len(line) < 1100
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_text_of_any_length_is_refused_in_a_short_line(zygote: Zygote, tmp_path: Path) -> None:
    write_data(tmp_path)
    file, out = tmp_path / "requests.json", tmp_path / "run"
    requests = json.loads(file.read_text())
    words = ["evaluate", "--model=smallest", "--requests=requests.json", "--generation-tokens=2", "--out=run"]
    for name in ("paraphrases", "prompt", "target_new"):
        long = {"prompt": "{} is " + "is " * 5000, "target_new": "in " * 5000}.get(name, ["Paris " * 2500 + "is"])
        file.write_text(json.dumps([{**requests[0], name: long}]))
        ended = zygote.run(words, tmp_path, sketched=True)
        assert ended.code == 2, ended.printed
        (line,) = ended.refusals
        assert len(line) <= LONGEST_LINE
        assert not out.exists()
    file.write_text(json.dumps(requests))
    assert zygote.run(words, tmp_path, sketched=True).code == 0, "the control"


def test_a_long_message_is_cut_in_its_middle(capsys, tmp_path, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise InputError("it begins" + " so it goes on" * 1500 + " and ends")

    monkeypatch.setattr("mechedit.cli.options.load_quietly", refuse)
    with pytest.raises(SystemExit):
        main(["trace", "--out", str(tmp_path / "run")])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mechedit:")]
    assert LONGEST_LINE - 2 < len(line) <= LONGEST_LINE
    assert line.startswith("mechedit: it begins")
    assert line.endswith(" and ends")


def test_of_a_long_message_the_values_are_cut_first(capsys, tmp_path, monkeypatch):
    path = f"{'folder/' * 80}facts.json"

    def refuse(*arguments: object) -> None:
        raise InputError(f"cannot read the model's file {path!r}; expected an existing file, not the model's folder")

    monkeypatch.setattr("mechedit.cli.options.load_quietly", refuse)
    with pytest.raises(SystemExit):
        main(["trace", "--out", str(tmp_path / "run")])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mechedit:")]
    assert len(line) < 200
    for part in ("file 'folder/folder/", "older/facts.json'; expected an existing file, not the model's folder"):
        assert part in line


@pytest.mark.parametrize("words", [["trace", "--joint"], ["evaluate", "--stop-words"], ["run", "--out"]])
def test_an_argument_in_another_encoding_is_refused(capsys, tmp_path, monkeypatch, words):
    """Bytes that are no UTF-8 come as halves of surrogate pairs, which failed where they were written down."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mechedit.cli.options.load_quietly", refuse_model)
    for word, said in (("caf\udce9", "half of a surrogate pair"), ("café", "the model was asked for")):
        with pytest.raises(SystemExit) as leaving:
            main([*words, word])
        assert leaving.value.code == 2
        assert said in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_models_may_have_is_read():
    """The control: bounds refuse nothing that there could be."""
    assert parse_layers("3-5,0300") == [3, 4, 5, 300]
    assert parse_windows("0-9999")[0].layers == list(range(10_000))
    assert Sever.parse("mlp@2-4+7:-2").label == "mlp@2-4+7:-2"
    assert len(Sever.parse("mlp@0-9999").label) < 20
    assert parse_shard("3/4096") == (3, 4096)
    assert TraceConfig(samples=1000).samples == 1000
    assert str(checked_path("new/folder")) == "new/folder"


def test_a_path_that_no_file_system_holds_is_refused_by_loaders():
    for path in ("p" * 5000, "a\0b"):
        with pytest.raises(InputError, match=r"cannot be a path|cannot read the file"):
            load_facts(path)


def test_what_is_too_large_is_noticed():
    """The control: the limit is one that a list of so many layers would break."""
    if sys.platform.startswith("linux"):
        with limited_memory(), pytest.raises(MemoryError):
            list(range(10**9))
