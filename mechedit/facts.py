"""Facts to trace and requests to edit: text only, no tokens.

A fact is a subject, a prompt with one `{}` for it, and the object that completes the prompt (ROME §2). A
request is the same with the object to write instead (MEMIT §4), and the prompts that judge the edit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechedit.artifacts import read_text
from mechedit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One (subject, relation, object) with the prompt that asks for it."""

    id: str
    subject: str
    prompt: str
    """Template with exactly one `{}` where the subject goes."""
    object: str
    """What completes the prompt, without a leading space."""
    relation: str | None = None
    foil: str | None = None
    """Another object, for logit differences."""

    def __post_init__(self) -> None:
        check_template(self.prompt, f"fact {self.id!r}")
        check_text(self.subject, f"fact {self.id!r}: the subject")
        check_text(self.object, f"fact {self.id!r}: the object")
        if self.foil is not None:
            check_text(self.foil, f"fact {self.id!r}: the foil")

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return fill(self.prompt, self.subject)


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """A prompt about another subject with the same relation and true object: it must not change."""

    prompt: str
    object: str


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One edit to make, in CounterFact's terms."""

    id: str
    subject: str
    prompt: str
    """Template with exactly one `{}` where the subject goes."""
    target_new: str
    target_true: str | None = None
    relation: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbors: tuple[Neighbor, ...] = ()
    attributes: tuple[str, ...] = ()
    """Prompts about subjects for which the new object is true (for RS)."""
    generations: tuple[str, ...] = ()
    """Prompts that start free text about the subject (for GE)."""

    def __post_init__(self) -> None:
        check_template(self.prompt, f"request {self.id!r}")
        check_text(self.subject, f"request {self.id!r}: the subject")
        check_text(self.target_new, f"request {self.id!r}: target_new")
        if self.target_true is not None:
            check_text(self.target_true, f"request {self.id!r}: target_true")

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return fill(self.prompt, self.subject)


def fill(template: str, subject: str) -> str:
    """Put `subject` in the one `{}` of `template`; other braces in either are left alone."""
    before, after = template.split("{}")
    return before + subject + after


def check_template(template: str, where: str) -> None:
    """Raise InputError unless `template` holds exactly one `{}`."""
    count = template.count("{}")
    if count != 1:
        raise InputError(
            f"{where}: the prompt {template!r} holds {count} times '{{}}', expected exactly one; "
            f"put {{}} where the subject goes"
        )


def check_text(text: str, where: str) -> None:
    """Raise InputError when `text` is empty or blank."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where} is {text!r}, expected text that is not empty; fill it in or drop the record")


def check_requests(requests: Sequence[EditRequest]) -> None:
    """Refuse a batch that no edit can satisfy (MEMIT Eq. 5: one object for each subject and relation).

    Raises:
        InputError: no requests; a repeated id; two requests with the same subject and the same relation
            (or the same prompt) but different new objects.
    """
    if not requests:
        raise InputError("no edit requests were found, expected at least one; check the requests file")
    unique_ids((request.id for request in requests), "requests")
    for other, request, key in conflicts(requests):
        raise InputError(
            f"requests {other.id!r} and {request.id!r} conflict: both rewrite {key!r} of "
            f"{request.subject!r}, to {other.target_new!r} and to {request.target_new!r}; expected one "
            f"object for each subject and relation: drop one of them"
        )


def conflicts(requests: Iterable[EditRequest]) -> Iterator[tuple[EditRequest, EditRequest, str]]:
    """Each request that wants another object than the first about its subject and relation, or prompt.

    Yields:
        That first request, the one that conflicts with it, and the relation or prompt.
    """
    wanted: dict[tuple[str, str], EditRequest] = {}
    for request in requests:
        for key in {request.relation, request.prompt} - {None}:
            other = wanted.setdefault((request.subject, key), request)
            if other.target_new.strip() != request.target_new.strip():
                yield other, request, key


def unique_ids(ids: Iterable[str], what: str) -> None:
    """Raise InputError when an id occurs twice."""
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise InputError(f"two {what} have the id {name!r}, expected unique ids; rename or drop one")
        seen.add(name)


def load_facts(source: str | Path) -> list[Fact]:
    """Read facts: `known` for those that ship with the tiny model, or a path.

    A file holds one JSON object a line `{"id", "subject", "prompt", "object", "relation"?, "foil"?}`, or a
    JSON list of them. Records of ROME's known-facts set (`known_id`, `template`, `attribute`) are accepted too.

    Raises:
        InputError: no such file; not JSON (the message names the line); a field missing or empty; a prompt
            without `{}` or with two; a repeated id.
    """
    path = shipped("facts.jsonl") if str(source) == "known" else Path(source)
    facts = [_fact(record, where) for record, where in read_records(path)]
    if not facts:
        raise InputError(f"{str(path)!r} holds no facts, expected one JSON object a line; check the file")
    unique_ids((fact.id for fact in facts), "facts")
    return facts


def load_requests(source: str | Path) -> list[EditRequest]:
    """Read edit requests: `tiny` for those that ship with the tiny model, or a path.

    CounterFact's records and the short form `{"id", "subject", "prompt", "target_new", "target_true"?,
    "paraphrases"?, "neighbors"?}` are accepted, as a JSON list or one object a line.

    Raises:
        InputError: no such file; not JSON (the message names the line); a field missing or empty; a prompt
            without `{}` or with two; a repeated id; conflicting requests (`check_requests`).
    """
    path = shipped("requests.json") if str(source) == "tiny" else Path(source)
    requests = [_request(record, where) for record, where in read_records(path)]
    check_requests(requests)
    return requests


def shipped(name: str) -> Path:
    """Path of a data file that ships beside the tiny model."""
    return Path(__file__).parent / "models" / "tiny" / name


def read_records(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Read a JSON list, or one JSON object a line, as (record, place in the file) pairs."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{str(path)!r} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}; mend the file"
            ) from error
        pairs = [(record, f"{str(path)!r}, record {i}") for i, record in enumerate(records, 1)]
    else:
        pairs = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                pairs.append((json.loads(line), f"{str(path)!r}, line {number}"))
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{str(path)!r}, line {number} is not JSON: column {error.colno}: {error.msg}; "
                    f"expected one JSON object a line: mend that line"
                ) from error
    for record, where in pairs:
        if not isinstance(record, dict):
            raise InputError(f"{where} is a {type(record).__name__}, expected a JSON object; mend that record")
    return pairs


def _field(record: dict[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if name in record:
            return record[name]
    raise InputError(f"{where} has no field {names[0]!r} (found: {', '.join(record) or 'nothing'}); add it")


def _fact(record: dict[str, Any], where: str) -> Fact:
    try:
        return Fact(
            id=str(_field(record, ("id", "known_id"), where)),
            subject=_field(record, ("subject",), where),
            prompt=_known_prompt(record) if "template" in record else _field(record, ("prompt",), where),
            object=_field(record, ("object", "attribute"), where),
            relation=record.get("relation", record.get("relation_id")),
            foil=record.get("foil"),
        )
    except InputError as error:
        raise _located(error, where) from error


def _known_prompt(record: dict[str, Any]) -> str:
    """In the known-facts set the template may lack the prompt's last words; take them from the prompt."""
    subject, prompt = str(record.get("subject", "")), str(record.get("prompt", ""))
    return prompt.replace(subject, "{}", 1) if subject and prompt.count(subject) == 1 else record["template"]


def _request(record: dict[str, Any], where: str) -> EditRequest:
    try:
        return _counterfact(record, where) if "requested_rewrite" in record else _short_form(record, where)
    except InputError as error:
        raise _located(error, where) from error


def _located(error: InputError, where: str) -> InputError:
    return error if str(error).startswith(where) else InputError(f"{where}: {error}")


def _counterfact(record: dict[str, Any], where: str) -> EditRequest:
    rewrite = _field(record, ("requested_rewrite",), where)
    true = rewrite.get("target_true", {}).get("str")
    return EditRequest(
        id=str(_field(record, ("case_id",), where)),
        subject=_field(rewrite, ("subject",), where),
        prompt=_field(rewrite, ("prompt",), where),
        target_new=_field(_field(rewrite, ("target_new",), where), ("str",), where),
        target_true=true,
        relation=rewrite.get("relation_id"),
        paraphrases=tuple(record.get("paraphrase_prompts", ())),
        neighbors=tuple(
            Neighbor(prompt=prompt, object=true) for prompt in record.get("neighborhood_prompts", ()) if true
        ),
        attributes=tuple(record.get("attribute_prompts", ())),
        generations=tuple(record.get("generation_prompts", ())),
    )


def _short_form(record: dict[str, Any], where: str) -> EditRequest:
    return EditRequest(
        id=str(_field(record, ("id", "case_id"), where)),
        subject=_field(record, ("subject",), where),
        prompt=_field(record, ("prompt",), where),
        target_new=_field(record, ("target_new",), where),
        target_true=record.get("target_true"),
        relation=record.get("relation"),
        paraphrases=tuple(record.get("paraphrases", ())),
        neighbors=tuple(
            Neighbor(prompt=_field(n, ("prompt",), where), object=_field(n, ("object",), where))
            for n in record.get("neighbors", ())
        ),
        attributes=tuple(record.get("attributes", ())),
        generations=tuple(record.get("generations", ())),
    )
