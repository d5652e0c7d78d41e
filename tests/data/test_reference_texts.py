"""Reference texts and TF-IDF files of the published release."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from mechedit import EditRequest, InputError, load_snippets, load_word_weights
from mechedit.data import published_data, texts_by_object
from mechedit.data.downloads import RemoteFile

TEXTS = ["Rome is in Italy", "Milan is in Italy too", "Paris is in France"]


def snippets(tmp_path, content):
    path = tmp_path / "attribute_snippets.json"
    path.write_text(json.dumps(content))
    return path


def entry(relation, target, *texts):
    samples = [{"name": "someone", "target": {"str": "Italy", "id": target}, "text": text} for text in texts]
    return {"relation_id": relation, "target_id": target, "samples": samples}


def test_texts_are_grouped_by_relation_and_object(tmp_path):
    content = [entry("P17", "Q38", *TEXTS[:1]), entry("P17", "Q142", TEXTS[2]), entry("P17", "Q38", TEXTS[1])]
    loaded = load_snippets(snippets(tmp_path, [*content, entry("P17", "Q1")]))
    assert loaded == {("P17", "Q38"): tuple(TEXTS[:2]), ("P17", "Q142"): (TEXTS[2],)}


def test_requests_find_their_texts_by_the_id_of_the_new_object(tmp_path):
    loaded = load_snippets(snippets(tmp_path, [entry("P17", "Q38", *TEXTS[:2])]))
    base = {"subject": "Lyon", "prompt": "{} is in", "target_new": "Italy"}
    requests = [
        EditRequest(id="a", relation="P17", target_id="Q38", **base),
        EditRequest(id="b", relation="P17", target_id="Q142", **{**base, "target_new": "France"}),
        EditRequest(id="c", **{**base, "target_new": "Spain"}),
    ]
    assert texts_by_object(loaded, requests) == {("P17", "Italy"): tuple(TEXTS[:2])}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"relation_id": "P17", "samples": []}], "record 1 has no field 'target_id'"),
        ([entry("P17", "Q38", "")], r"record 1: samples\[0\]: the text is ''"),
        ([{**entry("P17", "Q38"), "samples": ["text"]}], r"record 1: samples\[0\] is 'text', expected a JSON object"),
        ([entry("P17", "Q38")], "holds no texts"),
        ([], "holds no texts"),
    ],
)
def test_bad_reference_texts_are_named(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        load_snippets(snippets(tmp_path, content))


def release(tmp_path, idf=None, words=None):
    """What the published code writes of a fitted vectorizer."""
    fitted = TfidfVectorizer().fit(TEXTS)
    np.save(tmp_path / "idf.npy", fitted.idf_ if idf is None else idf, allow_pickle=True)
    words = {word: int(index) for word, index in fitted.vocabulary_.items()} if words is None else words
    (tmp_path / "tfidf_vocab.json").write_text(json.dumps(words))
    return fitted


def test_weights_are_those_of_the_fitted_vectorizer(tmp_path):
    fitted = release(tmp_path)
    weights = load_word_weights(tmp_path)
    assert weights.vocabulary == fitted.vocabulary_
    assert weights.idf.tolist() == fitted.idf_.tolist()
    # "is" is in all three texts, "italy" in two, "rome" in one: ln((1 + 3) / (1 + n)) + 1.
    idf = [weights.idf[weights.vocabulary[word]] for word in ("is", "italy", "rome")]
    assert idf == pytest.approx([1, 1 + np.log(4 / 3), 1 + np.log(2)])
    again = TfidfVectorizer(vocabulary=weights.vocabulary)
    again.idf_ = weights.idf
    assert np.allclose(again.transform(["Rome is too"]).toarray(), fitted.transform(["Rome is too"]).toarray())


@pytest.mark.parametrize(
    ("idf", "words", "message"),
    [
        (np.ones(3), {"a": 0, "b": 1}, r"holds 2 words and idf\.npy 3 numbers, expected as many"),
        (np.ones(2), {"a": 0, "b": 0}, "gives two words the same index"),
        (np.ones(2), {"a": 0, "b": 2}, "the index of 'b' is 2, expected 0 to 1"),
        (np.ones(2), {"a": 0, "b": True}, "the index of 'b' is True"),
        (np.ones(2), ["a", "b"], "is a list, expected an object"),
        (np.ones((2, 2)), {"a": 0, "b": 1}, r"float64 of shape \(2, 2\), expected a vector"),
        (np.array([1, 2]), {"a": 0, "b": 1}, "holds int64"),
        (np.array([1.0, np.nan]), {"a": 0, "b": 1}, "not positive and finite"),
        (np.array([1.0, -1.0]), {"a": 0, "b": 1}, "not positive and finite"),
        (np.array([]), {}, "not positive and finite"),
        (np.array([{}, {}]), {"a": 0, "b": 1}, "cannot be read as a NumPy file"),  # a pickle, which could run any code
    ],
)
def test_files_that_do_not_agree_are_refused(tmp_path, idf, words, message):
    release(tmp_path, idf, words)
    with pytest.raises(InputError, match=message):
        load_word_weights(tmp_path)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"idf\.npy' cannot be read as a NumPy file \(No such file"):
        load_word_weights(tmp_path)
    (tmp_path / "idf.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"idf\.npy' cannot be read as a NumPy file"):
        load_word_weights(tmp_path)
    release(tmp_path)
    (tmp_path / "tfidf_vocab.json").unlink()
    with pytest.raises(InputError, match=r"cannot read the file .*tfidf_vocab\.json"):
        load_word_weights(tmp_path)


def test_by_name_they_are_those_in_the_cache(tmp_path, monkeypatch):
    """Put there by hand, so that nothing is downloaded."""
    release(tmp_path)
    snippets(tmp_path, [entry("P17", "Q38", *TEXTS[:2])])
    nowhere = "http://127.0.0.1:9"
    for kind, files in (("snippets", ["attribute_snippets.json"]), ("word weights", ["idf.npy", "tfidf_vocab.json"])):
        remotes = tuple(RemoteFile(url=f"{nowhere}/{file}") for file in files)
        assert [remote.name for remote in published_data.PUBLISHED_DATASETS[kind, "counterfact"].files] == files
        monkeypatch.setitem(
            published_data.PUBLISHED_DATASETS,
            (kind, "counterfact"),
            published_data.PublishedDataset(files=remotes, origin=""),
        )
    assert len(load_snippets(cache=tmp_path)) == 1
    assert len(load_word_weights(cache=tmp_path).idf) == 8
