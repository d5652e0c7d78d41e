"""Files as people have them: encodings, lines, wrappers, tables; what is said of bad ones, and of what was read."""

from __future__ import annotations

import codecs
import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechedit import InputError, load_facts, load_requests, load_texts
from mechedit.cli import main
from mechedit.data import describe_facts, describe_requests, read_edit_requests, read_facts
from mechedit.data.json_files import read_records
from mechedit.files import read_text

FACT = {"id": "1", "subject": "Zürich", "prompt": "{} lies in", "object": "Schweiz 🇨🇭"}
REQUEST = {"id": "1", "subject": "Zürich", "prompt": "{} lies in", "target_new": "Österreich", "target_true": "法国"}
ENCODINGS = {
    "utf-8": "utf-8", "utf-8 with mark": "utf-8-sig", "utf-16 with mark": "utf-16", "utf-16-le": "utf-16-le",
    "utf-16-be": "utf-16-be",
}  # fmt: skip


def written(tmp_path, text, name="file.json", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings(tmp_path, encoding, end):
    encoding = ENCODINGS[encoding]
    lines = json.dumps(FACT, ensure_ascii=False) + end + json.dumps({**FACT, "id": "2"}) + end
    path = written(tmp_path, lines, encoding=encoding)
    assert [(fact.id, fact.subject, fact.object) for fact in load_facts(path)] == [
        (name, "Zürich", "Schweiz 🇨🇭") for name in "12"
    ]
    (request,) = load_requests(written(tmp_path, json.dumps([REQUEST], ensure_ascii=False), encoding=encoding))
    assert (request.subject, request.target_true) == ("Zürich", "法国")
    table = end.join(["subject,prompt,target_new", "Zürich,{} lies in,Österreich", ""])
    (request,) = load_requests(written(tmp_path, table, "file.csv", encoding))
    assert (request.subject, request.target_new) == ("Zürich", "Österreich")
    texts = end.join(["Ein Text über Zürich", "", "二"])
    assert load_texts(written(tmp_path, texts, "file.txt", encoding)) == ["Ein Text über Zürich", "二"]
    assert load_texts(written(tmp_path, '{"text": "über"}', "file.jsonl", encoding)) == ["über"]


def test_utf16_of_the_other_order_and_a_big_endian_mark(tmp_path):
    for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        assert read_text(written(tmp_path, mark + "über".encode(encoding))) == "über"
    assert read_text(written(tmp_path, b"")) == ""
    assert read_text(written(tmp_path, b"a")) == "a"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "shift-jis"])
def test_another_encoding_is_refused(tmp_path, encoding):
    text = "日本" if encoding == "shift-jis" else "Zürich liegt"
    with pytest.raises(InputError, match=r"is not UTF-8 text \(byte .*save it as UTF-8"):
        load_texts(written(tmp_path, text, "file.txt", encoding))


@pytest.mark.parametrize("indent", [None, 1, 4])
@pytest.mark.parametrize("end", ["", "\n", "\n\n  "])
def test_one_object_is_one_record(tmp_path, indent, end):
    (fact,) = load_facts(written(tmp_path, json.dumps(FACT, indent=indent) + end))
    assert fact.subject == "Zürich"


def test_objects_over_several_lines_may_follow_each_other(tmp_path):
    second = json.dumps({**FACT, "id": "2"})
    text = f"{json.dumps(FACT, indent=2)}\n\n{second}\n{json.dumps({**FACT, 'id': '3'}, indent=2)}"
    path = written(tmp_path, text)
    assert [fact.id for fact in load_facts(path)] == ["1", "2", "3"]
    assert [location.rpartition(", ")[2] for _, location in read_records(path)] == ["line 1", "line 8", "line 9"]


WRAPPED = [{**REQUEST, "id": name, "subject": f"Lake {name}"} for name in "ab"]


@pytest.mark.parametrize(
    "content",
    [
        WRAPPED,
        {"data": WRAPPED},
        {"version": 2, "records": WRAPPED},
        {"requests": WRAPPED, "note": "x", "authors": ["y"]},
        {"a": WRAPPED[0], "b": WRAPPED[1]},
        {"a": {k: v for k, v in WRAPPED[0].items() if k != "id"}, "x": WRAPPED[1]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_wrappers(tmp_path, content, indent):
    requests = load_requests(written(tmp_path, json.dumps(content, indent=indent)))
    assert [(request.id, request.subject) for request in requests] == [("a", "Lake a"), ("b", "Lake b")]


def test_a_record_of_objects_is_no_dict_of_records(tmp_path):
    rewrite = {"prompt": "{} is", "subject": "Rome", "target_new": {"str": "a"}}
    (request,) = load_requests(written(tmp_path, json.dumps({"requested_rewrite": rewrite})))
    assert (request.id, request.subject) == ("0", "Rome")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"train": WRAPPED, "test": WRAPPED}), "holds records in train and in test, expected one list"),
        (json.dumps(FACT, indent=1)[:-1], r"line 6 is not JSON: column 1.*starts in line 1"),
        (
            json.dumps(FACT, indent=1).replace('"object": ', '"object" '),
            "line 5 is not JSON: column 11.*starts in line 1",
        ),
        (json.dumps(FACT)[:-1] + "\n" + json.dumps(FACT), "line 1 is not JSON"),
        (
            json.dumps(FACT) + "\n" + json.dumps(FACT, indent=1).replace(",", ""),
            r"line 4 is not JSON.*starts in line 2",
        ),
        (json.dumps(FACT) + " x", "line 1 is not JSON"),
        ("subject,prompt", "line 1 is not JSON"),
        ("{}", "has no field 'subject'"),
        ('{"a": {"b": 1}}', "record 'a' has a field 'b'"),
        ('{"subject": {"0": "Rome"}, "prompt": {"0": "{} is"}}', "record 'subject' has a field '0'"),
        ("3", "is a int, expected a JSON object"),
    ],
)
def test_a_bad_json_file_is_refused_with_the_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load_facts(written(tmp_path, text))


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text())), min_size=1), st.booleans())
def test_json_lines_and_objects_over_lines_are_read_as_they_were_written(tmp_path_factory, records, pretty):
    records = [{"text": "a", **record, "_": 0} for record in records]
    path = tmp_path_factory.mktemp("json") / "file.json"
    path.write_text("\n".join(json.dumps(record, indent=2 if pretty else None) for record in records))
    assert [record for record, _ in read_records(path)] == records


TSV = 'id\tsubject\tprompt\ttarget_new\tparaphrase\nx\tParis, Texas\t{} is in\t Ohio \t"a ""b""\tc"\n'


@pytest.mark.parametrize("name", ["file.tsv", "file.TSV", "file.tab"])
def test_a_tsv(tmp_path, name):
    (request,) = load_requests(written(tmp_path, TSV, name))
    assert (request.id, request.subject, request.target_new) == ("x", "Paris, Texas", "Ohio")
    assert request.paraphrases == ('a "b"\tc',)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("subject,prompt,target_new\nRome,{} is,a", "no column 'subject'.* separated by tabs"),
        ("subject\tprompt\ttarget_new\nRome\t{} is", "line 2 has 2 cells, expected 3.*holds a tab in double quotes"),
        ('subject\tprompt\ttarget_new\nRome\t{} "is\ta', "line 2 has a stray quote"),
        ("subject\tprompt\ttarget_new\tneighbour\nRome\t{} is\ta\tb", "a column 'neighbour'.*expected some of subject"),
        ("subject\tprompt\ttarget_new\ttargettrue\nRome\t{} is\ta\tb", "'targettrue'.*'target_true' may be meant"),
        ("subject\tprompt\ttarget_new\tparaphrases\nRome\t{} is\ta\tb", "'paraphrases'.*'paraphrase_1' may be meant"),
    ],
)
def test_a_bad_tsv_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load_requests(written(tmp_path, text, "file.tsv"))


def test_prompts_of_a_table_may_hold_the_subject(tmp_path):
    (request,) = load_requests(written(tmp_path, "subject,prompt,target_new\nUS,the US is in,a", "file.csv"))
    assert request.prompt == "the {} is in"


CLEAR = {"subject": "Rome", "prompt": "Rome is in", "target_new": "France", "target_true": "Italy", "portability": [{}]}
UNCLEAR = [
    ({"subject": "US", "prompt": "the USSR is"}, "no clear place for the subject: within a longer word"),
    ({"prompt": "it is in"}, "no clear place for the subject: 0 of them"),
    ({"prompt": "Rome, Rome is in"}, "no clear place for the subject: 2 of them"),
    ({"prompt": "{} and {}"}, "no clear place for the subject: more than one {}"),
    ({"target_new": " "}, "no target_new"),
    ({"subject": None}, "no subject"),
    ({"locality_prompt": "a"}, "no locality_ground_truth"),
]


@pytest.mark.parametrize(("change", "reason"), UNCLEAR)
def test_an_unclear_record_is_left_out_counted_and_named_or_refused(tmp_path, change, reason):
    path = written(tmp_path, json.dumps([CLEAR, {**CLEAR, "case_id": "odd", **change}, {**CLEAR, "case_id": 3}]))
    with pytest.warns(UserWarning, match="1 of 3") as caught:
        reading = read_edit_requests(path)
    assert str(caught[0].message) == f"{str(path)!r}: 1 of 3 requests are left out: odd ({reason})"
    assert [request.id for request in reading.records] == ["0", "3"]
    assert reading.omitted == (f"odd ({reason})",)
    assert reading.summary.endswith("; left out: 1")
    with pytest.raises(InputError, match=r"file\.json', record 2"):
        load_requests(path, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_requests(written(tmp_path, json.dumps([CLEAR])), strict=True)


def test_what_was_read_in_a_line(tmp_path):
    records = [
        {**CLEAR, "rephrase": ["a", "b"], "portability": {"x": [{"prompt": "c", "ground_truth": "d"}] * 1100}},
        {**CLEAR, "target_true": "", "neighbors": [{"prompt": "e", "object": "f"}], "case_id": 7},
    ]
    reading = read_edit_requests(written(tmp_path, json.dumps(records)))
    counts = "2 requests; 1 true object, 2 paraphrases, 1 neighbor; absent: attributes, generations"
    assert describe_requests(reading.records) == counts
    assert reading.summary == f"file.json: {counts}; not scored: 1,100 portability prompts"
    facts = read_facts(written(tmp_path, json.dumps([FACT])))
    assert (
        facts.summary == "file.json: " + describe_facts(facts.records) == "file.json: 1 fact; absent: relations, foils"
    )


def test_the_summary_of_shipped_data():
    assert describe_facts(load_facts("known")) == "2,065 facts; 10 relations; absent: foils"
    assert describe_requests(load_requests("tiny")).startswith("100 requests; 100 true objects, 200 paraphrases, ")
    assert describe_requests([]) == (
        "0 requests; absent: true objects, paraphrases, neighbors, attributes, generations"
    )


def test_the_command_line_says_what_was_read_and_refuses_when_strict(tmp_path, capsys):
    path = written(tmp_path, json.dumps([CLEAR, {**CLEAR, "prompt": "it is in"}]))
    arguments = ["edit", "--requests", str(path), "--layers", "99", "--out", str(tmp_path / "edit.safetensors")]
    with pytest.warns(UserWarning, match="1 of 2"), pytest.raises(SystemExit, match="2"):
        main(arguments)
    said = capsys.readouterr().err
    assert "read file.json: 1 request; 1 true object; absent: paraphrases" in said
    assert "left out: 1" in said
    assert "layer 99 is not in the model" in said  # the control: reading was not what failed
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--strict"])
    assert "record 2: the subject 'Rome' occurs 0 times" in capsys.readouterr().err
