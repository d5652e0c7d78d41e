"""The forms of published data sets and of CSV files: what a record becomes, and what is said of a bad one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from mechedit import EditRequest, InputError, Neighbor, load_facts, load_requests
from mechedit.data import check_requests
from mechedit.data.templates import make_template
from mechedit.provenance import value_hash

SHARED = Path(__file__).parents[3] / "shared" / "data"
EASYEDIT = {
    "case_id": 678,
    "prompt": "The original language of Tolomeo was",
    "target_new": "English",
    "subject": "Tolomeo",
    "ground_truth": "Italian",
    "rephrase_prompt": "In Tolomeo, people speak",
    "locality_prompt": "The original language of Ironmaster was",
    "locality_ground_truth": "Swedish",
}
MEND = {
    "subject": "UniFirst",
    "src": "What is the product made by UniFirst?",
    "pred": "uniform",
    "rephrase": "What will be the product of UniFirst?",
    "alt": "unmanned aircraft",
    "answers": ["uniform", "clothes"],
    "loc": "nq question: who wrote the hobbit",
    "loc_ans": "J. R. R. Tolkien",
    "cond": "uniform >> unmanned aircraft || What is the product made by UniFirst?",
}
COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Leon Blum is"],
}


def written(tmp_path, content, name="file.json"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


def shared(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{name} is not here; users do not have it either")
    return path


def test_easyedits_format(tmp_path):
    (request,) = load_requests(written(tmp_path, [EASYEDIT]))
    assert request == EditRequest(
        id="678",
        subject="Tolomeo",
        prompt="The original language of {} was",
        target_new="English",
        target_true="Italian",
        paraphrases=("In Tolomeo, people speak",),
        neighbors=(Neighbor(prompt="The original language of Ironmaster was", object="Swedish"),),
    )
    assert request.text == EASYEDIT["prompt"]


def test_fields_that_easyedits_record_lacks_are_absent(tmp_path):
    bare = without(EASYEDIT, "case_id", "rephrase_prompt", "locality_prompt", "locality_ground_truth")
    first, second = load_requests(written(tmp_path, [bare, {**bare, "case_id": None, "rephrase_prompt": None}]))
    assert (first.id, second.id) == ("0", "1")  # their places in the file
    assert first.paraphrases == second.paraphrases == first.neighbors == ()
    assert first.target_true == "Italian"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "The language was"}, "record 1: the subject 'Tolomeo' occurs 0 times in the prompt"),
        ({"prompt": "Tolomeo or Tolomeo was"}, "record 1: the subject 'Tolomeo' occurs 2 times in the prompt"),
        ({"locality_ground_truth": None}, "record 1 has no field 'locality_ground_truth'"),
        ({"rephrase_prompt": [["In Tolomeo"]]}, "record 1: the rephrase_prompt[0] is ['In Tolomeo'], expected text"),
        ({"rephrase_prompt": {"a": "b"}}, "record 1: rephrase_prompt is {'a': 'b'}, expected a list"),
        ({"target_new": ""}, "record 1: the target_new is ''"),
        ({"case_id": [1]}, "record 1: case_id is [1]"),
    ],
)
def test_a_bad_record_of_easyedits_is_named(tmp_path, change, message):
    with pytest.raises(InputError) as raised:
        load_requests(written(tmp_path, [{**EASYEDIT, **change}]))
    assert str(raised.value).startswith(f"{str(tmp_path / 'file.json')!r}, {message}")


@pytest.mark.parametrize(
    ("text", "subject", "expected"),
    [
        ("Who made {Art}?", "Art", "Who made {{}}?"),
        ("Artists say Art is", "Art", "Artists say {} is"),  # once as a whole word
        ("the.the a*b", "a*b", "the.the {}"),  # no pattern
        ("東京都は", "東京", "{}都は"),
    ],
)
def test_where_the_subject_stands(text, subject, expected):
    assert make_template(text, subject, "here") == expected


@pytest.mark.parametrize(("text", "count"), [("Art and Art", 2), ("none", 0)])
def test_an_unclear_subject_is_refused(text, count):
    with pytest.raises(InputError, match=f"occurs {count} times"):
        make_template(text, "Art", "here")


def test_mends_format_as_memit_reads_it(tmp_path):
    """MEMIT's data set: the first answer, no true object, one rephrasing, the neighbor's question with its mark."""
    (request,) = load_requests(written(tmp_path, [MEND]))
    assert request == EditRequest(
        id="0",
        subject="UniFirst",
        prompt="What is the product made by {}?",
        target_new="uniform",
        paraphrases=("What will be the product of UniFirst?",),
        neighbors=(Neighbor(prompt="nq question: who wrote the hobbit?", object="J. R. R. Tolkien"),),
    )


def test_mends_records_without_a_clear_subject_are_left_out_and_counted(tmp_path):
    records = [MEND, {**MEND, "src": "Who made it?"}, {**MEND, "src": "Is UniFirst UniFirst?"}]
    with pytest.warns(UserWarning, match=r"2 of 3 requests are left out: 1 \(no clear place .*, 2 \(no clear"):
        requests = load_requests(written(tmp_path, records))
    assert [request.id for request in requests] == ["0"]
    with pytest.raises(InputError, match="record 1: the subject 'UniFirst' occurs 0 times"):
        load_requests(written(tmp_path, records[1:]))
    with pytest.raises(InputError, match="record 2: the subject 'UniFirst' occurs 0 times"):
        load_requests(written(tmp_path, records), strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": []}, "record 1: answers is empty"),
        ({"answers": "uniform"}, "record 1: answers is 'uniform', expected a list"),
        ({"answers": [""]}, "record 1: answers is empty"),
        ({"answers": [["uniform"]]}, "record 1: the answers[0] is ['uniform'], expected text"),
        ({"loc_ans": None}, "record 1 has no field 'loc_ans'"),
        ({"subject": None}, "record 1 has no field 'subject' (found: src, pred,"),
    ],
)
def test_a_bad_record_of_mends_is_named(tmp_path, change, message):
    with pytest.raises(InputError) as raised:
        load_requests(written(tmp_path, [{**MEND, **change}]))
    assert str(raised.value).startswith(f"{str(tmp_path / 'file.json')!r}, {message}")


def test_neighbors_may_have_objects_of_their_own(tmp_path):
    neighbors = {"neighborhood_prompts": [{"prompt": "The mother tongue of Go is", "target": "Korean"}]}
    plain, with_objects = load_requests(written(tmp_path, [COUNTERFACT, {**COUNTERFACT, "case_id": 8, **neighbors}]))
    assert plain.neighbors == (Neighbor(prompt="The mother tongue of Leon Blum is", object="French"),)
    assert with_objects.neighbors == (Neighbor(prompt="The mother tongue of Go is", object="Korean"),)
    assert plain.target_id == "Q1860"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paraphrase_prompts": "Danielle"}, "record 1: paraphrase_prompts is 'Danielle', expected a list"),
        ({"paraphrase_prompts": ["one", 2]}, "record 1: the paraphrase_prompts[1] is 2, expected text"),
        ({"requested_rewrite": "none"}, "record 1: requested_rewrite is 'none', expected a JSON object"),
        ({"requested_rewrite": {}}, "record 1 has no field 'requested_rewrite' (found: case_id,"),
        ({"requested_rewrite": {"prompt": "{} is"}}, "record 1: requested_rewrite has no field 'target_new' (found: p"),
        ({"neighborhood_prompts": [{"prompt": "a"}]}, "record 1: neighborhood_prompts[0] has no field 'target'"),
        ({"neighborhood_prompts": [{"prompt": "a", "target": "b"}, "c"]}, "record 1: neighborhood_prompts[1] is 'c'"),
    ],
)
def test_a_bad_record_of_counterfact_is_named(tmp_path, change, message):
    with pytest.raises(InputError) as raised:
        load_requests(written(tmp_path, [{**COUNTERFACT, **change}]))
    assert str(raised.value).startswith(f"{str(tmp_path / 'file.json')!r}, {message}")


def test_of_conflicting_requests_the_first_may_be_kept(tmp_path):
    def asks(name, target, relation="P103"):
        record = {"id": name, "subject": "Danielle", "prompt": f"{{}} {relation}", "target_new": target}
        return {**record, "relation": relation}

    records = [asks("a", "English"), asks("b", "Korean"), asks("c", "Korean", "P27"), asks("d", " English")]
    path = written(tmp_path, records)
    with pytest.raises(InputError, match=r"'a' and 'b' conflict.*conflicts=\"first\""):
        load_requests(path)
    with pytest.warns(UserWarning, match=r"1 of 4 requests are left out: b \(conflicts with another\)"):
        requests = load_requests(path, conflicts="first")
    assert [request.id for request in requests] == ["a", "c", "d"]


def test_a_request_conflicts_with_those_kept_not_with_those_left_out(tmp_path):
    base = {"subject": "Danielle", "target_new": "English"}
    records = [
        {**base, "id": "a", "prompt": "{} speaks", "relation": "P103"},
        {**base, "id": "b", "prompt": "{} talks", "relation": "P103", "target_new": "Korean"},
        {**base, "id": "c", "prompt": "{} talks", "target_new": "Dutch"},
    ]
    with pytest.warns(UserWarning, match="1 of 3"):
        requests = load_requests(written(tmp_path, records), conflicts="first")
    assert [request.id for request in requests] == ["a", "c"]


def test_the_real_short_form_is_read_whole(counterfact_short):
    path, requests = shared("counterfact_short_5000.json"), counterfact_short
    records = {str(record["case_id"]): record for record in json.loads(path.read_text())}
    assert 4900 < len(requests) < 5000
    check_requests(requests)
    for request in requests:
        record = records[request.id]
        assert request.text == record["prompt"]
        assert (request.target_new, request.target_true) == (record["target_new"], record["ground_truth"])
        assert request.paraphrases == (record["rephrase_prompt"],)


def test_the_real_zsre_is_read_whole():
    path = shared("zsre_short_1000.json")
    records = json.loads(path.read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        requests = load_requests(path)
    assert len(requests) == len(records) == 1000
    for request, record in zip(requests, records, strict=True):
        assert request.text == record["src"]
        assert request.target_new == record["answers"][0]
        assert request.neighbors == (Neighbor(prompt=record["loc"] + "?", object=record["loc_ans"]),)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("known_1000.json", "875ec72aef0815539f0c2d60f5871c52bb5a1e06992bc120d20f827d6064e6bb"),
        ("counterfact_short_5000.json", "3af31e54f2c2708fd7e3d630182fa5ba275b39c9fa856eb1aed0fb966906e093"),
        ("zsre_short_1000.json", "81f4a1bca91b4ed0436751d6f95b47ab5697c34a4be7b12952195582365e1aca"),
    ],
)
def test_real_files_are_read_as_they_always_were(name, expected, request):
    """Hashes of what was read before other benchmarks' forms and stricter rules for subjects and fields came."""
    path = shared(name)
    if name.startswith("counterfact"):
        records = request.getfixturevalue("counterfact_short")
    else:
        records = load_facts(path) if name.startswith("known") else load_requests(path)
    assert value_hash(records) == expected
    assert value_hash(records[1:]) != expected


CSV = """\
id,subject,prompt,target_new,target_true,paraphrase_1,paraphrase_2
x,Rome,{} is in,France,Italy,"{}, a city in",
,"Paris, Texas","The ""state"" of {} is",Ohio,,,Paris lies in
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_facts_to_insert_from_a_csv(tmp_path, encoding, end):
    path = written(tmp_path, CSV.replace("\n", end).encode(encoding), "facts.CSV")
    assert load_requests(path) == [
        EditRequest(
            id="x",
            subject="Rome",
            prompt="{} is in",
            target_new="France",
            target_true="Italy",
            paraphrases=("Rome, a city in",),
        ),
        EditRequest(
            id="3",
            subject="Paris, Texas",
            prompt='The "state" of {} is',
            target_new="Ohio",
            paraphrases=("Paris lies in",),
        ),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("subject,prompt\nRome,{} is in", r"line 1 has no column 'target_new' \(found: subject, prompt\)"),
        ("subject;prompt;target_new\nRome;{} is in;I", r"line 1 has no column 'subject'.* separated by commas"),
        ("", r"facts\.csv' has no column 'subject' \(found: nothing\)"),
        ("subject,prompt,target_new,note\na,{},b,c", "line 1 has a column 'note'"),
        ("subject,prompt,target_new,id,id\na,{},b,c,d", "line 1 has the column 'id' twice"),
        ("subject,prompt,target_new\n\nRome,{} is in, ", "line 3: the target_new is ''"),
        ("subject,prompt,target_new\nRome,{} is in, yes, Italy", "line 2 has 4 cells, expected 3"),
        ("subject,prompt,target_new\nRome,{} is in", "line 2 has 2 cells, expected 3"),
        ('subject,prompt,target_new\nRome,{} is "in",Italy', "line 2 has a stray quote"),
        ('subject,prompt,target_new\nRome,"{} is"in,Italy', "line 2 has a stray quote"),
        ('subject,prompt,target_new\nRome,"{} is in,Italy\nParis,{} is in,France"', "line 2 has a stray quote"),
        ("subject,prompt,target_new\nRome,is in,Italy", "line 2: the subject 'Rome' occurs 0 times"),
        ("subject,prompt,target_new\n", "no edit requests were found"),
        ("subject,prompt,target_new\nRome,{} is in,Italy\nRome,{} is in,Spain", "'2' and '3' conflict"),
        ("subject,prompt,target_new,id\na,{} is,b,1\nc,{} is,d,1", "two requests have the id '1'"),
    ],
)
def test_a_bad_csv_is_refused_with_its_line(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        load_requests(written(tmp_path, content.encode(), "facts.csv"))


def test_a_csv_of_another_encoding_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"is not UTF-8 text \(byte 86.*save it as UTF-8"):
        load_requests(written(tmp_path, CSV.replace("France", "Café").encode("latin-1"), "facts.csv"))
