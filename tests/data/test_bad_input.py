"""What is no source, no record and no prompt is refused with what was expected; long cells are read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata

import pytest

from mechedit import EditRequest, InputError, Neighbor, load_facts, load_requests

BASE = {"id": "1", "subject": "Rome", "prompt": "{} is in", "target_new": "France"}


WRONG_TYPES = {
    **{
        f"load_{what}({source})": "the argument source is .*expected a text or Path"
        for what in ("facts", "requests", "texts")
        for source in ("None", "5", "[{}]", "b'file.json'")
    },
    "request(paraphrases='Rome lies in')": "paraphrases are 'Rome lies in', expected a tuple of texts",
    "request(generations='Rome')": "generations are 'Rome', expected a tuple",
    "request(attributes=None)": "attributes are None, expected a tuple",
    "request(paraphrases=('Rome lies in', 3))": "paraphrases are .*expected a tuple",
    "request(neighbors='Paris')": "neighbors are 'Paris', expected a tuple of Neighbor",
    "request(neighbors=('Paris is in',))": "neighbors are .*expected a tuple of Neighbor",
    "request(neighbors=Neighbor(prompt='Paris is in', object='France'))": "neighbors are Neighbor.*expected a tuple",
    "request(id=5)": "the id of a request is 5, expected text",
    "request(relation=['capital'])": r"the relation is \['capital'\], expected text",
    "Neighbor(prompt='Paris is in', object=None)": "a neighbor: the object is None",
    "Neighbor(prompt=None, object='France')": "a neighbor: the prompt is None",
    "Neighbor(prompt='Paris is in', object=5)": "a neighbor: the object is 5",
}
PROGRAM = """
import json, sys
from mechedit import EditRequest, InputError, Neighbor, load_facts, load_requests, load_texts

def request(**changes):
    return EditRequest(**{"id": "1", "subject": "Rome", "prompt": "{} is in", "target_new": "France", **changes})

def message(expression):
    try:
        eval(expression)
    except InputError as error:
        return str(error)

request(paraphrases=["Rome lies in"], neighbors=[])
print(json.dumps({expression: message(expression) for expression in json.loads(sys.argv[1])}))
"""
"""Refuses what is of another type by itself; while tests run, types are checked before the code is reached."""


def test_values_of_other_types_are_refused():
    command = [sys.executable, "-c", PROGRAM, json.dumps(list(WRONG_TYPES))]
    messages = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    for expression, expected in WRONG_TYPES.items():
        assert re.search(expected, messages[expression] or ""), (expression, messages[expression])


@pytest.mark.parametrize("text", [" ", "R\ud83d"])
@pytest.mark.parametrize("name", ["paraphrases", "generations", "attributes"])
def test_an_empty_prompt_or_half_a_character_is_refused(name, text):
    with pytest.raises(InputError, match=f"one of its {name} is "):
        EditRequest(**BASE, **{name: ("Rome lies in", text)})
    with pytest.raises(InputError, match="a neighbor: the prompt is"):
        Neighbor(prompt=text, object="France")
    with pytest.raises(InputError, match="a neighbor: the object is"):
        Neighbor(prompt="Paris is in", object=text)


@pytest.mark.parametrize("name", ["id", "prompt", "turn", "joint", "relation", "target_true", "target_id"])
def test_half_a_character_is_refused_in_every_text(name):
    good = {"prompt": "{} is in", "turn": "Q: {}", "joint": ": "}.get(name, "Rome")
    assert getattr(EditRequest(**{**BASE, name: good}), name) == good
    with pytest.raises(InputError, match="half of a surrogate pair"):
        EditRequest(**{**BASE, name: f"{good}\udce9"})


@pytest.mark.parametrize("load", [load_facts, load_requests])
def test_a_folder_without_a_name_is_no_file(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (".", "..", "/"):
        with pytest.raises(InputError, match="cannot read the file"):
            load(path)


@pytest.mark.parametrize("name", ["paraphrases", "generations"])
def test_two_places_for_the_subject_are_not_clear(tmp_path, name):
    with pytest.raises(InputError, match=r"2 times '\{\}'"):
        EditRequest(**BASE, **{name: ("{} and {} are",)})
    path = tmp_path / "file.json"
    path.write_text(json.dumps([{**BASE, name: ["{} and {} are"]}, {**BASE, "id": "2"}]))
    with pytest.warns(UserWarning, match="1 of 2 requests are left out: 1 .no clear place"):
        assert [request.id for request in load_requests(path)] == ["2"]
    with pytest.raises(InputError, match=r"file\.json', record 1: "):
        load_requests(path, strict=True)
    # The control: braces beside the subject are text.
    assert getattr(EditRequest(**BASE, **{name: ("Rome: {}, {}",)}), name) == ("Rome: {}, {}",)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_subject_that_is_composed_otherwise_is_said_to_be(tmp_path, forms):
    of_subject, of_prompt = forms
    record = {
        **BASE,
        "subject": unicodedata.normalize(of_subject, "Zürich"),
        "prompt": unicodedata.normalize(of_prompt, "Zürich lies in"),
    }
    path = tmp_path / "file.json"
    path.write_text(json.dumps([record]))
    with pytest.raises(InputError, match="composed otherwise"):
        load_requests(path)
    record["prompt"] = unicodedata.normalize(of_subject, record["prompt"])
    path.write_text(json.dumps([record]))
    assert load_requests(path)[0].prompt == "{} lies in"


def test_utf_32_is_read_and_what_is_cut_short_is_named(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(json.dumps([{**BASE, "subject": "Zürich"}], ensure_ascii=False).encode("utf-32"))
    assert load_requests(path)[0].subject == "Zürich"
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes(json.dumps([BASE]).encode(encoding)[:-1])
        with pytest.raises(InputError, match=f"is not {encoding.upper()} text .*save it as UTF-8"):
            load_requests(path)
