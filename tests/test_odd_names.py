"""Names from any keyboard, or none: line breaks, marks that turn the direction of text, bytes that are no UTF-8.

What is printed is one line for each message, and nothing in it moves a terminal's cursor or turns what follows it.
"""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest
from helpers.zygote import Ended, Zygote

import mechedit as me
from mechedit.cli.app import escaped, one_line
from mechedit.data import tiny_data

NAMES = {
    "line break": "new\nline",
    "combining": "cafe\u0301 und u\u0308ber",
    "right to left": "abc\u202egnp.exe",
    "isolate": "\u2067\u05d0\u05d1\u2069",
    "escape": "\x1b[31mred\x1b[0m\x07",
    "marks": "a'b\"c {} %s $HOME ~ * `ls`",
    "emoji": "👩\u200d👩\u200d👧 🇫🇷",
    "dash": "-rf",
    "spaces": "  two  words  ",
}
ALL = "n\ne\u0301\u202e\x1b[1m'\"{}%s "
BYTES = os.fsdecode(b"latin-\xe9")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The current folder of the commands, with what they read."""
    texts = me.load_texts("tiny")[:100]
    (tmp_path / "texts.txt").write_text("\n".join(text.replace("\n", " ") for text in texts))
    return tmp_path


def check_lines(ended: Ended, *codes: int) -> None:
    """What was printed moves no cursor and turns no text; a refusal is one line."""
    assert ended.code in codes, ended.printed
    assert "Traceback" not in ended.printed
    assert len(ended.refusals) == (1 if ended.code == 2 else 0), ended.printed
    # The bars of tqdm begin their line again, and go up a line where there are several.
    shown = ended.printed.replace("\x1b[A", "").replace("\r", "\n").replace("\t", " ")
    for line in shown.split("\n"):
        assert line == escaped(line), repr(line)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_written_to_and_named_in_one_line(zygote: Zygote, folder: Path, name: str) -> None:
    out = NAMES[name]
    moments = ["moments", "--layers=1", "--texts=texts.txt", f"--out={out}", "--npz=npz"]
    check_lines(zygote.run(moments, folder), 0)
    assert [path.name for path in (folder / out).iterdir()] == ["moments"]
    for words in (
        ["moments", "--layers=1", "--tokens=50", "--texts=texts.txt", f"--out={out}"],
        ["moments", "--layers=1", f"--texts={out}/none.txt", "--out=run"],
        ["select", "--", out],
        ["report", f"--config={out}", "--", out],
        ["edit", f"--show={out}"],
        ["edit", f"--requests={out}", "--layers=1"],
        ["apply", f"--edit={out}/none", "--out=x"],
        ["trace", f"--model={out}", "--out=x"],
        ["trace", f"--facts={out}", "--out=x"],
        ["trace", f"--out={out}/moments/layer_1.safetensors"],
        ["trace", f"--{out}"],
        ["trace", f"--seed={out}"],
        ["evaluate", f"--stop-words={out}", f"--references={out}", "--out=x"],
    ):
        check_lines(zygote.run(words, folder), 2)


@pytest.mark.parametrize(
    "words",
    [
        ["moments", "--layers=1", "--texts=texts.txt", f"--out={BYTES}"],
        ["moments", "--layers=1", f"--texts={BYTES}", "--out=x"],
        ["trace", f"--facts={BYTES}", "--out=x"],
        ["select", BYTES],
        ["apply", f"--edit={BYTES}", "--out=x"],
    ],
)
def test_bytes_that_are_no_utf8_are_refused(zygote: Zygote, folder: Path, words: list[str]) -> None:
    """Some libraries cannot write to such a path."""
    ended = zygote.run(words, folder)
    check_lines(ended, 2)
    assert "latin-\\udce9" in ended.refusals[0]
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["texts.txt"]


@pytest.mark.parametrize("address", ["http://x/y", "s3://bucket/run", "file:///tmp/run", "zip:/run"])
def test_an_address_is_no_path(zygote: Zygote, folder: Path, address: str) -> None:
    before = sorted(folder.rglob("*"))
    for words in (
        ["moments", "--layers=1", "--texts=texts.txt", f"--out={address}"],
        ["moments", "--layers=1", f"--texts={address}", "--out=run"],
        ["trace", f"--facts={address}", "--out=run"],
        ["trace", f"--out={address}"],
        ["select", address],
        ["report", address],
        ["edit", f"--requests={address}", "--layers=1"],
        ["apply", f"--edit={address}", "--out=run"],
    ):
        ended = zygote.run(words, folder)
        check_lines(ended, 2)
        assert "is an address, expected a path on this machine" in ended.printed
    assert sorted(folder.rglob("*")) == before


def test_steps_in_a_folder_and_of_records_with_such_names(zygote: Zygote, folder: Path) -> None:
    facts = [fact.plain() for fact in me.load_facts("known")[:12]]
    odd = list(NAMES.values())
    for number, fact in enumerate(facts):
        fact["id"] = f"{number} {odd[number % len(odd)]}"
    (folder / "facts.json").write_text(json.dumps(facts))
    requests = json.loads(tiny_data("requests.json").read_text())[:2]
    for request, text in zip(requests, (NAMES["escape"], NAMES["right to left"]), strict=True):
        request["requested_rewrite"]["prompt"] = f"{text} {{}} says"
        request["requested_rewrite"]["target_new"]["str"] = f"x {text}"
        request["neighborhood_prompts"] = [f"{text} says"]
    (folder / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
    commands = [
        f"trace --facts=facts.json --samples=1 --kinds=state --roles=subject_last,last --out={ALL}",
        f"select {ALL} --accept-unsettled",
        f"moments --layers=1 --texts=texts.txt --out={ALL}",
        f"edit --requests=requests.json --layers=1 --moments={ALL} --set=steps=1 --out={ALL}/edit.safetensors",
        f"edit --show={ALL}/edit.safetensors",
    ]
    for command in commands:
        words = [word.replace("\0", ALL) for word in command.replace(ALL, "\0").split(" ")]
        check_lines(zygote.run(words, folder), 0, 3)
    assert (folder / ALL / "edit.safetensors").is_file()


def test_what_moves_a_cursor_or_turns_text_is_escaped_and_letters_are_not() -> None:
    assert escaped("a\nb\x1b[0m\u202e\ud800\x85") == r"a\nb\x1b[0m\u202e\ud800\x85"
    plain = "Müller, Zoe\u0308, 東京, \u05d0\u05d1, عربي, 👩\u200d👧 →"
    assert escaped(plain) == plain
    for character in map(chr, range(0x3000)):
        shown = escaped(character)
        assert shown.isprintable() or unicodedata.category(character) in ("Zs", "Zl", "Zp", "Cf", "Cn", "Co")
    assert one_line(" a\n\n b\tc ") == "a b c"
