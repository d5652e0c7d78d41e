"""`load_texts`: running text from files and data sets; some of its documents, and the hash that identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from mechedit.arguments import checked
from mechedit.data.json_files import read_records
from mechedit.data.loading import tiny_data
from mechedit.errors import InputError, brief, brief_list, first_line
from mechedit.files import read_text
from mechedit.paths import checked_path

DEFAULT_CONFIGURATIONS = {
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "Salesforce/wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikimedia/wikipedia": ("wikimedia/wikipedia", "20231101.en"),
}
"""For data sets without a configuration of their own by default: repository and configuration, by name."""


@checked
def load_texts(source: str | Path) -> Sequence[str]:
    """Read running text, one document per entry.

    Args:
        source: `tiny` for the text that ships with the tiny model; a `.txt` file (one document per line); a `.jsonl`
            file with `"text"`; or a `datasets` name (`wikitext`, `wikimedia/wikipedia`), with the configuration
            after a colon if it is not the default one (`wikitext:wikitext-2-raw-v1`). Of a data set the `train`
            split is read, document by document as it is used.

    Raises:
        InputError: no such file or data set, or no text in it.
    """
    if not isinstance(source, str | Path):
        raise InputError(
            f"the texts are to be read from {brief(source)}, expected a path, or the name of a data set: give one, or "
            f"collect moments over the list of texts itself"
        )
    path = tiny_data("texts.txt") if str(source) == "tiny" else checked_path(source)
    if path.suffix == ".txt":
        texts = read_text(path).split("\n")
    elif path.suffix in (".jsonl", ".json"):
        texts = [_document(record, location) for record, location in read_records(path)]
    elif path.exists():
        raise InputError(f"{str(path)!r} ends in {path.suffix!r}, expected .txt or .jsonl; rename or convert it")
    else:
        texts = _load_dataset(str(source))
    check_texts(texts)
    return [text for text in texts if text.strip()] if isinstance(texts, list) else texts


def check_texts(texts: Sequence[str]) -> None:
    """Raise InputError when there is no text."""
    if not any(text.strip() for text in texts):
        raise InputError("no text was found, expected documents to collect moments over; check the source")


@dataclass(frozen=True, eq=False)
class DocumentSample(Sequence[str]):
    """Some documents of a text, each read when it is used."""

    texts: Sequence[str]
    """The whole text."""
    indices: Sequence[int]
    """Of the documents, in their order here."""

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self.texts[i] for i in self.indices[index]]
        return self.texts[self.indices[index]]


def sample_documents(texts: Sequence[str], count: int, seed: int = 0) -> DocumentSample:
    """Draw documents at random, without repetition; blank ones, as some data sets have, are drawn too.

    Args:
        texts: one document per entry.
        count: how many.
        seed: of the draw; the first of more documents are the same.

    Raises:
        InputError: there are fewer.
    """
    if count > len(texts):
        raise InputError(
            f"{count} documents are to be drawn, expected at most {len(texts)}, all that the text has: ask for fewer, "
            f"or give more text"
        )
    # A permutation and not random.sample, whose first draws depend on how many are drawn.
    order = np.random.default_rng(seed).permutation(len(texts))[:count]
    return DocumentSample(texts, order.tolist())


def texts_hash(texts: Sequence[str]) -> str:
    """SHA-256 over all documents that are not blank, in hex."""
    digest = hashlib.sha256()
    for text in texts:
        if text.strip():
            digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _document(record: Mapping[str, Any], location: str) -> str:
    if "text" in record and not isinstance(record["text"], str):
        kind = type(record["text"]).__name__
        raise InputError(
            f"{location} has {brief(record['text'])} in 'text', which is of type {kind}, expected a string; put it "
            f"between quotes, or leave the record out"
        )
    if "text" not in record:
        raise InputError(f"{location} has no text in 'text' (found: {brief_list(record)}); add it")
    return record["text"]


def _load_dataset(source: str) -> Sequence[str]:
    """The `text` column of a data set's train split, which `datasets` reads from disk document by document."""
    # Imported here, because it is slow to import and seldom needed.
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, configuration = source.partition(":")
    name, default = DEFAULT_CONFIGURATIONS.get(name, (name, None))
    try:
        dataset = load_dataset(name, configuration or default, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(
            f"{brief(source)} is neither a file nor a data set that could be loaded ({first_line(error)}); "
            f"expected a .txt or .jsonl file, or a name as in wikitext:wikitext-103-raw-v1"
        ) from error
    if "text" not in dataset.column_names:
        raise InputError(f"the data set {brief(source)} has columns {dataset.column_names}, expected 'text'")
    return dataset["text"]
