"""Records of KnowEdit, EasyEdit, MQuAKE, RippleEdits and WikiBigEdit; and fields that nothing reads."""

from __future__ import annotations

import json
import warnings

import pytest

from mechedit import EditRequest, InputError, Neighbor, load_facts, load_requests
from mechedit.data import read_edit_requests

KNOWEDIT = {
    "subject": "Lake Orrin",
    "prompt": "The country of Lake Orrin is",
    "target_new": "Norway",
}
SHORT = {"id": "1", "subject": "Lake Orrin", "prompt": "{} lies in", "target_new": "Norway"}


def written(tmp_path, records):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(records))
    return path


def read(tmp_path, record):
    """The one request of a file that is read without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (request,) = load_requests(written(tmp_path, [record]))
    return request


def test_a_record_of_knowedit(tmp_path):
    record = {
        **KNOWEDIT,
        "ground_truth": ["Sweden", "Kingdom of Sweden"],
        "rephrase_prompt": "Lake Orrin lies in",
        "cond": "Sweden >> Norway || The country of Lake Orrin is",
        "locality": {
            "Relation_Specificity": [
                {"prompt": "Lake Orrin has an area of", "ground_truth": [["12 km2", "twelve"], ["12"]]},
                {"prompt": "Lake Orrin flows into", "ground_truth": "the Ande"},
            ],
            "Forgetfulness": [{"prompt": "The country of Lake Orrin, not Norway, is", "ground_truth": ["Sweden"]}],
        },
        "portability": {
            "Reasoning": [{"prompt": "The capital of Lake Orrin's country is", "ground_truth": [["Oslo"]]}],
            "Subject_Aliasing": [{"prompt": "The country of Orrinsjön is", "ground_truth": "Norway"}] * 2,
        },
    }
    request = read(tmp_path, record)
    assert request == EditRequest(
        id="0",
        subject="Lake Orrin",
        prompt="The country of {} is",
        target_new="Norway",
        target_true="Sweden",
        paraphrases=("Lake Orrin lies in",),
        neighbors=(
            Neighbor(prompt="Lake Orrin has an area of", object="12 km2"),
            Neighbor(prompt="Lake Orrin flows into", object="the Ande"),
            Neighbor(prompt="The country of Lake Orrin, not Norway, is", object="Sweden"),
        ),
    )
    reading = read_edit_requests(written(tmp_path, [record]))
    assert reading.not_scored == {"portability prompts": 3}


EMPTY = [None, "", "  ", "\u200b", [], [""], [[]], [[""], [None]], {}, {"Relation_Specificity": []}, float("nan")]
OPTIONAL = ["ground_truth", "target_true", "rephrase_prompt", "rephrase", "locality", "portability", "locality_prompt"]


@pytest.mark.parametrize("name", [*OPTIONAL, "paraphrases", "neighbors", "attributes", "case_id", "relation"])
def test_an_empty_field_is_an_absent_one(tmp_path, name):
    absent = read(tmp_path, KNOWEDIT)
    for value in EMPTY:
        assert read(tmp_path, {**KNOWEDIT, name: value}) == absent
    # The control: what is not empty is read.
    filled = {
        "ground_truth": "Sweden", "target_true": "Sweden", "locality_prompt": "The country of Malmö is",
        "locality": {"Forgetfulness": [{"prompt": "a", "ground_truth": "b"}]}, "case_id": 9, "relation": "P17",
        "neighbors": [{"prompt": "a", "object": "b"}], "portability": {"Reasoning": [{"prompt": "a"}]},
    }.get(name, ["Lake Orrin lies in"])  # fmt: skip
    answer = {"locality_ground_truth": "Sweden"} if name == "locality_prompt" else {}
    record = {**KNOWEDIT, name: filled, **answer}
    reading = read_edit_requests(written(tmp_path, [record]))
    assert reading.records != [absent] or reading.not_scored == {"portability prompts": 1}


@pytest.mark.parametrize("name", ["rephrase", "rephrase_prompt"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [("a", ("a",)), (["a"], ("a",)), (["a", "", "b", None, "a"], ("a", "b")), ("", ()), ([""], ())],
)
def test_several_rephrasings_or_none(tmp_path, name, value, expected):
    assert read(tmp_path, {**KNOWEDIT, name: value}).paraphrases == expected


def test_rephrasings_by_several_names_are_joined(tmp_path):
    record = {**KNOWEDIT, "paraphrases": ["a", "a"], "rephrase": ["b", "a"], "rephrase_prompt": "c"}
    assert read(tmp_path, record).paraphrases == ("a", "a", "c", "b")


@pytest.mark.parametrize(
    "value",
    ["Sweden", ["Sweden"], [["Sweden", "Kingdom of Sweden"]], ["", "Sweden", "Sverige"], [[], ["Sweden"], ["x"]]],
)
@pytest.mark.parametrize("name", ["ground_truth", "target_old", "target_true"])
def test_the_first_answer_is_the_object_that_is_replaced(tmp_path, name, value):
    assert read(tmp_path, {**KNOWEDIT, name: value}).target_true == "Sweden"


def test_two_fields_may_not_name_different_objects(tmp_path):
    record = {**KNOWEDIT, "ground_truth": "Sweden", "target_true": "Sweden"}
    assert read(tmp_path, record).target_true == "Sweden"
    with pytest.raises(InputError, match=r"record 1 names the object that the edit replaces as .*drop the others"):
        load_requests(written(tmp_path, [{**record, "target_true": "Finland"}]))


def test_easyedits_filler_is_no_object(tmp_path):
    filler = "<|endoftext|>"
    record = {**KNOWEDIT, "ground_truth": filler, "locality_prompt": "a", "locality_ground_truth": filler}
    assert read(tmp_path, record) == read(tmp_path, KNOWEDIT)
    assert read(tmp_path, {**KNOWEDIT, "ground_truth": [filler, "x"]}).target_true is None
    assert read(tmp_path, {**KNOWEDIT, "target_new": filler}).target_new == filler


@pytest.mark.parametrize(
    ("locality", "expected"),
    [
        ({"Relation_Specificity": [{"prompt": "a", "ground_truth": "b"}]}, [("a", "b")]),
        ([{"prompt": "a", "answer": "b"}], [("a", "b")]),
        ({"neighborhood": {"prompt": "a", "ground_truth": "b"}}, [("a", "b")]),
        ({"neighborhood": {"prompt": ["a", "c"], "ground_truth": ["b", "d"]}}, [("a", "b"), ("c", "d")]),
        ({"prompt": ["a", "c"], "ground_truth": [["b", "e"], ["d"]]}, [("a", "b"), ("c", "d")]),
        ({"x": [{"prompt": ["a"], "ground_truth": ["b", "d"]}]}, [("a", "b")]),
        ({"x": [{"prompt": "a", "ground_truth": ""}, {"prompt": "c", "ground_truth": "d"}]}, [("c", "d")]),
        ({"x": [{"prompt": ["a", "c"], "ground_truth": ["", "d"]}]}, [("c", "d")]),
        ({"x": None, "y": [{"prompt": "a", "ground_truth": "b"}, {}]}, [("a", "b")]),
    ],
)
def test_forms_of_locality(tmp_path, locality, expected):
    request = read(tmp_path, {**KNOWEDIT, "locality": locality})
    assert [(neighbor.prompt, neighbor.object) for neighbor in request.neighbors] == expected


@pytest.mark.parametrize(
    ("locality", "message"),
    [
        ({"x": ["a"]}, r"record 1: locality, x holds 'a', expected objects"),
        ({"x": [{"promt": "a", "ground_truth": "b"}]}, r"locality, x has a field 'promt'.*'prompt' may be meant"),
        ({"x": [{"prompt": ["a", "b"], "ground_truth": ["c"]}]}, "2 prompts and ground_truth 1 answers"),
        ({"x": "a"}, "locality, x: x is 'a', expected a list"),
        ({"x": [{"prompt": "a", "ground_truth": 3}]}, "the ground_truth is 3, expected text"),
    ],
)
def test_a_bad_locality_is_refused(tmp_path, locality, message):
    with pytest.raises(InputError, match=message):
        load_requests(written(tmp_path, [{**KNOWEDIT, "locality": locality}]))


def test_wikibios_names(tmp_path):
    record = {"concept": "ann orr", "text": "A text about ann orr. She was", "labels": "a physician.", "locality": {}}
    request = read(tmp_path, record)
    assert (request.subject, request.prompt) == ("ann orr", "A text about {}. She was")
    assert request.target_new == "a physician."


@pytest.mark.parametrize("record", [KNOWEDIT, {**KNOWEDIT, "ground_truth": "Sweden"}])
def test_braces_may_stand_for_the_subject_in_any_form(tmp_path, record):
    assert read(tmp_path, {**record, "prompt": "{} lies in"}).prompt == "{} lies in"


def test_braces_beside_easyedits_subject_are_not_for_it(tmp_path):
    record = {**KNOWEDIT, "prompt": "In Lake Orrin, {} is"}
    assert read(tmp_path, record).prompt == record["prompt"]
    with pytest.raises(InputError, match=r"both \{\} and the subject"):
        load_requests(written(tmp_path, [{**record, "ground_truth": "Sweden"}]))


@pytest.mark.parametrize("name", ["paraphrases", "rephrase", "generations"])
def test_braces_in_other_prompts_are_for_the_subject_too(tmp_path, name):
    texts = ["{} is found in", "Lake Orrin is found in"]
    request = read(tmp_path, {**SHORT, name: texts})
    prompts = request.generations if name == "generations" else request.paraphrases
    assert prompts == ("Lake Orrin is found in", "Lake Orrin is found in")


def test_an_objects_own_newline_is_its_own(tmp_path):
    record = {**KNOWEDIT, "target_new": "\n\nNorway", "ground_truth": "\nSweden"}
    record |= {"locality_prompt": "a", "locality_ground_truth": "\nb", "neighbors": [{"prompt": "c", "object": "\nd"}]}
    request = read(tmp_path, record)
    assert (request.target_new, request.target_true) == ("\n\nNorway", "\nSweden")
    assert [neighbor.object for neighbor in request.neighbors] == ["\nd", "\nb"]


# MQuAKE

REWRITE = {
    "prompt": "{} lies in",
    "relation_id": "P17",
    "target_new": {"str": "Norway", "id": "Q20"},
    "target_true": {"str": "Sweden", "id": "Q34"},
    "subject": "Lake Orrin",
    "question": "Where is Lake Orrin?",
}
SECOND = {**REWRITE, "prompt": "The capital of {} is", "subject": "Norway", "target_new": {"str": "Bergen"}}
MQUAKE = {
    "case_id": 1561,
    "requested_rewrite": [REWRITE, {**SECOND, "target_true": {"str": "Oslo"}, "question": "What is its capital?"}],
    "questions": ["What is the capital of Lake Orrin's country?", "a", "b"],
    "answer": "Stockholm",
    "answer_alias": [],
    "new_answer": "Bergen",
    "new_answer_alias": ["Bjørgvin"],
    "single_hops": [{"question": "a", "cloze": "b", "answer": "c", "answer_alias": []}],
    "new_single_hops": [],
    "orig": {"triples": [["Q1", "P17", "Q34"]]},
}


def test_mquakes_rewrites_are_requests(tmp_path):
    records = [MQUAKE, {**MQUAKE, "case_id": 7, "requested_rewrite": [REWRITE], "answer_extended": ["x"]}]
    reading = read_edit_requests(written(tmp_path, records))
    first, second, third = reading.records
    assert first == EditRequest(
        id="1561-1",
        subject="Lake Orrin",
        prompt="{} lies in",
        target_new="Norway",
        target_true="Sweden",
        relation="P17",
        paraphrases=("Where is Lake Orrin?",),
        target_id="Q20",
    )
    assert (second.id, second.text, second.target_new) == ("1561-2", "The capital of Norway is", "Bergen")
    assert (third.id, third.text) == ("7", first.text)
    assert reading.not_scored == {"multi-hop questions": 6}


def test_mquakes_rewrites_with_one_unclear_are_left_out_as_a_record(tmp_path):
    unclear = {**MQUAKE, "case_id": 2, "requested_rewrite": [REWRITE, {**SECOND, "target_new": {"str": ""}}]}
    with pytest.warns(UserWarning, match=r"1 of 3 requests are left out: 2 \(no target_new\)"):
        requests = load_requests(written(tmp_path, [MQUAKE, unclear]))
    assert [request.id for request in requests] == ["1561-1", "1561-2"]
    with pytest.raises(InputError, match="record 1: requested_rewrite is empty, expected rewrites"):
        load_requests(written(tmp_path, [{**MQUAKE, "requested_rewrite": []}]))


# WikiBigEdit

WIKIBIGEDIT = {
    "tag": "new",
    "subject": "Lake Orrin",
    "update": "In which country is Lake Orrin?",
    "rephrase": "Where does Lake Orrin lie?",
    "ans": "Norway",
    "loc": "What is the capital of Norway?",
    "loc_ans": "Oslo",
    "personas": "Tell me, where would one find Lake Orrin?",
    "personas_pirate": "Arr, where be Lake Orrin?",
    "mhop": "What is the capital of Lake Orrin's country?",
    "mhop_ans": "Oslo",
    "relation": "country",
    "subject_id": "Q1",
}


def test_a_record_of_wikibigedit(tmp_path):
    reading = read_edit_requests(written(tmp_path, [WIKIBIGEDIT]))
    assert reading.records == [
        EditRequest(
            id="0",
            subject="Lake Orrin",
            prompt="In which country is {}?",
            target_new="Norway",
            relation="country",
            paraphrases=("Where does Lake Orrin lie?",),
            neighbors=(Neighbor(prompt="What is the capital of Norway?", object="Oslo"),),
        )
    ]
    assert reading.not_scored == {"persona questions": 2, "multi-hop questions": 1}
    bare = {**WIKIBIGEDIT, **dict.fromkeys(("loc_ans", "mhop", "personas", "personas_pirate", "rephrase"))}
    request = read(tmp_path, bare)
    assert request.neighbors == request.paraphrases == ()


# RippleEdits


def query(prompt, answer, relation, subject_id="Q1", target_id="Q9", **fields):
    return {
        "prompt": prompt, "answers": [{"value": answer, "aliases": [f"the {answer}"]}], "query_type": "regular",
        "subject_id": subject_id, "relation": relation, "target_ids": [target_id], "phrase": None, **fields,
    }  # fmt: skip


def checks_of(*queries):
    return [{"test_queries": [q], "test_condition": "OR", "condition_queries": []} for q in queries]


def ripple(subject="Ann Orr", new="United Arab Emirates", old="United Kingdom", **fields):
    stem = f"The name of the country of citizenship of {subject} is"
    fact = {"subject_id": "Q1", "relation": "COUNTRY_OF_CITIZENSHIP", "target_id": "Q2"}
    return {
        "example_type": "popular",
        "edit": {"prompt": f"{stem} {new}.", **fact, "original_fact": {"prompt": f"{stem} {old}.", **fact}},
        "Relation_Specificity": checks_of(
            query(f"The name of the mother of {subject} is", "Eve Orr", "MOTHER"),
            query(f"The gender of {subject} is", "female", "SEX_OR_GENDER"),
        ),
        "Logical_Generalization": checks_of(query("a", "b", "X", "Q5")) * 2,
        "Subject_Aliasing": checks_of(
            query("The name of the country of citizenship of A. Orr is", new, "COUNTRY_OF_CITIZENSHIP", "Q1", "Q2")
        ),
        "Compositionality_I": checks_of(query("c", "d", "X", query_type="two_hop", phrase="c")),
        "Compositionality_II": [],
        "Forgetfulness": checks_of(query(f"{stem[:-3]}, which is not {new}, is", old, "X", "Q1", phrase="p")),
        **fields,
    }


def without_alias(record):
    return {**record, "Subject_Aliasing": []}


def test_a_record_of_rippleedits(tmp_path):
    reading = read_edit_requests(written(tmp_path, [ripple()]))
    stem = "The name of the country of citizenship of Ann Orr"
    assert reading.records == [
        EditRequest(
            id="0",
            subject="Ann Orr",
            prompt="The name of the country of citizenship of {} is",
            target_new="United Arab Emirates",
            target_true="United Kingdom",
            relation="COUNTRY_OF_CITIZENSHIP",
            paraphrases=("The name of the country of citizenship of A. Orr is",),
            neighbors=(
                Neighbor(prompt="The name of the mother of Ann Orr is", object="Eve Orr"),
                Neighbor(prompt="The gender of Ann Orr is", object="female"),
                Neighbor(prompt=f"{stem}, which is not United Arab Emirates, is", object="United Kingdom"),
            ),
            target_id="Q2",
        )
    ]
    assert reading.not_scored == {"ripple prompts": 3}


SUBJECTS = ["Ann Orr", "Madonna", "The Hague", "Ring of Fire", "the lake", "Æ", "李白", "Tale is Told"]
CASES = [
    (subject, old, aliased)
    for subject in SUBJECTS
    for old in ("United Kingdom", "Sweden", "", None)
    for aliased in (True, False)
]
CASES.remove(("Tale is Told", None, False))  # below: nothing shows where its object begins


@pytest.mark.parametrize(("subject", "old", "aliased"), CASES)
def test_subject_and_objects_of_rippleedits(tmp_path, subject, old, aliased):
    """Whatever objects and subjects have in common with each other and with the words of prompts."""
    record = ripple(subject, old=old or "")
    if old is None:
        del record["edit"]["original_fact"]
    request = read(tmp_path, record if aliased else without_alias(record))
    assert (request.subject, request.target_new) == (subject, "United Arab Emirates")
    assert request.prompt == "The name of the country of citizenship of {} is"
    assert request.target_true == (old or None)


STEMS = ["{} follows", "{} is followed by", "The name of the country which {} is associated with is"]


@pytest.mark.parametrize("template", [*STEMS, "The name of the award {} won is", "The names of the siblings of {} are"])
def test_other_stems_of_rippleedits(tmp_path, template):
    record = ripple()
    record["edit"]["prompt"] = template.format("Ann Orr") + " Japan."
    record["edit"]["original_fact"]["prompt"] = template.format("Ann Orr") + " Jamaica."
    request = read(tmp_path, without_alias(record))
    assert (request.prompt, request.subject) == (template, "Ann Orr")
    assert (request.target_new, request.target_true) == ("Japan", "Jamaica")


def test_an_unclear_record_of_rippleedits_is_left_out(tmp_path):
    no_subject = {**ripple(), "Relation_Specificity": [], "Forgetfulness": []}
    no_object = without_alias(ripple("Tale is Told"))
    del no_object["edit"]["original_fact"]
    path = written(tmp_path, [ripple(), no_subject, no_object])
    with pytest.warns(UserWarning, match=r"2 of 3 .*: 1 \(no clear place for the subject.*, 2 \(no clear .* object\)"):
        assert len(load_requests(path)) == 1
    with pytest.raises(InputError, match="record 2: edit: no question of the record shows"):
        load_requests(path, strict=True)
    named = {**no_subject, "edit": {**no_subject["edit"], "subject": "Ann Orr"}}
    named_object = {**no_object, "edit": {**no_object["edit"], "target": "United Arab Emirates"}}
    assert len(load_requests(written(tmp_path, [named, named_object]))) == 2


def test_a_word_that_prompts_of_two_relations_share_is_not_the_subject(tmp_path):
    record = ripple("Peru")
    record["edit"]["prompt"] = "The name of the capital city of Peru is Cusco."
    record["edit"]["original_fact"]["prompt"] = "The name of the capital city of Peru is Lima."
    record["Relation_Specificity"] = checks_of(
        query("The name of the country which Peru is the capital of is", "x", "Y")
    )
    assert read(tmp_path, without_alias(record)).prompt == "The name of the capital city of {} is"


def test_the_published_spelling_of_relation_specificity(tmp_path):
    record = ripple()
    record["Relation_Specifity"] = record.pop("Relation_Specificity")
    assert len(read(tmp_path, record).neighbors) == 3


# Fields that nothing reads

FORMS = {
    "short": SHORT,
    "knowedit": {**KNOWEDIT, "ground_truth": "Sweden"},
    "counterfact": {"case_id": 1, "requested_rewrite": REWRITE},
    "mquake": MQUAKE,
    "mend": {"subject": "Lake Orrin", "src": "Where is Lake Orrin?", "answers": ["Norway"]},
    "wikibigedit": WIKIBIGEDIT,
    "rippleedits": ripple(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_field_that_nothing_reads_is_refused_in_every_form(tmp_path, form):
    nothing_reads = r"record 1 has a field 'zzz', which nothing reads; expected some of .*id"
    with pytest.raises(InputError, match=nothing_reads) as refused:
        load_requests(written(tmp_path, [{**FORMS[form], "zzz": 1}]))
    assert len(str(refused.value).replace(str(tmp_path), "")) < 390, "it fits into a line with what to do"
    notes = {"_zzz": 1, "zzz": None, "zzzz": "", "note": []}
    with_notes, plain = (load_requests(written(tmp_path, [{**FORMS[form], **extra}])) for extra in (notes, {}))
    assert with_notes == plain


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("paraphrase", "paraphrases"),
        ("neighbours", "neighbors"),
        ("Subject", "subject"),
        ("target-new", "target_new"),
        ("targetTrue", "target_true"),
        ("ground truth", "ground_truth"),
        ("rephrase_prompts", "rephrase_prompt"),
        ("locality_promt", "locality_prompt"),
    ],
)
def test_the_nearest_known_field_is_named(tmp_path, name, meant):
    with pytest.raises(InputError, match=f"has a field '{name}', which nothing reads; '{meant}' may be meant"):
        load_requests(written(tmp_path, [{**SHORT, name: "x"}]))


def test_unknown_fields_of_nested_objects_are_refused(tmp_path):
    for record, message in [
        (
            {**SHORT, "neighbors": [{"prompt": "a", "object": "b", "objekt": "c"}]},
            r"neighbors\[0\] has a field 'objekt'",
        ),
        ({"case_id": 1, "requested_rewrite": {**REWRITE, "targetnew": "x"}}, "requested_rewrite has a field 'targetn"),
        ({"case_id": 1, "requested_rewrite": {**REWRITE, "target_new": {"str": "x", "name": "y"}}}, "a field 'name'"),
    ]:
        with pytest.raises(InputError, match=message):
            load_requests(written(tmp_path, [record]))


def test_unknown_fields_of_facts_are_refused(tmp_path):
    fact = {"id": "1", "subject": "Lake Orrin", "prompt": "Lake Orrin lies in", "object": "Norway"}
    assert load_facts(written(tmp_path, [fact]))[0].prompt == "{} lies in"
    with pytest.raises(InputError, match="record 1 has a field 'relations', which nothing reads; 'relation' may be"):
        load_facts(written(tmp_path, [{**fact, "relations": "x"}]))


@pytest.mark.parametrize(
    "fact",
    [
        {"id": "1", "subject": "Lake Orrin", "prompt": "{} lies in", "object": "Norway"},
        {"known_id": 0, "subject": "Lake Orrin", "attribute": "Norway", "template": "{} lies in", "prediction": " N"},
    ],
)
def test_facts_that_are_read_as_requests_are_told_so(tmp_path, fact):
    message = r"record 1 is a fact to trace \(it has '(object|attribute)', .*read facts by load_facts \(--facts\)"
    with pytest.raises(InputError, match=message):
        load_requests(written(tmp_path, [fact]))
    assert len(load_facts(written(tmp_path, [fact]))) == 1, "the control"


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"wikibigedit"}))  # which have an object too
def test_requests_that_are_read_as_facts_are_told_so(tmp_path, form):
    message = r"record 1 is an edit request \(it has '\w+', .*read requests by load_requests \(--requests\)"
    with pytest.raises(InputError, match=message):
        load_facts(written(tmp_path, [FORMS[form]]))


def test_forms_may_be_mixed_in_a_file(tmp_path):
    bare = [{key: value for key, value in record.items() if key not in ("id", "case_id")} for record in FORMS.values()]
    requests = load_requests(written(tmp_path, [{**record, "id": f"x{n}"} for n, record in enumerate(bare)]))
    assert [request.id for request in requests] == ["x0", "x1", "x2", "x3-1", "x3-2", "x4", "x5", "x6"]


def test_records_without_an_id_have_their_index(tmp_path):
    bare = {key: value for key, value in SHORT.items() if key != "id"}
    requests = load_requests(written(tmp_path, [bare, {**bare, "subject": "Lake Ande"}]))
    assert [request.id for request in requests] == ["0", "1"]
