"""Where the subject stands in a prompt: once, as whole words, in scripts with spaces and without."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mechedit import InputError, load_facts, load_requests
from mechedit.data import check_requests, fill
from mechedit.data.characters import visible
from mechedit.data.facts import EditRequest
from mechedit.data.templates import make_template

INVISIBLE = {
    "space": " ", "tab": "\t", "line feed": "\n", "no-break space": "\xa0", "thin space": "\u2009",
    "ideographic space": "\u3000", "zero-width space": "\u200b", "byte-order mark": "\ufeff", "soft hyphen": "\xad",
    "left-to-right mark": "\u200e", "right-to-left mark": "\u200f", "isolate": "\u2068", "null": "\0",
    "word joiner": "\u2060", "zero-width joiner": "\u200d", "zero-width non-joiner": "\u200c",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "subject", "expected"),
    [
        ("US law is", "US", "{} law is"),
        ("USSR and US are", "US", "USSR and {} are"),
        ("the capital of (France) is", "France", "the capital of ({}) is"),
        ("France's capital is", "France", "{}'s capital is"),
        ("Saint-Denis-en-Val is", "Denis", "Saint-{}-en-Val is"),
        ("C++ was made by", "C++", "{} was made by"),
        ("Where is Yahoo! based", "Yahoo!", "Where is {} based"),
        ("法国的首都是", "法国", "{}的首都是"),
        ("我在法国住", "法国", "我在{}住"),
        ("フランスの首都は", "フランス", "{}の首都は"),
        ("ประเทศไทยมีเมืองหลวงคือ", "ประเทศไทย", "{}มีเมืองหลวงคือ"),
        ("iPhone是由", "iPhone", "{}是由"),
        ("苹果iPhone是由", "iPhone", "苹果{}是由"),
        ("프랑스의 수도는", "프랑스", "{}의 수도는"),
        ("NASA는", "NASA", "{}는"),
        ("फ्रांस की राजधानी", "फ्रांस", "{} की राजधानी"),
        ("عاصمة فرنسا هي", "فرنسا", "عاصمة {} هي"),
        ("The mood of 😀 is", "😀", "The mood of {} is"),
        ("😀😃 and 😃x is", "😀", "{}😃 and 😃x is"),
        ("I ❤\ufe0f you", "❤", "I {}\ufe0f you"),
        ("zero\u200bwidth is", "zero", "{}\u200bwidth is"),
    ],
)
def test_whole_words(text, subject, expected):
    assert make_template(text, subject, "here") == expected


@pytest.mark.parametrize(
    ("text", "subject", "longer"),
    [
        ("The first leader of the USSR was", "US", "USSR"),
        ("Artists say", "Art", "Artists"),
        ("the smart art_dealer is", "art", "smart"),
        ("In 1984 there was", "19", "1984"),
        ("Die Hauptstadt Frankreichs ist", "Frankreich", "Frankreichs"),
        ("भारती का जन्म", "भारत", "भारती"),
        ("Jose\u0301 is", "Jose", "Jose\u0301"),
        ("남한국의 수도는", "한국", "남한국의"),
        ("کتاب\u200cها را", "کتاب", "کتاب"),
        ("👨\u200d👩\u200d👧 are", "👨", "👨"),
        ("Москва — столица", "Моск", "Москва"),
    ],
)
def test_a_subject_within_a_longer_word_is_refused_with_the_word(text, subject, longer):
    with pytest.raises(InputError, match=f"here: the subject '{subject}' .* only within the longer word '{longer}"):
        make_template(text, subject, "here")


@given(st.text(), st.text(min_size=1), st.text())
def test_a_template_gives_its_prompt_back(before, subject, after):
    """Whatever is read puts the subject back where it stood; and what is whole words can be read."""
    text = f"{before} {subject} {after}"
    assume("{}" not in text and not subject[0].isspace() and not subject[-1].isspace())
    try:
        template = make_template(text, subject, "here")
    except InputError:
        assert text.count(subject) != 1 or subject[0] == "\u200d" or subject[-1] == "\u200d"
        return
    assert fill(template, subject) == text


@pytest.mark.parametrize("ends", INVISIBLE)
def test_invisible_characters_at_a_subjects_ends_are_dropped(tmp_path, ends):
    mark = INVISIBLE[ends]
    path = tmp_path / "file.json"
    base = {"id": "1", "prompt": "The capital of France is", "object": "Paris"}
    for subject in (mark + "France", "France" + mark, 2 * mark + "France" + mark):
        path.write_text(json.dumps([{**base, "subject": subject}]))
        (fact,) = load_facts(path)
        assert (fact.subject, fact.prompt) == ("France", "The capital of {} is")
        request = {**base, "subject": subject, "target_new": base["object"]}
        del request["object"]
        path.write_text(json.dumps([request]))
        assert load_requests(path)[0].subject == "France"


def test_invisible_characters_within_a_subject_are_its_own(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps([{"subject": "New\xa0York", "prompt": "{} is in", "target_new": "Ohio"}]))
    assert load_requests(path)[0].subject == "New\xa0York"


def test_a_subject_that_nobody_sees_is_none(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps([{"subject": "\u200b", "prompt": "{} is in", "target_new": "Ohio"}]))
    with pytest.raises(InputError, match=r"record 1: the subject is '.u200b', expected text that is not empty"):
        load_requests(path)


def request(name, **changes):
    base = {"subject": "Rome", "prompt": "{} is in", "target_new": "France"}
    return EditRequest(id=name, **{**base, **changes})


@pytest.mark.parametrize("ends", INVISIBLE)
def test_requests_conflict_whatever_nobody_sees_in_them(ends):
    mark = INVISIBLE[ends]
    for name in ("subject", "prompt"):
        text = getattr(request("a"), name)
        for changed in (text + mark, mark + text, mark + text + mark):
            assert visible(changed) == text
            agreeing = request("b", **{name: changed, "target_new": f"France{mark}"})
            check_requests([request("a"), agreeing])
            with pytest.raises(InputError, match="'a' and 'b' conflict"):
                check_requests([request("a"), request("b", **{name: changed, "target_new": "Spain"})])


def test_conflicts_in_files_are_seen_whatever_nobody_sees(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text('subject,prompt,target_new\nRome,{} is in,France\n"Rome\u200b",{} is in,Spain\n')
    with pytest.raises(InputError, match="'2' and '3' conflict"):
        load_requests(path)
    with pytest.warns(UserWarning, match="1 of 2 requests are left out: 3 .conflicts"):
        assert len(load_requests(path, conflicts="first")) == 1
