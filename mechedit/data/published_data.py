"""Data sets that can be loaded by name, and where they are published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from mechedit.data.downloads import Check, RemoteFile, fetch
from mechedit.errors import InputError

DatasetKind = Literal["facts", "requests", "snippets", "word weights"]

ROME = "https://rome.baulab.info/data/dsets"
MEMIT = "https://memit.baulab.info/data/dsets"


@dataclass(frozen=True, kw_only=True)
class PublishedDataset:
    """A data set on the web; its publishers state no hashes, so the first download is trusted."""

    files: tuple[RemoteFile, ...]
    origin: str
    """Its authors, for citing, and its license where one is stated."""


COUNTERFACT = "CounterFact, Meng et al. 2022 (ROME); MIT, with the code at github.com/kmeng01/rome"

PUBLISHED_DATASETS: Mapping[tuple[DatasetKind, str], PublishedDataset] = {
    ("facts", "known_1000"): PublishedDataset(
        files=(RemoteFile(url=f"{ROME}/known_1000.json"),),
        origin="facts that GPT-2 XL knows, Meng et al. 2022 (ROME); MIT, with the code at github.com/kmeng01/rome",
    ),
    ("requests", "counterfact"): PublishedDataset(
        files=(RemoteFile(url=f"{MEMIT}/counterfact.json"),), origin=COUNTERFACT
    ),
    ("requests", "multi_counterfact"): PublishedDataset(
        files=(RemoteFile(url=f"{MEMIT}/multi_counterfact.json"),),
        origin=f"{COUNTERFACT}; without conflicting records, Meng et al. 2023 (MEMIT)",
    ),
    ("requests", "zsre"): PublishedDataset(
        files=(RemoteFile(url=f"{MEMIT}/zsre_mend_eval.json"),),
        origin="zsRE, Levy et al. 2017, as prepared by Mitchell et al. 2022 (MEND), with Natural Questions, "
        "Kwiatkowski et al. 2019",
    ),
    ("snippets", "counterfact"): PublishedDataset(
        files=(RemoteFile(url=f"{MEMIT}/attribute_snippets.json"),),
        origin="texts of Wikipedia, gathered by Meng et al. 2022 (ROME)",
    ),
    ("word weights", "counterfact"): PublishedDataset(
        files=(RemoteFile(url=f"{MEMIT}/idf.npy"), RemoteFile(url=f"{MEMIT}/tfidf_vocab.json")),
        origin="TF-IDF over texts of Wikipedia, Meng et al. 2022 (ROME)",
    ),
}
"""Data sets by kind and name."""


def dataset_files(
    source: str | Path, kind: DatasetKind, cache: str | Path | None = None, *, checks: Sequence[Check] = ()
) -> tuple[Path, ...]:
    """Paths of a data set's files, downloaded if they are not in the cache; none if `source` is not a known name.

    Args:
        source: a name, or anything else.
        kind: which data sets are known by name.
        cache: folder for downloads.
        checks: reads each file before it is trusted for the first time.

    Raises:
        InputError: a download failed, or a file is not what it was (`mechedit.data.downloads.fetch`).
    """
    dataset = PUBLISHED_DATASETS.get((kind, str(source)))
    files = dataset.files if dataset else ()
    return tuple(fetch(file, cache, check=check) for file, check in zip_longest(files, checks[: len(files)]))


def missing_source_error(source: str | Path, kind: DatasetKind, tiny_names: Sequence[str]) -> InputError:
    """The error for a source that is neither a file nor a known name.

    Args:
        source: what was given.
        kind: which data sets were looked among.
        tiny_names: names of data of this kind that ship with the tiny model.
    """
    names = ", ".join([*tiny_names, *(name for dataset_kind, name in PUBLISHED_DATASETS if dataset_kind == kind)])
    return InputError(
        f"cannot read the file {str(source)!r} (No such file or directory); expected an existing file, or one of "
        f"the names {names}: check the path"
    )
