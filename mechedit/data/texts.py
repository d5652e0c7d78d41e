"""Running text: where it is read from, and what identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechedit.data.loading import shipped
from mechedit.data.records import read_records
from mechedit.errors import InputError
from mechedit.files import read_text

USUAL = {
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "Salesforce/wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikimedia/wikipedia": ("wikimedia/wikipedia", "20231101.en"),
}
"""Data sets that have no configuration by default: where they lie, and the configuration that is meant."""


def load_texts(source: str | Path) -> Sequence[str]:
    """Read running text, one document an entry.

    Args:
        source: `tiny` for the text that ships; a `.txt` file (a document a line); a `.jsonl` file with
            `"text"`; or a `datasets` name (`wikitext`, `wikimedia/wikipedia`), with the configuration after a
            colon where it is not the usual one (`wikitext:wikitext-2-raw-v1`), of which the `train` split is
            read as it is needed.

    Raises:
        InputError: no such file or data set, or no text in it.
    """
    path = shipped("texts.txt") if str(source) == "tiny" else Path(source)
    if path.suffix == ".txt":
        texts = read_text(path).split("\n")
    elif path.suffix in (".jsonl", ".json"):
        texts = [_text(record, where) for record, where in read_records(path)]
    elif path.exists():
        raise InputError(f"{str(path)!r} ends in {path.suffix!r}, expected .txt or .jsonl; rename or convert it")
    else:
        texts = _dataset(str(source))
    check_texts(texts)
    return [text for text in texts if text.strip()] if isinstance(texts, list) else texts


def check_texts(texts: Sequence[str]) -> None:
    """Raise InputError when there is no text."""
    if not any(text.strip() for text in texts):
        raise InputError("no text was found, expected documents to collect moments over; check the source")


def texts_hash(texts: Sequence[str]) -> str:
    """SHA-256 over the documents that hold any text, in hex."""
    digest = hashlib.sha256()
    for text in texts:
        if text.strip():
            digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _text(record: Mapping[str, Any], where: str) -> str:
    if not isinstance(record.get("text"), str):
        raise InputError(f"{where} has no text in 'text' (found: {', '.join(record) or 'nothing'}); add it")
    return record["text"]


def _dataset(source: str) -> Sequence[str]:
    """The `text` column of a data set's train split; it stays on disk where `datasets` leaves it there."""
    # Imported here: it is slow to import, and seldom needed.
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, configuration = source.partition(":")
    name, usual = USUAL.get(name, (name, None))
    try:
        found = load_dataset(name, configuration or usual, split="train")
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{source!r} is neither a file nor a data set that could be loaded ({reason}); expected a .txt "
            f"or .jsonl file, or a name as in wikitext:wikitext-103-raw-v1"
        ) from error
    if "text" not in found.column_names:
        raise InputError(f"the data set {source!r} has columns {found.column_names}, expected 'text'")
    return found["text"]
