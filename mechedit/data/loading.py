"""`load_facts` and `load_requests`: facts and requests from a file, or by the name of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar, get_args

from mechedit.arguments import checked
from mechedit.data.checks import check_requests, check_unique_ids, without_conflicts
from mechedit.data.downloads import Check, starting_over
from mechedit.data.facts import EditRequest, Fact, Neighbor
from mechedit.data.json_files import read_records
from mechedit.data.json_records import JsonRecord, UnclearRecordError
from mechedit.data.published_data import DatasetKind, dataset_files, missing_source_error
from mechedit.data.request_formats import read_fact, read_requests
from mechedit.data.scored_prompts import RecordRequests
from mechedit.data.summary import describe_facts, describe_requests
from mechedit.data.tables import is_table, read_table
from mechedit.errors import InputError, brief, check_choice
from mechedit.notices import warn
from mechedit.paths import checked_path

Conflicts = Literal["refuse", "first"]
Joined = TypeVar("Joined", Fact, EditRequest, Neighbor)
Record = TypeVar("Record", Fact, EditRequest)
Parsed = TypeVar("Parsed", Fact, RecordRequests)


@dataclass(frozen=True, kw_only=True)
class Reading(Generic[Record]):
    """What was read from a source."""

    records: list[Record]
    """The facts or requests."""
    path: Path
    """The file."""
    omitted: tuple[str, ...] = ()
    """Records that are left out, each with its reason."""
    not_scored: Mapping[str, int] = field(default_factory=dict)
    """Number of prompts by kind that came with requests and that no measure uses."""

    @property
    def summary(self) -> str:
        """What was read, in a line."""
        if self.records and isinstance(self.records[0], EditRequest):
            text = describe_requests([r for r in self.records if isinstance(r, EditRequest)], self.not_scored)
        else:
            text = describe_facts([r for r in self.records if isinstance(r, Fact)])
        return f"{self.path.name}: {text}" + (f"; left out: {len(self.omitted):,}" if self.omitted else "")


@checked
def load_facts(
    source: str | Path, *, joint: str | None = None, strict: bool = False, cache: str | Path | None = None
) -> list[Fact]:
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
        strict: refuse an unclear record, such as one whose prompt does not hold the subject; by default it is left
            out, and a warning counts it.
        cache: folder for downloads; by default `mechedit.data.downloads.cache_folder()`.

    Raises:
        InputError: no such file; not JSON (the message names the line); a field that nothing reads; no record that is
            clear; a repeated id; a download that failed.
    """
    return read_facts(source, joint=joint, strict=strict, cache=cache).records


def read_facts(
    source: str | Path, *, joint: str | None = None, strict: bool = False, cache: str | Path | None = None
) -> Reading[Fact]:
    """As `load_facts`, with what else is known of the reading: its summary, and what is left out."""
    path = _find_file(source, "facts", {"known": "facts.jsonl"}, cache, _parse_facts)
    with starting_over(path):
        facts, omitted = _parse_facts(path, strict)
    _warn(path, omitted, len(facts), "facts")
    check_unique_ids((fact.id for fact in facts), "facts")
    return Reading(records=[_joined(fact, joint) for fact in facts], path=path, omitted=tuple(omitted))


@checked
def load_requests(
    source: str | Path,
    *,
    conflicts: Conflicts = "refuse",
    joint: str | None = None,
    strict: bool = False,
    cache: str | Path | None = None,
) -> list[EditRequest]:
    """Read edit requests, from a file or by name.

    Names: `tiny` for the requests that ship with the tiny model; `counterfact`, `multi_counterfact` and `zsre` are
    downloaded once. A file is a CSV or TSV (`mechedit.data.tables`), or JSON: a list, one object after the other, one
    object with the list in a field such as `data`, or one object of records by their ids. Records are

    - CounterFact's;
    - the short form `{"id", "subject", "prompt", "target_new", "target_true"?, "paraphrases"?, "neighbors"?}`;
    - EasyEdit's and KnowEdit's, `prompt` with the subject filled in, `target_new`, `subject`, and `ground_truth`,
      `rephrase_prompt` or `rephrase`, `locality_prompt` with `locality_ground_truth`, `locality` where there are any;
    - MEND's zsRE, `subject`, `src`, `rephrase`, `answers`, `loc`, `loc_ans`;
    - MQuAKE's, one request for each of its rewrites;
    - RippleEdits', and WikiBigEdit's.

    Empty fields are absent ones. A field that nothing reads is refused. The subject loses invisible characters at its
    ends; in a prompt without `{}` it must stand once, as whole words.

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
        strict: refuse an unclear record, such as one whose prompt does not hold the subject once as whole words; by
            default it is left out, and a warning counts and names it.
        cache: folder for downloads; by default `mechedit.data.downloads.cache_folder()`.

    Raises:
        InputError: no such file; not JSON, CSV or TSV (the message names the line); a field that nothing reads; no
            record that is clear; a repeated id; conflicting requests; a download that failed.
    """
    return read_edit_requests(source, conflicts=conflicts, joint=joint, strict=strict, cache=cache).records


def read_edit_requests(
    source: str | Path,
    *,
    conflicts: Conflicts = "refuse",
    joint: str | None = None,
    strict: bool = False,
    cache: str | Path | None = None,
) -> Reading[EditRequest]:
    """As `load_requests`, with what else is known of the reading: its summary, and what is left out or not scored."""
    check_choice("conflicts", conflicts, get_args(Conflicts))
    path = _find_file(source, "requests", {"tiny": "requests.json"}, cache, _parse_requests)
    with starting_over(path):
        read, omitted = _parse_requests(path, strict)
    requests = [_joined_neighbors(_joined(request, joint)) for record in read for request in record.requests]
    if conflicts == "first":
        requests, dropped = without_conflicts(requests)
        omitted += [f"{request.id} (conflicts with another)" for request in dropped]
    _warn(path, omitted, len(requests), "requests")
    check_requests(requests)
    not_scored = sum((Counter(record.not_scored) for record in read), Counter[str]())
    return Reading(records=requests, path=path, omitted=tuple(omitted), not_scored=not_scored)


def tiny_data(name: str) -> Path:
    """Path of a data file that ships with the tiny model: facts.jsonl, requests.json or texts.txt."""
    return Path(__file__).parent / "tiny" / name


def _parse_facts(path: Path, strict: bool = False) -> tuple[list[Fact], list[str]]:
    """The facts of a file, and the names of unclear records.

    Raises:
        InputError: there are none, or as `load_facts`.
    """
    facts, omitted = _read_clear(_read_json(path), read_fact, strict)
    if not facts:
        raise InputError(f"{str(path)!r} holds no facts, expected one JSON object per line; check the file")
    return facts, omitted


def _parse_requests(path: Path, strict: bool = False) -> tuple[list[RecordRequests], list[str]]:
    """The requests of a file by record, and the names of unclear records.

    Raises:
        InputError: there are none, or as `load_requests`.
    """
    read, omitted = _read_clear(read_table(path) if is_table(path) else _read_json(path), read_requests, strict)
    if not any(record.requests for record in read):
        raise InputError(f"no edit requests were found in {str(path)!r}, expected at least one; check the file")
    return read, omitted


def _find_file(
    source: str | Path, kind: DatasetKind, tiny_files: dict[str, str], cache: str | Path | None, check: Check
) -> Path:
    """Path of the data: a file that ships with the tiny model, a download in the cache, or the source itself.

    Args:
        source: a name or a path.
        kind: which data sets are known by name.
        tiny_files: names of data that ship with the tiny model, with their files.
        cache: folder for downloads.
        check: reads a download before it is trusted.

    Raises:
        InputError: it is no path, or there is no such file; a download failed.
    """
    if not isinstance(source, str | Path):
        raise InputError(
            f"the {kind} are to be read from {brief(source)}, expected a path, or one of the names "
            f"{', '.join(tiny_files)} and those of published data: give the path of a file"
        )
    if str(source) in tiny_files:
        return tiny_data(tiny_files[str(source)])
    if downloaded := dataset_files(source, kind, cache, checks=[check]):
        return downloaded[0]
    if not checked_path(source).exists():
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


def _read_clear(
    records: Sequence[JsonRecord], read: Callable[[JsonRecord], Parsed], strict: bool
) -> tuple[list[Parsed], list[str]]:
    """What the clear records say, and the names of the unclear ones with the reasons.

    Raises:
        UnclearRecordError: the first one, if none is clear or if they are read strictly.
    """
    parsed: list[Parsed] = []
    unclear: list[tuple[JsonRecord, UnclearRecordError]] = []
    for record in records:
        try:
            parsed.append(read(record))
        except UnclearRecordError as error:
            if strict:
                raise
            unclear.append((record, error))
    if unclear and not parsed:
        raise unclear[0][1]
    return parsed, [f"{record.name} ({error.reason})" for record, error in unclear]


def _warn(path: Path, omitted: Sequence[str], remaining: int, what: str) -> None:
    """Warn of what is left out, in the name of the caller of a loader."""
    if omitted:
        names = ", ".join(name if len(name) <= 200 else f"{name[:200]} …" for name in omitted[:10])
        names += ", …" if len(omitted) > 10 else ""
        total = remaining + len(omitted)
        warn(f"{str(path)!r}: {len(omitted)} of {total} {what} are left out: {names}")
