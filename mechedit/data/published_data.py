"""Data sets that are known by name, and where they are published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mechedit.data.downloads import Remote, fetch
from mechedit.errors import InputError

Kind = Literal["facts", "requests", "snippets", "word weights"]

ROME = "https://rome.baulab.info/data/dsets"
MEMIT = "https://memit.baulab.info/data/dsets"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A data set on the web; its publishers state no hashes, so the first download is trusted."""

    files: tuple[Remote, ...]
    origin: str
    """Who made it, for citing, and under which terms where they are stated."""


COUNTERFACT = "CounterFact, Meng et al. 2022 (ROME); MIT, with the code at github.com/kmeng01/rome"

PUBLISHED: Mapping[tuple[Kind, str], Published] = {
    ("facts", "known_1000"): Published(
        files=(Remote(url=f"{ROME}/known_1000.json"),),
        origin="facts that GPT-2 XL knows, Meng et al. 2022 (ROME); MIT, with the code at github.com/kmeng01/rome",
    ),
    ("requests", "counterfact"): Published(files=(Remote(url=f"{MEMIT}/counterfact.json"),), origin=COUNTERFACT),
    ("requests", "multi_counterfact"): Published(
        files=(Remote(url=f"{MEMIT}/multi_counterfact.json"),),
        origin=f"{COUNTERFACT}; without conflicting records, Meng et al. 2023 (MEMIT)",
    ),
    ("requests", "zsre"): Published(
        files=(Remote(url=f"{MEMIT}/zsre_mend_eval.json"),),
        origin="zsRE, Levy et al. 2017, as prepared by Mitchell et al. 2022 (MEND), with Natural Questions, "
        "Kwiatkowski et al. 2019",
    ),
    ("snippets", "counterfact"): Published(
        files=(Remote(url=f"{MEMIT}/attribute_snippets.json"),),
        origin="texts of Wikipedia, gathered by Meng et al. 2022 (ROME)",
    ),
    ("word weights", "counterfact"): Published(
        files=(Remote(url=f"{MEMIT}/idf.npy"), Remote(url=f"{MEMIT}/tfidf_vocab.json")),
        origin="TF-IDF over texts of Wikipedia, Meng et al. 2022 (ROME)",
    ),
}
"""By kind and name."""


def published_files(source: str | Path, kind: Kind, cache: str | Path | None = None) -> tuple[Path, ...]:
    """The files of a data set known by name, downloaded where they are not in the cache; none for any other source.

    Raises:
        InputError: a download failed, or a file is not what it was (`mechedit.data.downloads.fetch`).
    """
    found = PUBLISHED.get((kind, str(source)))
    return tuple(fetch(remote, cache) for remote in found.files) if found else ()


def missing_source(source: str | Path, kind: Kind, shipped: str) -> InputError:
    """What to say of a source that is neither a file nor a name."""
    names = ", ".join([shipped, *(name for of, name in PUBLISHED if of == kind)])
    return InputError(
        f"cannot read the file {str(source)!r} (No such file or directory); expected an existing file, or one of "
        f"the names {names}: check the path"
    )
