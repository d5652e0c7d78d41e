"""The short form, EasyEdit's and KnowEdit's: one request per record, in fields of its own."""

from __future__ import annotations

from collections.abc import Sequence

from mechedit.data.characters import visible
from mechedit.data.facts import NO_TURN, EditRequest, Neighbor, fill
from mechedit.data.json_records import JsonRecord
from mechedit.data.scored_prompts import (
    RecordRequests,
    count_prompts,
    locality_neighbors,
    neighbors_of,
    true_object,
)
from mechedit.data.templates import template_of
from mechedit.errors import InputError, brief

SHORT_FIELDS = (
    "id", "subject", "prompt", "target_new", "target_true", "relation", "paraphrases", "neighbors", "attributes",
    "generations", "target_id", "joint", "turn",
)  # fmt: skip
EASYEDIT_FIELDS = (
    "case_id", "ground_truth", "target_old", "rephrase_prompt", "rephrase", "locality_prompt", "locality_ground_truth",
    "locality", "portability", "portability_prompt", "portability_ground_truth", "relation_id", "cond",
    "concept", "text", "labels",
)  # fmt: skip
"""What EasyEdit and KnowEdit have besides; the last three are WikiBio's names for subject, prompt and target_new."""
FIELDS = (*SHORT_FIELDS, *EASYEDIT_FIELDS)
NEIGHBOR_FIELDS = ("prompt", "object", "joint")

TRUE_FIELDS = ("target_true", "ground_truth", "target_old")
PARAPHRASE_FIELDS = ("rephrase_prompt", "rephrase")


def parse_plain(record: JsonRecord) -> RecordRequests:
    """The short form, EasyEdit's and KnowEdit's; the prompt holds `{}` or the subject."""
    record.require_known(FIELDS)
    subject = subject_of(record)
    new = next((name for name in ("target_new", "labels") if name in record), "target_new")
    request = EditRequest(
        id=record.id("id", "case_id"),
        subject=subject,
        prompt=_template(record, subject),
        target_new=record.answer(new),
        target_true=_true(record),
        relation=record.optional("relation") or record.optional("relation_id"),
        joint=record.literal("joint"),
        turn=record.literal("turn") or NO_TURN,
        target_id=record.optional("target_id"),
    )
    return RecordRequests.of(
        request,
        paraphrases=_filled(_paraphrases(record), subject),
        neighbors=(
            *_short_neighbors(record),
            *neighbors_of(record, "locality_prompt", "locality_ground_truth"),
            *locality_neighbors(record, "locality"),
        ),
        attributes=record.texts("attributes"),
        generations=_filled(record.texts("generations"), subject),
        not_scored={
            "portability prompts": count_prompts(record.fields.get("portability"))
            + count_prompts(record.fields.get("portability_prompt"))
        },
    )


def subject_of(record: JsonRecord) -> str:
    """The subject, without the invisible characters at its ends."""
    return visible(record.text("subject", "concept"))


def _template(record: JsonRecord, subject: str) -> str:
    """The prompt's template. EasyEdit's prompts hold the subject, so braces beside it are not for the subject.

    Raises:
        UnclearRecordError: the prompt does not hold the subject or one `{}`.
    """
    text = record.text("prompt", "text")
    if "{}" in text and subject in text and any(name in record for name in EASYEDIT_FIELDS):
        raise record.unclear(
            f"the prompt {brief(text)} holds both {{}} and the subject {brief(subject)}, expected one of them; fix or "
            f"drop it",
            "no clear place for the subject: both {} and the subject",
        )
    return template_of(text, subject, record.location)


def _true(record: JsonRecord) -> str | None:
    """The object that the edit replaces.

    Raises:
        InputError: two fields name different ones.
    """
    objects = {name: true for name in TRUE_FIELDS if (true := true_object(record, name)) is not None}
    if len(set(objects.values())) > 1:
        raise InputError(
            f"{record.location} names the object that the edit replaces as {objects}, expected one: drop the others"
        )
    return next(iter(objects.values()), None)


def _paraphrases(record: JsonRecord) -> tuple[str, ...]:
    texts = record.texts("paraphrases")
    rephrased = dict.fromkeys(text for name in PARAPHRASE_FIELDS for text in record.text_or_texts(name))
    return (*texts, *(text for text in rephrased if text not in texts))


def _filled(texts: Sequence[str], subject: str) -> tuple[str, ...]:
    """The texts with the subject in place of their `{}`, where they have one and do not hold the subject itself."""
    return tuple(fill(text, subject) if text.count("{}") == 1 and subject not in text else text for text in texts)


def _short_neighbors(record: JsonRecord) -> tuple[Neighbor, ...]:
    neighbors = list(record.nested_list("neighbors"))
    for neighbor in neighbors:
        neighbor.require_known(NEIGHBOR_FIELDS)
    return tuple(
        Neighbor(prompt=neighbor.text("prompt"), object=neighbor.text("object"), joint=neighbor.literal("joint"))
        for neighbor in neighbors
    )
