"""RS, the reference score: does free text about the subject resemble texts about subjects that have the new object?

Reference texts belong to a (relation, object). The published release has its own texts and word weights; they can
also be made from any other texts (ROME §3.3, MEMIT Appendix C.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechedit.arguments import checked
from mechedit.data import EditRequest, load_snippets, load_word_weights, texts_by_object
from mechedit.errors import InputError, brief, first_line
from mechedit.evaluation.probe_prompts import ScoreRow
from mechedit.paths import checked_path
from mechedit.provenance import value_hash

Key = tuple[str, str]
"""A relation and an object, as requests name them (`relation`, `target_new`)."""
SNIPPETS = "attribute_snippets.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """Reference texts and the weights of the words by which texts are compared."""

    texts: Mapping[Key, tuple[str, ...]]
    """Texts by relation and object, without spaces around the object."""
    vectorizer: Any
    """scikit-learn's `TfidfVectorizer`, fitted; its rows have unit length."""

    @staticmethod
    def from_texts(texts: Mapping[Key, Iterable[str]]) -> References:
        """References with word weights fitted on the reference texts themselves, each of them one document.

        Raises:
            InputError: there are no texts, or no words in them.
        """
        texts = _cleaned(texts)
        try:
            vectorizer = _tfidf().fit([text for group in texts.values() for text in group])
        except ValueError as error:
            raise InputError(
                f"the reference texts hold no words ({first_line(error)}), expected texts about subjects that have the "
                f"new objects: give some, or none at all to leave RS out"
            ) from error
        return References(texts=texts, vectorizer=vectorizer)

    @staticmethod
    def from_release(
        samples: Mapping[Key, Iterable[str]], idf: Sequence[float] | np.ndarray, vocabulary: Mapping[str, int]
    ) -> References:
        """References with the texts and word weights of the published release.

        Args:
            samples: the texts of attribute_snippets.json, by relation and object.
            idf: inverse document frequency of each word (idf.npy).
            vocabulary: each word's index in `idf` (tfidf_vocab.json).

        Raises:
            InputError: indices that are not 0 to len(idf) − 1, or weights that are not finite.
        """
        weights = np.asarray(idf, dtype=float).reshape(-1)
        if sorted(vocabulary.values()) != list(range(len(weights))) or not np.isfinite(weights).all():
            raise InputError(
                f"idf holds {len(weights)} weights ({np.isfinite(weights).sum()} finite) and the vocabulary "
                f"{len(vocabulary)} words, expected a finite weight for each word and a word for each weight: take "
                f"both files from one release"
            )
        vectorizer = _tfidf(vocabulary=dict(vocabulary))
        vectorizer.idf_ = weights
        return References(texts=_cleaned(samples), vectorizer=vectorizer)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over texts and weights, in hex."""
        words = self.vectorizer.vocabulary_
        groups = sorted((relation, target, list(texts)) for (relation, target), texts in self.texts.items())
        return value_hash([groups, {word: float(self.vectorizer.idf_[index]) for word, index in words.items()}])

    def of(self, request: EditRequest) -> tuple[str, ...]:
        """Texts about subjects that have the request's new object; none where its relation is not known."""
        return self.texts.get((request.relation or "", request.target_new.strip()), ())

    def similarity(self, written: Iterable[str], reference: Iterable[str]) -> float:
        """Cosine of the TF-IDF vectors of two groups of texts, each joined to one, from 0 to 1.

        0 where the first group holds no known word; NaN where the reference holds none, since nothing resembles it.
        """
        rows = self.vectorizer.transform([" ".join(written), " ".join(reference)])
        if not rows[1].nnz:
            return math.nan
        return float((rows[0] @ rows[1].T).toarray().item())


@checked
def load_references(
    source: str | Path, requests: Sequence[EditRequest], *, cache: str | Path | None = None
) -> References:
    """Read the reference texts of some requests: for `evaluate(..., references=...)`.

    Args:
        source: `counterfact` for the published texts and word weights (downloaded once); a folder that holds them
            (attribute_snippets.json, idf.npy, tfidf_vocab.json); or a file in the form of the first, whose texts then
            give the weights themselves.
        requests: the requests that will be scored; each needs a relation and its object's id, as CounterFact has.
        cache: folder of downloads.

    Raises:
        InputError: a file that is not there or holds something else; or no texts for any of the requests.
    """
    folder = checked_path(source)
    snippets = load_snippets(folder / SNIPPETS if folder.is_dir() else source, cache=cache)
    texts = texts_by_object(snippets, requests)
    if not texts:
        raise InputError(
            f"{str(source)!r} holds no texts for any of the {len(requests)} requests, expected some for their relation "
            f"and the id of their new object: give references of these requests, or leave RS out"
        )
    if folder.is_file():
        return References.from_texts(texts)
    weights = load_word_weights(source, cache=cache)
    return References.from_release(texts, weights.idf, weights.vocabulary)


def reference_scores(answers: pd.DataFrame, requests: Sequence[EditRequest], references: References) -> list[ScoreRow]:
    """RS of each request that has free text and references: one row per case.

    All free texts of the request are compared, each with its prompt before it, as in the published code.

    Args:
        answers: free texts, with the columns `case, kind, question, answer`.
        requests: the requests that the texts are about.
        references: reference texts for their relations and new objects.
    """
    free = answers.loc[answers["kind"] == "generation"]
    texts = (free["question"] + free["answer"]).groupby(free["case"]).agg(list).to_dict()
    rows = []
    for request in requests:
        reference = references.of(request)
        if request.id in texts and reference:
            value = references.similarity(texts[request.id], reference)
            rows += [] if math.isnan(value) else [(request.id, "RS", "generation", 0, value)]
    return rows


def _cleaned(texts: Mapping[Key, Iterable[str]]) -> dict[Key, tuple[str, ...]]:
    """Texts by key, as tuples, with the object as requests name it; groups without text are left out."""
    cleaned: dict[Key, tuple[str, ...]] = {}
    for (relation, target), group in texts.items():
        if isinstance(group, str):
            raise InputError(
                f"the references of {brief(relation)} and {brief(target)} are one text, expected a list of texts: "
                f"put it in one"
            )
        key = (relation, target.strip())
        cleaned[key] = cleaned.get(key, ()) + tuple(text for text in group if text.strip())
    return {key: group for key, group in cleaned.items() if group}


def _tfidf(**settings: Any) -> Any:
    """A `TfidfVectorizer`; scikit-learn takes long to import, and most commands do without."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(**settings)
