"""RS: the cosine of TF-IDF vectors, by hand and against the formula of the published code."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.scoring import CONFIG, REQUESTS

from mechedit.errors import InputError
from mechedit.evaluation import References, evaluate, load_references
from mechedit.evaluation.references import reference_scores

ENGLISH = ("P103", "English")
REQUEST = replace(REQUESTS[0], relation="P103")
VOCABULARY = {"she": 0, "speaks": 1, "english": 2, "french": 3}
RELEASE = References.from_release({ENGLISH: ["she speaks english"]}, [1.0, 2.0, 3.0, 4.0], VOCABULARY)


def free_text(*answers: str, case: str = "darrieux", question: str = "She") -> pd.DataFrame:
    """Free texts of one case, all behind the same prompt."""
    rows = [(case, "generation", place, question, "English", answer, "after") for place, answer in enumerate(answers)]
    return pd.DataFrame(rows, columns=["case", "kind", "prompt", "question", "expected", "answer", "state"])


def test_the_cosine_by_hand() -> None:
    # Counts × idf: "she speaks french" → (1, 2, 0, 4), "she speaks english" → (1, 2, 3, 0).
    # Dot product 1 + 4 = 5; lengths √21 and √14.
    found = RELEASE.similarity(["She speaks French."], RELEASE.of(REQUEST))
    assert found == pytest.approx(5 / math.sqrt(21 * 14))
    # Texts are joined before they are compared: "she she speaks french" → (2, 2, 0, 4), dot 2 + 4, length √24.
    assert RELEASE.similarity(["she", "she speaks french"], RELEASE.of(REQUEST)) == pytest.approx(
        6 / math.sqrt(24 * 14)
    )
    assert RELEASE.similarity(["she speaks english", "SHE SPEAKS ENGLISH"], RELEASE.of(REQUEST)) == pytest.approx(1)
    assert RELEASE.similarity(["nothing known"], RELEASE.of(REQUEST)) == 0
    assert math.isnan(RELEASE.similarity(["she"], ["nothing known"]))


def test_it_is_the_published_formula_with_weights_from_texts() -> None:
    texts = {ENGLISH: ["John speaks English.", "English is her language."], ("P103", "French"): ["Leon speaks French."]}
    references = References.from_texts(texts)
    written = ["Danielle speaks English", "and Danielle is from France"]
    one, other = references.vectorizer.transform([" ".join(written), " ".join(texts[ENGLISH])]).toarray()
    expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert references.similarity(written, references.of(REQUEST)) == pytest.approx(expected)
    # A word that is in fewer reference texts weighs more: ln((1 + 3) / (1 + documents)) + 1.
    weight = dict(zip(references.vectorizer.get_feature_names_out(), references.vectorizer.idf_, strict=True))
    assert weight["speaks"] == pytest.approx(math.log(4 / 3) + 1)
    assert weight["french"] == pytest.approx(math.log(4 / 2) + 1)


def test_free_texts_count_with_their_prompts() -> None:
    # "She speaks french" and "She speaks english": counts (2, 2, 1, 1), weighted (2, 4, 3, 4), length √45; the
    # reference is (1, 2, 3, 0), length √14; dot product 2 + 8 + 9 = 19.
    rows = reference_scores(free_text(" speaks french", " speaks english"), [REQUEST], RELEASE)
    assert rows == [("darrieux", "RS", "generation", 0, pytest.approx(19 / math.sqrt(45 * 14)))]


def test_without_references_or_text_a_case_has_none() -> None:
    requests = [
        REQUEST,
        replace(REQUEST, id="relation unknown", relation="P999"),
        replace(REQUEST, id="no relation", relation=None),
        replace(REQUEST, id="object unknown", target_new="Korean"),
        replace(REQUEST, id="no text"),
    ]
    texts = pd.concat([free_text(" speaks", case=request.id) for request in requests[:-1]])
    assert [row[0] for row in reference_scores(texts, requests, RELEASE)] == ["darrieux"]
    unknown = References.from_release({ENGLISH: ["no word of it is known"]}, [1.0], {"she": 0})
    assert reference_scores(texts, requests, unknown) == []


def test_it_is_measured_and_counted(lens_model: Any) -> None:
    requests = [REQUEST, *REQUESTS[1:]]
    references = References.from_texts({ENGLISH: ["Danielle Darrieux was born in English the the"]})
    scores = evaluate(lens_model, requests, CONFIG, references=references)
    (row,) = scores.table[scores.table["measure"] == "RS"].to_dict("records")
    texts = scores.answers[(scores.answers["kind"] == "generation") & (scores.answers["case"] == "darrieux")]
    written = (texts["question"] + texts["answer"]).tolist()
    assert len(written) == 2
    assert row["value"] == pytest.approx(references.similarity(written, references.of(REQUEST)))
    assert 0.1 < row["value"] < 1
    assert scores.summary()["RS"] == {
        **dict.fromkeys(("mean", "low", "high"), pytest.approx(100 * row["value"])), "n": 1,
    }  # fmt: skip
    assert scores.counts["RS"] == {"cases": 1, "missing": 2, "prompts": 1}
    assert scores.protocol["references"] == references.hash
    assert "RS" not in evaluate(lens_model, requests, CONFIG).summary()
    quiet = evaluate(lens_model, requests, replace(CONFIG, generation_tokens=0), references=references)
    assert "RS" not in quiet.summary()


def test_equal_references_have_one_hash() -> None:
    again = References.from_release({ENGLISH: ["she speaks english"]}, np.array([[1.0, 2.0, 3.0, 4.0]]), VOCABULARY)
    heavier = References.from_release({ENGLISH: ["she speaks english"]}, [1.0, 2.0, 3.0, 5.0], VOCABULARY)
    more = References.from_release({ENGLISH: ["she speaks english", "she"]}, [1.0, 2.0, 3.0, 4.0], VOCABULARY)
    assert again.hash == RELEASE.hash
    assert len({RELEASE.hash, heavier.hash, more.hash}) == 3


def test_objects_count_without_spaces_around_them_and_blank_texts_not_at_all() -> None:
    references = References.from_texts({("P103", " English"): ["she speaks", " "], ENGLISH: ["he speaks"]})
    assert references.of(REQUEST) == ("she speaks", "he speaks")
    assert references.of(replace(REQUEST, target_new=" English ")) == ("she speaks", "he speaks")


def test_bad_references_are_refused() -> None:
    with pytest.raises(InputError, match="hold no words"):
        References.from_texts({})
    with pytest.raises(InputError, match="hold no words"):
        References.from_texts({ENGLISH: ["?", "…"]})
    with pytest.raises(InputError, match="expected a list of texts"):
        References.from_texts({ENGLISH: "one text"})
    with pytest.raises(InputError, match=r"2 weights .* 4 words"):
        References.from_release({ENGLISH: ["a"]}, [1.0, 2.0], VOCABULARY)
    with pytest.raises(InputError, match="expected a finite weight"):
        References.from_release({ENGLISH: ["a"]}, [1.0, math.nan, 1.0, 1.0], VOCABULARY)
    with pytest.raises(InputError, match="a word for each weight"):
        References.from_release({ENGLISH: ["a"]}, [1.0, 2.0], {"she": 0, "speaks": 2})


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder with the files of the published release."""
    samples = [{"text": "she speaks english"}, {"text": "english she speaks"}]
    records = [{"relation_id": "P103", "target_id": "Q1860", "samples": samples}]
    (tmp_path / "attribute_snippets.json").write_text(json.dumps(records))
    np.save(tmp_path / "idf.npy", np.array([1.0, 2.0, 3.0, 4.0]))
    (tmp_path / "tfidf_vocab.json").write_text(json.dumps(VOCABULARY))
    return tmp_path


def test_references_are_read_from_a_release_or_from_snippets_alone(release: Path) -> None:
    request = replace(REQUEST, target_id="Q1860")
    found = load_references(release, [request])
    assert found.of(request) == ("she speaks english", "english she speaks")
    assert found.vectorizer.idf_.tolist() == [1.0, 2.0, 3.0, 4.0]
    own = load_references(release / "attribute_snippets.json", [request])
    assert own.of(request) == found.of(request)
    # Every text holds each of the three words: ln(3/3) + 1.
    assert own.vectorizer.idf_.tolist() == [1.0, 1.0, 1.0]


def test_references_of_other_objects_are_refused(release: Path) -> None:
    with pytest.raises(InputError, match="no texts for any of the 1 requests"):
        load_references(release, [replace(REQUEST, target_id="Q150")])
    with pytest.raises(InputError, match="no texts for any of the 1 requests"):
        load_references(release, [REQUEST])
    (release / "idf.npy").unlink()
    with pytest.raises(InputError, match=r"idf\.npy"):
        load_references(release, [replace(REQUEST, target_id="Q1860")])
