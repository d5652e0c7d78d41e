"""The forms that a record may have: known facts, CounterFact's, EasyEdit's, MEND's, and the short form."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from mechedit.data.facts import EditRequest, Fact, Neighbor
from mechedit.data.records import Record
from mechedit.errors import InputError


class UnclearSubjectError(InputError):
    """A prompt in which it is not clear where the subject stands."""


def read_fact(record: Record) -> Fact:
    """A fact from the form `{"id", "subject", "prompt", "object", …}` or from ROME's known-facts set."""
    return _located(_fact, record)


def read_request(record: Record) -> EditRequest:
    """A request from any of the forms below, told apart by the fields that only one of them has."""
    if "requested_rewrite" in record:
        return _located(_counterfact, record)
    if is_mend(record):
        return _located(_mend, record)
    if any(name in record for name in ("ground_truth", "rephrase_prompt", "locality_prompt")):
        return _located(_easyedit, record)
    return _located(_short, record)


def is_mend(record: Record) -> bool:
    """Whether a record has MEND's form."""
    return "src" in record and "answers" in record


def _fact(record: Record) -> Fact:
    return Fact(
        id=record.id("id", "known_id"),
        subject=record.text("subject"),
        prompt=_known_prompt(record) if "template" in record else record.text("prompt"),
        object=record.text("object", "attribute"),
        relation=record.optional("relation") or record.optional("relation_id"),
        foil=record.optional("foil"),
    )


def _known_prompt(record: Record) -> str:
    """In the known-facts set the template may lack the prompt's last words; take them from the prompt."""
    subject, prompt = record.text("subject"), record.optional("prompt") or ""
    return prompt.replace(subject, "{}", 1) if prompt.count(subject) == 1 else record.text("template")


def _counterfact(record: Record) -> EditRequest:
    """CounterFact and multi_counterfact; a neighbor may also name its own object, `{"prompt", "target"}`."""
    rewrite = record.part("requested_rewrite")
    new = rewrite.part("target_new")
    true = rewrite.part("target_true").text("str") if "target_true" in rewrite else None
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
    )


def _neighbors(record: Record, true: str | None) -> tuple[Neighbor, ...]:
    """Neighbors as text share the request's true object; without one nothing can be compared, so they go."""
    name = "neighborhood_prompts"
    if any(isinstance(item, dict) for item in record.items(name)):
        return tuple(Neighbor(prompt=n.text("prompt"), object=n.text("target")) for n in record.parts(name))
    return tuple(Neighbor(prompt=prompt, object=true) for prompt in record.texts(name) if true)


def _easyedit(record: Record) -> EditRequest:
    """EasyEdit's form: prompts with the subject filled in, one rephrasing, one neighbor with its own object."""
    return EditRequest(
        id=_id_or_index(record),
        subject=record.text("subject"),
        prompt=template_of(record.text("prompt"), record.text("subject"), record.where),
        target_new=record.text("target_new"),
        target_true=record.optional("ground_truth"),
        relation=record.optional("relation_id"),
        paraphrases=tuple(text for text in [record.optional("rephrase_prompt")] if text),
        neighbors=_neighbor(record, "locality_prompt", "locality_ground_truth"),
    )


def _mend(record: Record) -> EditRequest:
    """MEND's zsRE, as MEMIT reads it: the new object is the first answer, and there is no true one.

    The neighbor is a question of Natural Questions. As in MEMIT's code it keeps its `nq question: ` and gets a
    question mark. `alt`, MEND's invented answer, is not used.
    """
    answers = record.texts("answers")
    if not answers:
        raise InputError(f"{record.where}: answers is empty, expected at least one: fill it in or drop the record")
    return EditRequest(
        id=_id_or_index(record),
        subject=record.text("subject"),
        prompt=template_of(record.text("src"), record.text("subject"), record.where),
        target_new=answers[0],
        paraphrases=tuple(text for text in [record.optional("rephrase")] if text),
        neighbors=_neighbor(record, "loc", "loc_ans", end="?"),
    )


def _neighbor(record: Record, prompt: str, answer: str, end: str = "") -> tuple[Neighbor, ...]:
    if prompt not in record:
        return ()
    return (Neighbor(prompt=record.text(prompt) + end, object=record.text(answer)),)


def _short(record: Record) -> EditRequest:
    return EditRequest(
        id=record.id("id", "case_id"),
        subject=record.text("subject"),
        prompt=record.text("prompt"),
        target_new=record.text("target_new"),
        target_true=record.optional("target_true"),
        relation=record.optional("relation"),
        paraphrases=record.texts("paraphrases"),
        neighbors=tuple(Neighbor(prompt=n.text("prompt"), object=n.text("object")) for n in record.parts("neighbors")),
        attributes=record.texts("attributes"),
        generations=record.texts("generations"),
        target_id=record.optional("target_id"),
    )


def _id_or_index(record: Record) -> str:
    """The record's id, or its place in the file from 0, as MEMIT numbers zsRE."""
    return record.id("case_id") if "case_id" in record else str(record.index)


def template_of(text: str, subject: str, where: str) -> str:
    """Put `{}` where the subject stands in a prompt.

    It must stand there once. When it occurs more often, also inside other words, and once as a whole word, that
    one is meant.

    Raises:
        UnclearSubjectError: it does not occur, or more than one place may be meant.
    """
    found = _places(re.escape(subject), text)
    if len(found) > 1:
        whole = _places(rf"(?<!\w){re.escape(subject)}(?!\w)", text)
        found = whole if len(whole) == 1 else found
    if len(found) != 1:
        raise UnclearSubjectError(
            f"{where}: the subject {subject!r} occurs {len(found)} times in the prompt {text!r}, expected once; "
            f"mend or drop the record, or give the prompt with {{}} for the subject in the short form"
        )
    return text[: found[0]] + "{}" + text[found[0] + len(subject) :]


def _places(pattern: str, text: str) -> list[int]:
    """Where a pattern begins in a text, overlaps included."""
    return [match.start() for match in re.finditer(f"(?={pattern})", text)]


def _located(read: Callable[[Record], Any], record: Record) -> Any:
    """Read a record; what its value refuses gets the record's place in front."""
    try:
        return read(record)
    except InputError as error:
        if str(error).startswith(record.where):
            raise
        raise InputError(f"{record.where}: {error}") from error
