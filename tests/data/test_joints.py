"""Joints and turns: where they are read, which record they hold for, and that results without them stay valid."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mechedit import EditRequest, Fact, InputError, Neighbor, load_facts, load_requests
from mechedit.files import plain_copy
from mechedit.provenance import value_hash

FACT = Fact(id="1", subject="Vinson Massif", prompt="{} lies in", object="Antarctica", relation="P30")
NEIGHBOR = Neighbor(prompt="Mount Sidley lies in", object="Antarctica")
REQUEST = EditRequest(id="1", subject="Vinson Massif", prompt="{} lies in", target_new="Asia", neighbors=(NEIGHBOR,))
SHORT = {
    "id": "1",
    "subject": "Vinson Massif",
    "prompt": "{} lies in",
    "target_new": "Asia",
    "neighbors": [{"prompt": "Mount Sidley lies in", "object": "Antarctica"}],
}
TURN = "<user>{}</user><assistant>"


def written(tmp_path, content, name="file.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_what_was_made_before_there_were_joints_stays_valid():
    """Hashes as releases without these fields took them, over all fields of a record."""
    assert value_hash([FACT]) == "b3c4899c3afd854741f809aadf4da76152c25b98d1a5ee852a9f7e7dabefffda"
    assert value_hash([REQUEST]) == "8c8b761233bf6545c40e3096faf61a749edf30f2feae188ca5ccecf93287fb89"
    assert value_hash(load_requests("tiny")) == "9cbb20eb2cab3b98470394a39d65530544ff04161a194b157d7085811ac17649"
    assert value_hash([REQUEST.plain()]) == value_hash([REQUEST])


@pytest.mark.parametrize("record", [FACT, REQUEST])
def test_a_joint_or_a_turn_is_another_input(record):
    changed = [record, *(replace(record, joint=joint) for joint in (" ", "")), replace(record, turn=TURN)]
    if isinstance(record, EditRequest):
        changed.append(replace(record, neighbors=(replace(NEIGHBOR, joint=""),)))
    assert len({value_hash([value]) for value in changed}) == len(changed)
    assert len({value_hash([value.plain()]) for value in changed}) == len(changed)


def test_a_turn_stands_around_the_prompt():
    assert replace(FACT, turn=TURN).text == "<user>Vinson Massif lies in</user><assistant>"
    assert replace(REQUEST, turn=TURN, subject="{}").text == "<user>{} lies in</user><assistant>"
    assert plain_copy(replace(FACT, turn=TURN))["turn"] == TURN


@pytest.mark.parametrize("record", [FACT, REQUEST])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turn": "none"}, "the turn 'none' holds 0 times '{}'.* where the prompt goes"),
        ({"turn": "{}{}"}, "holds 2 times"),
    ],
)
def test_a_bad_turn_is_refused(record, change, message):
    with pytest.raises(InputError, match=message):
        replace(record, **change)


@pytest.mark.parametrize("joint", [" ", "", "\n", ": "])
def test_a_joint_is_read_from_a_record_of_facts_or_requests(tmp_path, joint):
    fact = {"id": "1", "subject": "Vinson Massif", "prompt": "{} lies in", "object": "Antarctica", "relation": "P30"}
    facts = load_facts(written(tmp_path, [{**fact, "joint": joint}, {**fact, "id": "2", "joint": None}]), joint="-")
    assert facts == [replace(FACT, joint=joint), replace(FACT, id="2", joint="-")]
    (request,) = load_requests(written(tmp_path, [{**SHORT, "joint": joint}]))
    assert request == replace(REQUEST, joint=joint, neighbors=(replace(NEIGHBOR, joint=joint),))


def test_a_files_joint_holds_where_none_is_named(tmp_path):
    neighbors = [*SHORT["neighbors"], {"prompt": "Mont Blanc lies in", "object": "Europe", "joint": ""}]
    records = [{**SHORT, "neighbors": neighbors}, {**SHORT, "id": "2", "joint": "_"}]
    path = written(tmp_path, records)
    first, second = load_requests(path, joint="-")
    assert (first.joint, [neighbor.joint for neighbor in first.neighbors]) == ("-", ["-", ""])
    assert (second.joint, [neighbor.joint for neighbor in second.neighbors]) == ("_", ["_"])
    first, _ = load_requests(path)  # the control: without one, none
    assert (first.joint, [neighbor.joint for neighbor in first.neighbors]) == (None, [None, ""])


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Rome lies in", "subject": "Rome", "target_new": "Spain", "ground_truth": "Italy"},
        {"src": "Where is Rome?", "subject": "Rome", "answers": ["Spain"]},
        {
            "case_id": 1,
            "requested_rewrite": {"prompt": "{} lies in", "subject": "Rome", "target_new": {"str": "Spain"}},
        },
    ],
)
def test_any_format_may_have_a_joint(tmp_path, record):
    (request,) = load_requests(written(tmp_path, [{**record, "joint": "\n"}]))
    assert request.joint == "\n"
    with pytest.raises(InputError, match="record 1: the joint is 3, expected text"):
        load_requests(written(tmp_path, [{**record, "joint": 3}]))


def test_a_csv_may_have_a_column_of_joints(tmp_path):
    lines = 'subject,prompt,target_new,joint\nRome,{} is in,Spain," "\nParis,{} is in,Spain,\nBonn,{} is in,Spain,-\n'
    requests = load_requests(written(tmp_path, lines, "facts.csv"))
    assert [request.joint for request in requests] == [" ", None, "-"]
    requests = load_requests(written(tmp_path, lines, "facts.csv"), joint="")
    assert [request.joint for request in requests] == [" ", "", "-"]


@pytest.mark.parametrize("joint", [None, "", " "])
@pytest.mark.parametrize("turn", ["{}", TURN])
def test_what_a_record_says_of_itself_is_read_back(tmp_path, joint, turn):
    """`plain` writes the short form."""
    neighbors = tuple(replace(neighbor, joint=joint) for neighbor in (NEIGHBOR, replace(NEIGHBOR, object="\nAsia")))
    request = replace(REQUEST, joint=joint, turn=turn, neighbors=neighbors, target_true="Antarctica", relation="P30")
    request = replace(request, paraphrases=("Vinson Massif is part of",), attributes=("a",), generations=("b",))
    assert load_requests(written(tmp_path, [request.plain()])) == [request]
    fact = replace(FACT, joint=joint, turn=turn, foil="Asia")
    assert load_facts(written(tmp_path, [fact.plain()])) == [fact]
