"""RippleEdits: an edit as a full sentence, with lists of questions that other facts and the edit itself answer.

A record names neither its subject nor its objects: they stand in the sentences, `<stem> <object>.`, and are told apart
by what the sentences and questions of one record have in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from mechedit.data.characters import visible
from mechedit.data.facts import EditRequest, Neighbor
from mechedit.data.json_records import JsonRecord
from mechedit.data.scored_prompts import RecordRequests
from mechedit.data.templates import make_template
from mechedit.errors import brief

NEIGHBORS = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")
"""Questions whose answers the edit must not change; the second spelling is the published files'."""
PARAPHRASES = ("Subject_Aliasing",)
"""Questions about the edited fact by other names of the subject."""
NOT_SCORED = ("Logical_Generalization", "Compositionality_I", "Compositionality_II")
FIELDS = ("example_type", "edit", "subject", *NEIGHBORS, *PARAPHRASES, *NOT_SCORED, "case_id", "id", "joint")
EDIT_FIELDS = ("prompt", "subject_id", "relation", "target_id", "original_fact", "subject", "target")

STEM_ENDS = ("is", "are", "follows", "by")
"""Last words of stems."""
BEFORE_SUBJECT = ("of", "which", "in", "award")
AFTER_SUBJECT = ("is", "are", "has", "won", "plays", "follows")
"""Words of stems beside the subject."""


@dataclass(frozen=True)
class _Question:
    """A question of the record."""

    axis: str
    prompt: str
    answers: tuple[str, ...]
    """Its answers' names, the first answer's own name first."""
    subject_id: str | None
    target_ids: tuple[str, ...]
    rephrased: bool
    """Whether the prompt is not the relation's own."""


def parse_ripple_edits(record: JsonRecord) -> RecordRequests:
    """One request: the edit, with questions about other facts as neighbors and those by other names as paraphrases.

    Raises:
        UnclearRecordError: the subject or an object cannot be told apart.
    """
    record.require_known(FIELDS)
    edit = record.nested("edit")
    edit.require_known(EDIT_FIELDS)
    questions = list(_questions(record))
    stem, new, true = _split(edit, questions)
    subject = edit.optional("subject") or record.optional("subject") or _subject(edit, stem, questions)
    scored = [question for question in questions if question.answers]
    return RecordRequests.of(
        EditRequest(
            id=record.id("case_id", "id"),
            subject=visible(subject),
            prompt=make_template(stem, visible(subject), edit.location),
            target_new=new,
            target_true=true,
            relation=edit.optional("relation"),
            target_id=edit.optional("target_id"),
            joint=record.literal("joint"),
        ),
        paraphrases=tuple(dict.fromkeys(q.prompt for q in scored if q.axis in PARAPHRASES and new in q.answers)),
        neighbors=tuple(Neighbor(prompt=q.prompt, object=q.answers[0]) for q in scored if q.axis in NEIGHBORS),
        not_scored={"ripple prompts": sum(q.axis in NOT_SCORED for q in questions)},
    )


def _questions(record: JsonRecord) -> Iterator[_Question]:
    """The questions of all lists; those that only say when a test counts are of axis `condition`."""
    for axis in (*NEIGHBORS, *PARAPHRASES, *NOT_SCORED):
        for test in record.nested_list(axis):
            for name, kind in (("test_queries", axis), ("condition_queries", "condition")):
                for query in test.nested_list(name):
                    if "prompt" in query:
                        yield _question(query, kind)


def _question(query: JsonRecord, axis: str) -> _Question:
    answers = [
        name
        for answer in query.nested_list("answers")
        for name in (*answer.text_or_texts("value"), *answer.text_or_texts("aliases"))
    ]
    return _Question(
        axis=axis,
        prompt=query.text("prompt"),
        answers=tuple(answers),
        subject_id=query.optional("subject_id"),
        target_ids=tuple(str(target) for target in query.items("target_ids")),
        rephrased="phrase" in query or query.fields.get("query_type") not in (None, "regular"),
    )


def _split(edit: JsonRecord, questions: Sequence[_Question]) -> tuple[str, str, str | None]:
    """The stem, the new object and the one that it replaces, if the record has it.

    The new object's name is that of the answer with its id. Where no question has it, the stem is what the new and the
    old sentence have in common, up to a word that ends stems, since two objects may begin alike.
    """
    sentence = edit.text("prompt").strip().removesuffix(".")
    old = edit.nested("original_fact").text("prompt").strip().removesuffix(".") if "original_fact" in edit else None
    stem = _stem_before(_names(edit, questions), sentence)
    if stem is None:
        words = sentence.split(" ")
        shared = words if old is None else _common_prefix(words, old.split(" "))
        ends = [index for index, word in enumerate(shared[:-1] if old is None else shared) if word in STEM_ENDS]
        # Without the old sentence only one word that ends stems leaves no choice.
        if not ends or (old is None and len(ends) > 1):
            raise edit.unclear(
                f"the sentence {brief(edit.text('prompt'))} does not show where its object begins; add "
                "'target' to the edit",
                "no clear place for the object",
            )
        stem = " ".join(words[: ends[-1] + 1])
    new = sentence[len(stem) :].strip()
    if not new:
        raise edit.unclear(f"the sentence {brief(edit.text('prompt'))} names no object; drop the record", "no object")
    true = old[len(stem) :].strip() if old is not None and old.startswith(stem + " ") else None
    return stem, new, true or None


def _names(edit: JsonRecord, questions: Sequence[_Question]) -> list[str]:
    """Names of the new object."""
    if "target" in edit:
        return [edit.text("target")]
    target = edit.optional("target_id")
    return [name for q in questions if target is not None and target in q.target_ids for name in q.answers]


def _stem_before(names: Sequence[str], sentence: str) -> str | None:
    """What stands before the longest of the names that end a sentence; None when none does."""
    endings = [name for name in names if sentence.endswith(f" {name}")]
    return sentence[: -len(max(endings, key=len)) - 1].rstrip() if endings else None


def _subject(edit: JsonRecord, stem: str, questions: Sequence[_Question]) -> str:
    """The words that the stem has in common with every question about the same subject, without words of stems."""
    prompts = [
        q.prompt
        for q in questions
        if q.subject_id == edit.optional("subject_id")
        and not (q.rephrased or q.axis in PARAPHRASES or q.prompt.startswith(stem))
    ]
    words = stem.split(" ")
    runs = {run for prompt in prompts for run in _common_runs(words, prompt.split(" "))}
    candidates = [run for run in runs if all(run in prompt for prompt in prompts)]
    if not candidates:
        raise edit.unclear(
            f"no question of the record shows which words of {brief(stem)} are the subject; add 'subject' to the edit",
            "no clear place for the subject: no question about it",
        )
    # Prompts of two relations may share another word; names have capitals, or letters of scripts that have none.
    return max(candidates, key=lambda run: (not run.islower(), len(run)))


def _common_runs(words: Sequence[str], others: Sequence[str]) -> Iterator[str]:
    """Runs of words that two prompts share and that go on in neither direction, without words of stems at the ends."""
    for i in range(len(words)):
        for j in range(len(others)):
            if words[i] != others[j] or (i and j and words[i - 1] == others[j - 1]):
                continue
            run = _common_prefix(words[i:], others[j:])
            # Both prompts start with their relations' words.
            if i == j == 0 and run[0] == "The":
                continue
            while run and run[0] in BEFORE_SUBJECT:
                run = run[1:]
            while run and run[-1] in AFTER_SUBJECT:
                run = run[:-1]
            if run and not all(word in ("the", "a") for word in run):
                yield " ".join(run)


def _common_prefix(words: Sequence[str], others: Sequence[str]) -> list[str]:
    return [word for word, _ in takewhile(lambda pair: pair[0] == pair[1], zip(words, others, strict=False))]
