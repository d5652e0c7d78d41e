"""Reference texts about objects, and the word weights to compare texts by: what RS is made of (MEMIT C.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from mechedit.data.facts import EditRequest
from mechedit.data.published_data import published_files
from mechedit.data.records import Record, read_records
from mechedit.errors import InputError
from mechedit.files import read_json

Snippets = Mapping[tuple[str, str], tuple[str, ...]]
"""Texts by (relation, id of the object): about subjects for which that object is true."""

IDF_FILE, VOCABULARY_FILE = "idf.npy", "tfidf_vocab.json"


@dataclass(frozen=True, kw_only=True, eq=False)
class WordWeights:
    """A fitted TF-IDF: what scikit-learn's TfidfVectorizer has as `vocabulary_` and `idf_`."""

    vocabulary: dict[str, int]
    """Each word's place in `idf`."""
    idf: Float[np.ndarray, " word"]
    """ln((1 + texts) / (1 + texts with the word)) + 1, as scikit-learn computes it."""


def load_snippets(source: str | Path = "counterfact", *, cache: str | Path | None = None) -> Snippets:
    """Read reference texts: `counterfact` for the published ones (downloaded once, large), or a path.

    The file is a JSON list of `{"relation_id", "target_id", "samples": [{"text", …}]}`. A request's texts are
    those of `(request.relation, request.target_id)`; a pair that is not there has none.

    Raises:
        InputError: no such file or name; not JSON; a field missing or empty (the message names the record).
    """
    (path,) = published_files(source, "snippets", cache) or (Path(source),)
    found: dict[tuple[str, str], list[str]] = {}
    for index, (fields, where) in enumerate(read_records(path)):
        record = Record(fields, where, index)
        texts = found.setdefault((record.text("relation_id"), record.text("target_id")), [])
        texts += [sample.text("text") for sample in record.parts("samples")]
    if not any(found.values()):
        raise InputError(f"{str(path)!r} holds no texts, expected a list of records with samples: check the file")
    return {key: tuple(texts) for key, texts in found.items() if texts}


def texts_by_object(snippets: Snippets, requests: Iterable[EditRequest]) -> Snippets:
    """The texts that requests can be compared with, by relation and new object as the requests name them.

    The release knows objects by id alone, so a request finds its texts by `target_id`.
    """
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for request in requests:
        texts = snippets.get((request.relation or "", request.target_id or ""))
        if texts:
            found[request.relation or "", request.target_new] = texts
    return found


def load_word_weights(source: str | Path = "counterfact", *, cache: str | Path | None = None) -> WordWeights:
    """Read a TF-IDF: `counterfact` for the published one (downloaded once), or a folder.

    The folder holds idf.npy, a vector of numbers, and tfidf_vocab.json, an object of words and their places in it.

    Raises:
        InputError: no such folder, file or name; idf is no vector of positive numbers; the vocabulary does not name
            each of its places once.
    """
    folder = Path(source)
    files = published_files(source, "word weights", cache) or (folder / IDF_FILE, folder / VOCABULARY_FILE)
    idf = _read_idf(files[0])
    return WordWeights(vocabulary=_read_vocabulary(files[1], len(idf)), idf=idf)


def _read_idf(path: Path) -> Float[np.ndarray, " word"]:
    try:
        # A pickle could run any code.
        idf = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(
            f"{str(path)!r} is not an array of numbers ({error}); expected an .npy file: check it"
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot read the file {str(path)!r} ({error.strerror}); expected an .npy file: check it"
        ) from error
    kind = f"{idf.dtype} of shape {idf.shape}"
    if idf.ndim != 1 or not np.issubdtype(idf.dtype, np.floating):
        raise InputError(f"{str(path)!r} holds {kind}, expected a vector of floating-point numbers: check the file")
    if not len(idf) or not np.isfinite(idf).all() or not (idf > 0).all():
        raise InputError(f"{str(path)!r} ({kind}) holds numbers that are not positive and finite: check the file")
    return idf.astype(np.float64)


def _read_vocabulary(path: Path, size: int) -> dict[str, int]:
    words = read_json(path)
    if not isinstance(words, dict):
        raise InputError(f"{str(path)!r} is a {type(words).__name__}, expected an object of words and places: check it")
    if len(words) != size:
        raise InputError(
            f"{str(path)!r} holds {len(words)} words and {IDF_FILE} {size} numbers, expected as many: take both "
            f"files from one release"
        )
    for word, place in words.items():
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < size:
            raise InputError(f"{str(path)!r}: the place of {word!r} is {place!r}, expected 0 to {size - 1}: check it")
    if len(set(words.values())) != size:
        raise InputError(f"{str(path)!r} gives two words the same place, expected each of {size} once: check the file")
    return words
