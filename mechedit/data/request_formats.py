"""`read_fact` and `read_requests`: a record in the format of any of the data sets, as facts or requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from mechedit.data.facts import NO_TURN, EditRequest, Fact, Neighbor
from mechedit.data.json_records import JsonRecord, UnclearRecordError
from mechedit.data.plain_format import parse_plain, subject_of
from mechedit.data.ripple_edits import parse_ripple_edits
from mechedit.data.scored_prompts import RecordRequests, neighbors_of
from mechedit.data.templates import make_template, template_of
from mechedit.errors import InputError

Parsed = TypeVar("Parsed")

FACT_FIELDS = (
    "id", "subject", "prompt", "object", "relation", "foil", "joint", "turn",
    "known_id", "attribute", "template", "relation_id", "prediction",
)  # fmt: skip
"""Fields of a fact: our own, then those of ROME's known facts."""
COUNTERFACT_FIELDS = (
    "case_id", "id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "attribute_prompts",
    "generation_prompts", "pararel_idx", "joint",
)  # fmt: skip
MQUAKE_FIELDS = (
    "case_id", "id", "requested_rewrite", "questions", "answer", "answer_alias", "answer_extended", "new_answer",
    "new_answer_alias", "single_hops", "new_single_hops", "orig", "joint",
)  # fmt: skip
REWRITE_FIELDS = ("prompt", "subject", "target_new", "target_true", "relation_id", "question")
OBJECT_FIELDS = ("str", "id")
MEND_FIELDS = (
    "subject", "src", "answers", "rephrase", "loc", "loc_ans", "pred", "alt", "cond", "case_id", "id", "joint",
)  # fmt: skip
WIKIBIGEDIT_FIELDS = (
    "subject", "update", "ans", "rephrase", "loc", "loc_ans", "personas", "mhop", "mhop_ans", "tag", "relation",
    "relation_id", "object", "object_id", "subject_id", "ground_truth", "case_id", "id", "joint",
)  # fmt: skip
OBJECTS = ("object", "attribute")
"""Fields of a fact's object; a request has none of them alone."""
NEW_OBJECTS = ("requested_rewrite", "target_new", "labels", "answers", "edit", "update", "ans")
"""Fields of which every request has one; no fact has any."""
PERSONAS = ("personas_", "genv2_")
"""How the names of WikiBigEdit's further questions start, one field per way of asking."""


def read_fact(record: JsonRecord) -> Fact:
    """Read a fact: `{"id", "subject", "prompt", "object", …}`, or a record of ROME's known facts."""
    return _read_located(_parse_fact, record)


def read_requests(record: JsonRecord) -> RecordRequests:
    """Read a record's requests in any of the formats below, recognized by fields that only one of them has."""
    if isinstance(record.fields.get("requested_rewrite"), list):
        return _read_located(_parse_mquake, record)
    if "requested_rewrite" in record.fields:
        return _read_located(_parse_counterfact, record)
    if isinstance(record.fields.get("edit"), dict):
        return _read_located(parse_ripple_edits, record)
    if "src" in record or "answers" in record:
        return _read_located(_parse_mend, record)
    if "update" in record or "ans" in record:
        return _read_located(_parse_wikibigedit, record)
    if old := _only(record, OBJECTS, NEW_OBJECTS):
        raise InputError(
            f"{record.location} is a fact to trace (it has {old!r}, and no 'target_new'), expected an edit request: "
            f"read facts by load_facts (--facts), or rename the field to 'target_new'"
        )
    return _read_located(parse_plain, record)


def _only(record: JsonRecord, names: Sequence[str], without: Sequence[str]) -> str | None:
    """The first of these fields that the record has, where it has none of the others."""
    return None if any(name in record for name in without) else next((name for name in names if name in record), None)


def _parse_fact(record: JsonRecord) -> Fact:
    if new := _only(record, NEW_OBJECTS, OBJECTS):
        raise InputError(
            f"{record.location} is an edit request (it has {new!r}, and no 'object'), expected a fact to trace: read "
            f"requests by load_requests (--requests), or rename the field to 'object'"
        )
    record.require_known(FACT_FIELDS)
    subject = subject_of(record)
    known = "template" in record
    return Fact(
        id=record.id("id", "known_id"),
        subject=subject,
        prompt=_known_prompt(record, subject)
        if known
        else template_of(record.text("prompt"), subject, record.location),
        object=record.text("object", "attribute"),
        relation=record.optional("relation") or record.optional("relation_id"),
        foil=record.optional("foil"),
        joint=record.literal("joint"),
        turn=record.literal("turn") or NO_TURN,
    )


def _known_prompt(record: JsonRecord, subject: str) -> str:
    """In the known-facts set the template may lack the prompt's last words; take them from the prompt."""
    prompt = record.optional("prompt") or ""
    return prompt.replace(subject, "{}", 1) if prompt.count(subject) == 1 else record.text("template")


def _parse_counterfact(record: JsonRecord) -> RecordRequests:
    """CounterFact and multi_counterfact; a neighbor may also name its own object, `{"prompt", "target"}`."""
    record.require_known(COUNTERFACT_FIELDS)
    rewrite = record.nested("requested_rewrite")
    request = _rewrite(
        rewrite,
        id=record.id("case_id", "id"),
        paraphrases=record.texts("paraphrase_prompts"),
        joint=record.literal("joint"),
    )
    return RecordRequests.of(
        request,
        neighbors=_counterfact_neighbors(record, request.target_true),
        attributes=record.texts("attribute_prompts"),
        generations=record.texts("generation_prompts"),
    )


def _counterfact_neighbors(record: JsonRecord, true: str | None) -> tuple[Neighbor, ...]:
    """Neighbors given as text have the request's true object; without one they cannot be scored and are dropped."""
    name = "neighborhood_prompts"
    if any(isinstance(item, dict) for item in record.items(name)):
        return tuple(Neighbor(prompt=n.text("prompt"), object=n.text("target")) for n in record.nested_list(name))
    return tuple(Neighbor(prompt=prompt, object=true) for prompt in record.texts(name) if true)


def _parse_mquake(record: JsonRecord) -> RecordRequests:
    """MQuAKE: one request per rewrite, with its question as paraphrase; questions over several facts are not scored."""
    record.require_known(MQUAKE_FIELDS)
    rewrites = list(record.nested_list("requested_rewrite"))
    if not rewrites:
        raise record.unclear("requested_rewrite is empty, expected rewrites: add them or drop the record", "no rewrite")
    case, joint = record.id("case_id", "id"), record.literal("joint")
    requests = [
        _rewrite(
            rewrite,
            id=case if len(rewrites) == 1 else f"{case}-{number}",
            paraphrases=rewrite.text_or_texts("question"),
            joint=joint,
        )
        for number, rewrite in enumerate(rewrites, 1)
    ]
    return RecordRequests(tuple(requests), {"multi-hop questions": len(record.texts("questions"))})


def _rewrite(rewrite: JsonRecord, *, id: str, paraphrases: tuple[str, ...], joint: str | None) -> EditRequest:
    """A request from CounterFact's `requested_rewrite`; objects are `{"str", "id"?}` there."""
    rewrite.require_known(REWRITE_FIELDS)
    new = rewrite.nested("target_new")
    true = rewrite.nested("target_true") if "target_true" in rewrite else None
    for target in [new] if true is None else [new, true]:
        target.require_known(OBJECT_FIELDS)
    if "str" not in new:
        raise rewrite.unclear("the target_new has no text, expected some in 'str'; fill it in", "no target_new")
    subject = subject_of(rewrite)
    return EditRequest(
        id=id,
        subject=subject,
        prompt=template_of(rewrite.text("prompt"), subject, rewrite.location),
        target_new=new.text("str"),
        target_true=None if true is None else true.optional("str"),
        relation=rewrite.optional("relation_id"),
        paraphrases=paraphrases,
        target_id=new.optional("id"),
        joint=joint,
    )


def _parse_mend(record: JsonRecord) -> RecordRequests:
    """MEND's zsRE, as MEMIT reads it: the new object is the first answer, and there is no true one.

    The neighbor is a question of Natural Questions. As in MEMIT's code it keeps its `nq question: ` and gets a
    question mark. `alt`, MEND's invented answer, is not used.
    """
    record.require_known(MEND_FIELDS)
    answers, subject = record.texts("answers"), subject_of(record)
    if not answers:
        raise record.unclear("answers is empty, expected at least one: fill it in or drop the record", "no answer")
    return RecordRequests.of(
        EditRequest(
            id=record.id("case_id", "id"),
            subject=subject,
            prompt=make_template(record.text("src"), subject, record.location),
            target_new=answers[0],
            paraphrases=record.text_or_texts("rephrase"),
            joint=record.literal("joint"),
        ),
        neighbors=neighbors_of(record, "loc", "loc_ans", end="?"),
    )


def _parse_wikibigedit(record: JsonRecord) -> RecordRequests:
    """WikiBigEdit: a question, its answer, one rephrasing and a neighbor; personas and multi-hop are not scored."""
    personas = [name for name in record.fields if name == "personas" or name.startswith(PERSONAS)]
    record.require_known((*WIKIBIGEDIT_FIELDS, *personas))
    subject = subject_of(record)
    return RecordRequests.of(
        EditRequest(
            id=record.id("case_id", "id"),
            subject=subject,
            prompt=make_template(record.text("update"), subject, record.location),
            target_new=record.answer("ans"),
            target_true=record.answer("ground_truth") if "ground_truth" in record else None,
            relation=record.optional("relation_id") or record.optional("relation"),
            paraphrases=record.text_or_texts("rephrase"),
            target_id=record.optional("object_id"),
            joint=record.literal("joint"),
        ),
        neighbors=neighbors_of(record, "loc", "loc_ans") if "loc_ans" in record else (),
        not_scored={
            "persona questions": sum(name in record for name in personas),
            "multi-hop questions": int("mhop" in record),
        },
    )


def _read_located(read: Callable[[JsonRecord], Parsed], record: JsonRecord) -> Parsed:
    """Read a record, and put its location in front of any error message that lacks it."""
    try:
        return read(record)
    except UnclearRecordError as error:
        if str(error).startswith(record.location):
            raise
        raise UnclearRecordError(f"{record.location}: {error}", error.reason) from error
    except InputError as error:
        if str(error).startswith(record.location):
            raise
        raise InputError(f"{record.location}: {error}") from error
