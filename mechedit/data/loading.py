"""`load_facts` and `load_requests`: facts and requests from a file, or by the name of a data set."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar, get_args

from mechedit.data.checks import check_requests, check_unique_ids, without_conflicts
from mechedit.data.csv_requests import read_csv
from mechedit.data.facts import EditRequest, Fact, Neighbor
from mechedit.data.json_records import JsonRecord, read_records
from mechedit.data.published_data import DatasetKind, dataset_files, missing_source_error
from mechedit.data.request_formats import AmbiguousSubjectError, has_mend_format, read_fact, read_request
from mechedit.errors import InputError, check_choice

Conflicts = Literal["refuse", "first"]
Joined = TypeVar("Joined", Fact, EditRequest, Neighbor)


def load_facts(source: str | Path, *, joint: str | None = None, cache: str | Path | None = None) -> list[Fact]:
    """Read facts to trace, from a file or by name.

    Names: `known` for the facts that ship with the tiny model; `known_1000` for ROME's known facts, downloaded once.
    A file holds one JSON object per line `{"id", "subject", "prompt", "object", "relation"?, "foil"?}`, or a
    JSON list of them. Records of ROME's known-facts set (`known_id`, `template`, `attribute`) are accepted too.

    Example:
        >>> facts = load_facts("known")
        >>> facts[0].text, facts[0].object

    Args:
        source: a name or a path.
        joint: text between prompt and object, for records that name none (`"joint"`); by default it is decided by
            the two characters that meet.
        cache: folder for downloads; by default `mechedit.data.downloads.cache_folder()`.

    Raises:
        InputError: no such file; not JSON (the message names the line); a field missing or empty; a prompt
            without `{}` or with two; a repeated id; a download that failed.
    """
    path = _find_file(source, "facts", {"known": "facts.jsonl"}, cache)
    facts = [_joined(read_fact(record), joint) for record in _read_json(path)]
    if not facts:
        raise InputError(f"{str(path)!r} holds no facts, expected one JSON object per line; check the file")
    check_unique_ids((fact.id for fact in facts), "facts")
    return facts


def load_requests(
    source: str | Path,
    *,
    conflicts: Conflicts = "refuse",
    joint: str | None = None,
    cache: str | Path | None = None,
) -> list[EditRequest]:
    """Read edit requests, from a file or by name.

    Names: `tiny` for the requests that ship with the tiny model; `counterfact`, `multi_counterfact` and `zsre` are
    downloaded once. A file is a CSV (`mechedit.data.csv_requests`), or a JSON list, or one JSON object per line, of

    - CounterFact's records;
    - the short form `{"id", "subject", "prompt", "target_new", "target_true"?, "paraphrases"?, "neighbors"?}`;
    - EasyEdit's form, `prompt` with the subject filled in, `target_new`, `subject`, and `ground_truth`,
      `rephrase_prompt`, `locality_prompt` with `locality_ground_truth` where the record has them;
    - MEND's zsRE, `subject`, `src`, `rephrase`, `answers`, `loc`, `loc_ans`. Records in which the
      subject's place in `src` is ambiguous are left out, and a warning counts and names them.

    Example:
        >>> requests = load_requests("tiny")
        >>> requests = load_requests("facts.csv", conflicts="first")

    Args:
        source: a name or a path.
        conflicts: how to treat requests with different new objects for one subject and relation (or prompt), which
            no edit can satisfy: `refuse` them, or keep the `first` and leave out the others, with a warning that
            counts them. `counterfact` has such requests; `multi_counterfact` is the same data set without them.
        joint: text between a prompt and its object, for records that name none (`"joint"`, or a column of that
            name); by default it is decided by the two characters that meet. A record's holds for its neighbors too,
            unless they name one.
        cache: folder for downloads; by default `mechedit.data.downloads.cache_folder()`.

    Raises:
        InputError: no such file; not JSON or CSV (the message names the line); a field missing or empty; a prompt
            without `{}` or with two; a repeated id; conflicting requests; a download that failed.
    """
    check_choice("conflicts", conflicts, get_args(Conflicts))
    path = _find_file(source, "requests", {"tiny": "requests.json"}, cache)
    requests, omitted = (read_csv(path), []) if path.suffix.lower() == ".csv" else _read_requests(path)
    requests = [_joined_neighbors(_joined(request, joint)) for request in requests]
    if conflicts == "first":
        requests, dropped = without_conflicts(requests)
        omitted += [f"{request.id} (conflicts with another)" for request in dropped]
    if omitted:
        names = ", ".join(omitted[:10]) + (", …" if len(omitted) > 10 else "")
        total = len(requests) + len(omitted)
        warnings.warn(f"{str(path)!r}: {len(omitted)} of {total} requests are left out: {names}", stacklevel=2)
    check_requests(requests)
    return requests


def tiny_data(name: str) -> Path:
    """Path of a data file that ships with the tiny model: facts.jsonl, requests.json or texts.txt."""
    return Path(__file__).parent / "tiny" / name


def _find_file(source: str | Path, kind: DatasetKind, tiny_files: dict[str, str], cache: str | Path | None) -> Path:
    """Path of the data: a file that ships with the tiny model, a download in the cache, or the source itself.

    Args:
        source: a name or a path.
        kind: which data sets are known by name.
        tiny_files: names of data that ship with the tiny model, with their files.
        cache: folder for downloads.
    """
    if str(source) in tiny_files:
        return tiny_data(tiny_files[str(source)])
    if downloaded := dataset_files(source, kind, cache):
        return downloaded[0]
    if not Path(source).exists():
        raise missing_source_error(source, kind, list(tiny_files))
    return Path(source)


def _joined(record: Joined, joint: str | None) -> Joined:
    """The record with a joint, unless it has one."""
    return record if record.joint is not None or joint is None else replace(record, joint=joint)


def _joined_neighbors(request: EditRequest) -> EditRequest:
    """The request, with its joint at those of its neighbors that have none."""
    if request.joint is None:
        return request
    return replace(request, neighbors=tuple(_joined(neighbor, request.joint) for neighbor in request.neighbors))


def _read_json(path: Path) -> list[JsonRecord]:
    return [JsonRecord(fields, location, index) for index, (fields, location) in enumerate(read_records(path))]


def _read_requests(path: Path) -> tuple[list[EditRequest], list[str]]:
    """Requests of a JSON file, and the names of MEND's records that are left out since their subject is ambiguous."""
    requests, ambiguous = [], []
    for record in _read_json(path):
        try:
            requests.append(read_request(record))
        except AmbiguousSubjectError:
            if not has_mend_format(record):
                raise
            ambiguous.append(f"{record.fields.get('case_id', record.index)} (no clear place for the subject)")
    return requests, ambiguous
