"""Readers of facts and requests: what they accept, and that what they refuse is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mechedit import EditRequest, Fact, InputError, load_facts, load_requests
from mechedit.data import check_requests, fill

SHARED = Path(__file__).parents[3] / "shared" / "data"
FACT = {"id": "1", "subject": "Vinson Massif", "prompt": "{} lies in", "object": "Antarctica"}
COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English"},
        "target_true": {"str": "French"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Leon Blum is"],
    "attribute_prompts": ["The mother tongue of Go Hyeon-jeong is"],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"],
}


def written(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_facts_are_read_from_lines_and_from_a_list(tmp_path):
    lines = json.dumps(FACT) + "\n\n" + json.dumps({**FACT, "id": "2", "relation": "P30"}) + "\n"
    facts = load_facts(written(tmp_path, lines))
    assert facts[0] == Fact(**FACT)
    assert facts[1].relation == "P30"
    assert load_facts(written(tmp_path, [FACT])) == facts[:1]
    assert facts[0].text == "Vinson Massif lies in"


def test_other_braces_are_left_alone():
    assert fill("set {{}}", "{0}") == "set {{0}}"


def test_counterfact_and_the_short_form_give_the_same_request(tmp_path):
    (full,) = load_requests(written(tmp_path, [COUNTERFACT]))
    short = {
        "id": "7",
        "subject": "Danielle Darrieux",
        "prompt": "The mother tongue of {} is",
        "target_new": "English",
        "target_true": "French",
        "relation": "P103",
        "paraphrases": ["Danielle Darrieux, a native"],
        "neighbors": [{"prompt": "The mother tongue of Leon Blum is", "object": "French"}],
        "attributes": ["The mother tongue of Go Hyeon-jeong is"],
        "generations": ["Danielle Darrieux's mother tongue is"],
    }
    assert load_requests(written(tmp_path, json.dumps(short)))[0] == full
    assert full.neighbors[0].object == "French"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "lies in"}, "0 times"),
        ({"prompt": "{} and {}"}, "2 times"),
        ({"subject": " "}, "the subject is"),
        ({"object": ""}, "the object is"),
    ],
)
def test_a_bad_fact_is_named_with_its_line(tmp_path, change, message):
    content = json.dumps({**FACT, "id": "0"}) + "\n" + json.dumps({**FACT, **change})
    path = written(tmp_path, content)
    with pytest.raises(InputError, match=rf"line 2.*{message}"):
        load_facts(path, strict=True)
    with pytest.warns(UserWarning, match=r"1 of 2 facts are left out: 1 \(no "):
        assert load_facts(path) == [Fact(**{**FACT, "id": "0"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "1"\n', "line 1 is not JSON"),
        (json.dumps(FACT) + "\nnot json\n", "line 2 is not JSON"),
        ("[1, 2", "is not JSON"),
        ("[3]", "is a int, expected a JSON object"),
        ("", "holds no facts"),
        (json.dumps({"id": "1", "prompt": "{}"}), "has no field 'subject'"),
        (json.dumps(FACT) + "\n" + json.dumps(FACT), "two facts have the id '1'"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        load_facts(written(tmp_path, content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the file .*nowhere\.json"):
        load_facts(tmp_path / "nowhere.json")


def request(name, **changes):
    base = {"subject": "Rome", "prompt": "{} is in", "target_new": "France", "relation": "P17"}
    return EditRequest(id=name, **{**base, **changes})


def test_conflicting_requests_are_refused_and_agreeing_ones_are_not():
    check_requests([request("a"), request("b", prompt="{} lies in"), request("c", subject="Paris", target_new="Italy")])
    with pytest.raises(InputError, match="'a' and 'b' conflict"):
        check_requests([request("a"), request("b", prompt="{} lies in", target_new="Spain")])
    with pytest.raises(InputError, match="'a' and 'b' conflict"):
        check_requests([request("a", relation=None), request("b", relation=None, target_new="Spain")])
    with pytest.raises(InputError, match="at least one"):
        check_requests([])


def test_the_known_facts_set_is_read_whole():
    path = SHARED / "known_1000.json"
    if not path.is_file():
        pytest.skip("the known-facts set is not here; users do not have it either")
    facts = load_facts(path)
    records = json.loads(path.read_text())
    assert len(facts) == len(records)
    assert all(fact.text == record["prompt"] for fact, record in zip(facts, records, strict=True))
