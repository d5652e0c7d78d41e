"""Read facts and requests, from a file or by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal, get_args

from mechedit.data.checks import check_requests, unique_ids, without_conflicts
from mechedit.data.csv_requests import read_csv
from mechedit.data.facts import EditRequest, Fact
from mechedit.data.published_data import missing_source, published_files
from mechedit.data.record_forms import UnclearSubjectError, is_mend, read_fact, read_request
from mechedit.data.records import Record, read_records
from mechedit.errors import InputError, check_choice

Conflicts = Literal["refuse", "first"]


def load_facts(source: str | Path, *, cache: str | Path | None = None) -> list[Fact]:
    """Read facts: `known` for those that ship with the tiny model, `known_1000` for ROME's known facts, or a path.

    A file holds one JSON object a line `{"id", "subject", "prompt", "object", "relation"?, "foil"?}`, or a
    JSON list of them. Records of ROME's known-facts set (`known_id`, `template`, `attribute`) are accepted too.

    Args:
        source: a name or a path.
        cache: folder of downloads; by default `mechedit.data.downloads.cache_folder()`.

    Raises:
        InputError: no such file; not JSON (the message names the line); a field missing or empty; a prompt
            without `{}` or with two; a repeated id; a download that failed.
    """
    path = _path(source, "facts", {"known": "facts.jsonl"}, cache)
    facts = [read_fact(record) for record in _records(path)]
    if not facts:
        raise InputError(f"{str(path)!r} holds no facts, expected one JSON object a line; check the file")
    unique_ids((fact.id for fact in facts), "facts")
    return facts


def load_requests(
    source: str | Path, *, conflicts: Conflicts = "refuse", cache: str | Path | None = None
) -> list[EditRequest]:
    """Read edit requests, from a file or by name.

    Names: `tiny` for those that ship with the tiny model; `counterfact`, `multi_counterfact` and `zsre` are
    downloaded once. A file is a CSV (`mechedit.data.csv_requests`), or a JSON list, or one JSON object a line, of

    - CounterFact's records;
    - the short form `{"id", "subject", "prompt", "target_new", "target_true"?, "paraphrases"?, "neighbors"?}`;
    - EasyEdit's form, `prompt` with the subject filled in, `target_new`, `subject`, and `ground_truth`,
      `rephrase_prompt`, `locality_prompt` with `locality_ground_truth` where they are there;
    - MEND's zsRE, `subject`, `src`, `rephrase`, `answers`, `loc`, `loc_ans`. Records in which it is not clear where
      the subject stands in `src` are left out, and a warning counts and names them.

    Args:
        source: a name or a path.
        conflicts: requests that want different objects for one subject and relation (or prompt): `refuse` them, as
            one edit cannot satisfy them, or keep the `first` and leave out the others, with a warning that counts
            them. `counterfact` has such; `multi_counterfact` is the same without them.
        cache: folder of downloads; by default `mechedit.data.downloads.cache_folder()`.

    Raises:
        InputError: no such file; not JSON or CSV (the message names the line); a field missing or empty; a prompt
            without `{}` or with two; a repeated id; conflicting requests; a download that failed.
    """
    check_choice("conflicts", conflicts, get_args(Conflicts))
    path = _path(source, "requests", {"tiny": "requests.json"}, cache)
    requests, omitted = (read_csv(path), []) if path.suffix.lower() == ".csv" else _read_requests(path)
    if conflicts == "first":
        requests, others = without_conflicts(requests)
        omitted += [f"{request.id} (conflicts with another)" for request in others]
    if omitted:
        named = ", ".join(omitted[:10]) + (", …" if len(omitted) > 10 else "")
        whole = len(requests) + len(omitted)
        warnings.warn(f"{str(path)!r}: {len(omitted)} of {whole} requests are left out: {named}", stacklevel=2)
    check_requests(requests)
    return requests


def shipped(name: str) -> Path:
    """Path of a data file that ships beside the tiny model."""
    return Path(__file__).parent / "tiny" / name


def _path(
    source: str | Path, kind: Literal["facts", "requests"], own: dict[str, str], cache: str | Path | None
) -> Path:
    """Where the data lie: beside the tiny model, in the cache, or where the caller says."""
    if str(source) in own:
        return shipped(own[str(source)])
    if downloaded := published_files(source, kind, cache):
        return downloaded[0]
    if not Path(source).exists():
        raise missing_source(source, kind, ", ".join(own))
    return Path(source)


def _records(path: Path) -> list[Record]:
    return [Record(fields, where, index) for index, (fields, where) in enumerate(read_records(path))]


def _read_requests(path: Path) -> tuple[list[EditRequest], list[str]]:
    """Requests of a JSON file, and which records of MEND's are left out since their subject has no clear place."""
    found, unclear = [], []
    for record in _records(path):
        try:
            found.append(read_request(record))
        except UnclearSubjectError:
            if not is_mend(record):
                raise
            unclear.append(f"{record.fields.get('case_id', record.index)} (no clear place for the subject)")
    return found, unclear
