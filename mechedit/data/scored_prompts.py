"""The requests of one record, the prompts that score them, and the prompts of the record that nothing scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mechedit.data.facts import EditRequest, Neighbor
from mechedit.data.json_records import JsonRecord, is_empty
from mechedit.errors import InputError, brief

ANSWER_FIELDS = ("ground_truth", "answer", "object", "target")
"""Names under which benchmarks keep the answer to a neighbor's prompt."""
FILLERS = ("<|endoftext|>",)
"""What EasyEdit writes where it has no object."""


@dataclass(frozen=True)
class RecordRequests:
    """The requests that a record asks for."""

    requests: tuple[EditRequest, ...]
    not_scored: Mapping[str, int] = field(default_factory=dict)
    """Number of prompts by kind that come with the record and that no measure uses."""

    @staticmethod
    def of(request: EditRequest, not_scored: Mapping[str, int] | None = None, **prompts: Any) -> RecordRequests:
        """A record of one request, with its prompts for evaluation."""
        return RecordRequests((replace(request, **prompts),), not_scored or {})


def true_object(record: JsonRecord, name: str) -> str | None:
    """The object that an edit replaces: a text, or the first of a list; None when it is absent or a filler."""
    answer = record.answer(name) if name in record else None
    return None if answer in FILLERS else answer


def neighbors_of(record: JsonRecord, prompt: str, answer: str, end: str = "") -> tuple[Neighbor, ...]:
    """The neighbors in two fields, a prompt and its answer, or as many answers as prompts.

    Args:
        record: the record.
        prompt: name of the field with the prompt or prompts.
        answer: name of the field with the answer or answers.
        end: what is put after each prompt.

    Raises:
        InputError: there are prompts and no answer, or another number of them.
    """
    if prompt not in record:
        return ()
    prompts = _listed(record.fields[prompt])
    if len(prompts) == 1:
        pairs = [(prompts[0], record.require(answer))]
    else:
        answers = _listed(record.require(answer))
        if len(answers) != len(prompts):
            raise InputError(
                f"{record.location}: {prompt} holds {len(prompts)} prompts and {answer} {len(answers)} answers, "
                f"expected one answer per prompt: fix the record"
            )
        pairs = list(zip(prompts, answers, strict=True))
    items = [JsonRecord({prompt: text, answer: value}, record.location) for text, value in pairs]
    return tuple(
        Neighbor(prompt=item.text(prompt) + end, object=item.answer(answer))
        for item in items
        if prompt in item and true_object(item, answer) is not None
    )


def locality_neighbors(record: JsonRecord, name: str) -> tuple[Neighbor, ...]:
    """The neighbors in KnowEdit's `locality`: lists of prompts with their answers, by kind, or one such list.

    Raises:
        InputError: an item is not an object with a prompt and an answer.
    """
    value = record.fields.get(name)
    if is_empty(value):
        return ()
    groups = value if isinstance(value, dict) and "prompt" not in value else {"": value}
    neighbors: list[Neighbor] = []
    for kind, group in groups.items():
        location = f"{record.location}: {name}" + (f", {kind}" if kind else "")
        for item in [group] if isinstance(group, dict) else JsonRecord({kind: group}, location).items(kind):
            if not isinstance(item, dict):
                raise InputError(
                    f"{location} holds {brief(item)}, expected objects of a prompt and a ground_truth: fix it"
                )
            pair = JsonRecord(item, location)
            pair.require_known(("prompt", *ANSWER_FIELDS))
            answer = next((answer for answer in ANSWER_FIELDS if answer in pair), None)
            if answer is not None:
                neighbors += neighbors_of(pair, "prompt", answer)
    return tuple(neighbors)


def count_prompts(value: Any) -> int:
    """The number of prompts in lists and objects of them, such as KnowEdit's `portability`."""
    if is_empty(value):
        return 0
    if isinstance(value, dict):
        if "prompt" in value:
            return len(_listed(value["prompt"]))
        # EasyEdit's older files hold one question and its answer in fields of an object.
        values = list(value.values())
        return sum(count_prompts(item) for item in values if not isinstance(item, str)) or 1
    return sum(count_prompts(item) for item in value) if isinstance(value, list) else 1


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
