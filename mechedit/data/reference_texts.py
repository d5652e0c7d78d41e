"""Reference texts about objects, and TF-IDF weights of words to compare texts by: the data of RS (MEMIT C.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from mechedit.arguments import checked
from mechedit.data.downloads import starting_over
from mechedit.data.facts import EditRequest
from mechedit.data.json_files import read_records
from mechedit.data.json_records import JsonRecord
from mechedit.data.published_data import dataset_files
from mechedit.errors import InputError, brief
from mechedit.files import read_arrays, read_json

Snippets = Mapping[tuple[str, str], tuple[str, ...]]
"""Texts by (relation, id of the object), about subjects that have this relation to this object."""

IDF_FILE, VOCABULARY_FILE = "idf.npy", "tfidf_vocab.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class WordWeights:
    """Weights of a fitted TF-IDF: `vocabulary_` and `idf_` of scikit-learn's TfidfVectorizer."""

    vocabulary: dict[str, int]
    """Index in `idf` per word."""
    idf: Float[np.ndarray, " word"]
    """ln((1 + texts) / (1 + texts with the word)) + 1, as scikit-learn computes it."""


@checked
def load_snippets(source: str | Path = "counterfact", *, cache: str | Path | None = None) -> Snippets:
    """Read reference texts: `counterfact` for the published ones (downloaded once, large), or a path.

    The file is a JSON list of `{"relation_id", "target_id", "samples": [{"text", …}]}`. A request's texts are
    those of `(request.relation, request.target_id)`; a pair that is not in the file has none.

    Raises:
        InputError: no such file or name; not JSON; a field missing or empty (the message names the record).
    """
    (path,) = dataset_files(source, "snippets", cache, checks=[_parse_snippets]) or (Path(source),)
    with starting_over(path):
        return _parse_snippets(path)


def _parse_snippets(path: Path) -> Snippets:
    snippets: dict[tuple[str, str], list[str]] = {}
    for index, (fields, location) in enumerate(read_records(path)):
        record = JsonRecord(fields, location, index)
        texts = snippets.setdefault((record.text("relation_id"), record.text("target_id")), [])
        texts += [sample.text("text") for sample in record.nested_list("samples")]
    if not any(snippets.values()):
        raise InputError(f"{str(path)!r} holds no texts, expected a list of records with samples: check the file")
    return {key: tuple(texts) for key, texts in snippets.items() if texts}


def texts_by_object(snippets: Snippets, requests: Iterable[EditRequest]) -> Snippets:
    """Select the texts about the requests' new objects, by relation and by the object as the request names it.

    The release identifies objects by id alone, so a request's texts are looked up by its `target_id`.
    """
    selected: dict[tuple[str, str], tuple[str, ...]] = {}
    for request in requests:
        texts = snippets.get((request.relation or "", request.target_id or ""))
        if texts:
            selected[request.relation or "", request.target_new] = texts
    return selected


@checked
def load_word_weights(source: str | Path = "counterfact", *, cache: str | Path | None = None) -> WordWeights:
    """Read TF-IDF weights: `counterfact` for the published ones (downloaded once), or a folder.

    The folder holds idf.npy, a vector of numbers, and tfidf_vocab.json, an object of words and their indices in it.

    Raises:
        InputError: no such folder, file or name; idf is not a vector of positive numbers; the vocabulary does not
            give each index once.
    """
    folder = Path(source)
    files = dataset_files(source, "word weights", cache, checks=[_read_idf, _read_vocabulary])
    idf_file, vocabulary_file = files or (folder / IDF_FILE, folder / VOCABULARY_FILE)
    with starting_over(idf_file):
        idf = _read_idf(idf_file)
    with starting_over(vocabulary_file):
        return WordWeights(vocabulary=_read_vocabulary(vocabulary_file, len(idf)), idf=idf)


def _read_idf(path: Path) -> Float[np.ndarray, " word"]:
    arrays = read_arrays(path)
    idf = arrays.get("", np.empty(0))
    description = f"{idf.dtype!s:.80} of shape {idf.shape}" if "" in arrays else "several arrays"
    if idf.ndim != 1 or not np.issubdtype(idf.dtype, np.floating):
        raise InputError(
            f"{str(path)!r} holds {description}, expected a vector of floating-point numbers: check the file"
        )
    if not len(idf) or not np.isfinite(idf).all() or not (idf > 0).all():
        raise InputError(
            f"{str(path)!r} ({description}) holds numbers that are not positive and finite: check the file"
        )
    return idf.astype(np.float64)


def _read_vocabulary(path: Path, size: int | None = None) -> dict[str, int]:
    words = read_json(path)
    if not isinstance(words, dict):
        raise InputError(
            f"{str(path)!r} is a {type(words).__name__}, expected an object of words and their indices: check it"
        )
    size = len(words) if size is None else size
    if len(words) != size:
        raise InputError(
            f"{str(path)!r} holds {len(words)} words and {IDF_FILE} {size} numbers, expected as many: take both "
            f"files from one release"
        )
    for word, index in words.items():
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < size:
            raise InputError(
                f"{str(path)!r}: the index of {brief(word)} is {brief(index)}, expected 0 to {size - 1}: check it"
            )
    if len(set(words.values())) != size:
        raise InputError(f"{str(path)!r} gives two words the same index, expected each of {size} once: check the file")
    return words
