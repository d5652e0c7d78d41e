"""Formats of a record: ROME's known facts, CounterFact's, EasyEdit's, MEND's zsRE, and the short form."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from mechedit.data.facts import EditRequest, Fact, Neighbor
from mechedit.data.json_records import JsonRecord
from mechedit.errors import InputError


class AmbiguousSubjectError(InputError):
    """The subject does not stand in the prompt exactly once."""


def read_fact(record: JsonRecord) -> Fact:
    """Read a fact: `{"id", "subject", "prompt", "object", …}`, or a record of ROME's known facts."""
    return _read_located(_parse_fact, record)


def read_request(record: JsonRecord) -> EditRequest:
    """Read a request in any of the formats below, recognized by fields that only one of them has."""
    if "requested_rewrite" in record:
        return _read_located(_parse_counterfact, record)
    if has_mend_format(record):
        return _read_located(_parse_mend, record)
    if any(name in record for name in ("ground_truth", "rephrase_prompt", "locality_prompt")):
        return _read_located(_parse_easyedit, record)
    return _read_located(_parse_short, record)


def has_mend_format(record: JsonRecord) -> bool:
    """Whether a record has the format of MEND's zsRE."""
    return "src" in record and "answers" in record


def _parse_fact(record: JsonRecord) -> Fact:
    return Fact(
        id=record.id("id", "known_id"),
        subject=record.text("subject"),
        prompt=_known_prompt(record) if "template" in record else record.text("prompt"),
        object=record.text("object", "attribute"),
        relation=record.optional("relation") or record.optional("relation_id"),
        foil=record.optional("foil"),
        joint=record.literal("joint"),
    )


def _known_prompt(record: JsonRecord) -> str:
    """In the known-facts set the template may lack the prompt's last words; take them from the prompt."""
    subject, prompt = record.text("subject"), record.optional("prompt") or ""
    return prompt.replace(subject, "{}", 1) if prompt.count(subject) == 1 else record.text("template")


def _parse_counterfact(record: JsonRecord) -> EditRequest:
    """CounterFact and multi_counterfact; a neighbor may also name its own object, `{"prompt", "target"}`."""
    rewrite = record.nested("requested_rewrite")
    new = rewrite.nested("target_new")
    true = rewrite.nested("target_true").text("str") if "target_true" in rewrite else None
    return EditRequest(
        id=record.id("case_id"),
        subject=rewrite.text("subject"),
        prompt=rewrite.text("prompt"),
        target_new=new.text("str"),
        target_true=true,
        relation=rewrite.optional("relation_id"),
        paraphrases=record.texts("paraphrase_prompts"),
        neighbors=_neighbors(record, true),
        attributes=record.texts("attribute_prompts"),
        generations=record.texts("generation_prompts"),
        target_id=new.optional("id"),
        joint=record.literal("joint"),
    )


def _neighbors(record: JsonRecord, true: str | None) -> tuple[Neighbor, ...]:
    """Neighbors given as text have the request's true object; without one they cannot be scored and are dropped."""
    name = "neighborhood_prompts"
    if any(isinstance(item, dict) for item in record.items(name)):
        return tuple(Neighbor(prompt=n.text("prompt"), object=n.text("target")) for n in record.nested_list(name))
    return tuple(Neighbor(prompt=prompt, object=true) for prompt in record.texts(name) if true)


def _parse_easyedit(record: JsonRecord) -> EditRequest:
    """EasyEdit's format: prompts with the subject filled in, one rephrasing, one neighbor with its own object."""
    return EditRequest(
        id=_id_or_index(record),
        subject=record.text("subject"),
        prompt=make_template(record.text("prompt"), record.text("subject"), record.location),
        target_new=record.text("target_new"),
        target_true=record.optional("ground_truth"),
        relation=record.optional("relation_id"),
        paraphrases=tuple(text for text in [record.optional("rephrase_prompt")] if text),
        neighbors=_neighbor(record, "locality_prompt", "locality_ground_truth"),
        joint=record.literal("joint"),
    )


def _parse_mend(record: JsonRecord) -> EditRequest:
    """MEND's zsRE, as MEMIT reads it: the new object is the first answer, and there is no true one.

    The neighbor is a question of Natural Questions. As in MEMIT's code it keeps its `nq question: ` and gets a
    question mark. `alt`, MEND's invented answer, is not used.
    """
    answers = record.texts("answers")
    if not answers:
        raise InputError(f"{record.location}: answers is empty, expected at least one: fill it in or drop the record")
    return EditRequest(
        id=_id_or_index(record),
        subject=record.text("subject"),
        prompt=make_template(record.text("src"), record.text("subject"), record.location),
        target_new=answers[0],
        paraphrases=tuple(text for text in [record.optional("rephrase")] if text),
        neighbors=_neighbor(record, "loc", "loc_ans", end="?"),
        joint=record.literal("joint"),
    )


def _neighbor(record: JsonRecord, prompt: str, answer: str, end: str = "") -> tuple[Neighbor, ...]:
    if prompt not in record:
        return ()
    return (Neighbor(prompt=record.text(prompt) + end, object=record.text(answer)),)


def _parse_short(record: JsonRecord) -> EditRequest:
    return EditRequest(
        id=record.id("id", "case_id"),
        subject=record.text("subject"),
        prompt=record.text("prompt"),
        target_new=record.text("target_new"),
        target_true=record.optional("target_true"),
        relation=record.optional("relation"),
        paraphrases=record.texts("paraphrases"),
        neighbors=tuple(
            Neighbor(prompt=n.text("prompt"), object=n.text("object"), joint=n.literal("joint"))
            for n in record.nested_list("neighbors")
        ),
        attributes=record.texts("attributes"),
        generations=record.texts("generations"),
        target_id=record.optional("target_id"),
        joint=record.literal("joint"),
    )


def _id_or_index(record: JsonRecord) -> str:
    """The record's id, or its index in the file, from 0, as MEMIT numbers zsRE."""
    return record.id("case_id") if "case_id" in record else str(record.index)


def make_template(text: str, subject: str, location: str) -> str:
    """Put `{}` in place of the subject in a prompt.

    The subject must occur once. If it occurs more often, but only once as a whole word, that one is replaced.

    Args:
        text: prompt with the subject filled in.
        subject: the subject.
        location: location of the record, for messages.

    Raises:
        AmbiguousSubjectError: the subject does not occur, or it is not clear which occurrence is meant.
    """
    starts = _match_starts(re.escape(subject), text)
    if len(starts) > 1:
        word_starts = _match_starts(rf"(?<!\w){re.escape(subject)}(?!\w)", text)
        starts = word_starts if len(word_starts) == 1 else starts
    if len(starts) != 1:
        raise AmbiguousSubjectError(
            f"{location}: the subject {subject!r} occurs {len(starts)} times in the prompt {text!r}, expected once; "
            f"fix or drop the record, or give the prompt with {{}} for the subject in the short form"
        )
    return text[: starts[0]] + "{}" + text[starts[0] + len(subject) :]


def _match_starts(pattern: str, text: str) -> list[int]:
    """Indices at which a pattern matches in a text, overlapping matches included."""
    return [match.start() for match in re.finditer(f"(?={pattern})", text)]


def _read_located(read: Callable[[JsonRecord], Any], record: JsonRecord) -> Any:
    """Read a record, and put its location in front of any error message that lacks it."""
    try:
        return read(record)
    except InputError as error:
        if str(error).startswith(record.location):
            raise
        raise InputError(f"{record.location}: {error}") from error
