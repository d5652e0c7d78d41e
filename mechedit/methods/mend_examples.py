"""What MEND's editor is trained on: each request's edit and what it is scored on, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from mechedit.data import EditRequest, fill
from mechedit.data.joint import following
from mechedit.errors import InputError
from mechedit.methods.training import TrainingRow, training_rows
from mechedit.models import Model
from mechedit.prefixes import BARE
from mechedit.prompt_tokens import complete_pairs, encode_texts
from mechedit.targets import check_length


@dataclass(frozen=True, kw_only=True, eq=False)
class MendExample:
    """What one request's edit is made of and scored on, in tokens."""

    edit: TrainingRow
    """The prompt with its object."""
    scored: Sequence[TrainingRow]
    """The same, and the paraphrases with it."""
    neighbors: Sequence[Sequence[int]]
    """Prompts about other subjects, with their objects."""


def split_by_subject(
    requests: Sequence[EditRequest], most: int, seed: int
) -> tuple[list[EditRequest], list[EditRequest]]:
    """The requests to train with, and one request of each subject that is held out to validate.

    Args:
        requests: all.
        most: subjects that are held out, of no more than a tenth of all.
        seed: of the draw.

    Raises:
        InputError: there are fewer than two subjects.
    """
    subjects = sorted({request.subject for request in requests})
    if len(subjects) < 2:
        raise InputError(
            f"there are {len(subjects)} subjects among the {len(requests)} requests, expected two at least, better "
            f"hundreds, to train an editor with; give more requests"
        )
    draw = Random(f"split {seed}")
    held_out = draw.sample(subjects, min(most, max(1, len(subjects) // 10)))
    trained = [request for request in requests if request.subject not in set(held_out)]
    of_subject = {name: [request for request in requests if request.subject == name] for name in held_out}
    return trained, [draw.choice(of_subject[name]) for name in held_out]


def mend_example(model: Model, request: EditRequest) -> MendExample:
    """A request with its paraphrases and its neighbors' prompts, in tokens.

    Raises:
        InputError: the model has no room for one of them.
    """
    (row,) = training_rows(model, [request], [BARE])
    prompts = [
        fill(request.turn, fill(text, request.subject) if _is_template(text, request) else text)
        for text in request.paraphrases
    ]
    pairs = [(prompt, following(prompt, request.target_new, request.joint)) for prompt in prompts]
    scored = [row]
    for completion in complete_pairs(model.tokenizer, pairs) if pairs else ():
        ids = check_length(model, request, completion.ids)
        scored.append(TrainingRow(ids=tuple(ids), start=len(completion.prompt), request=0))
    texts = [
        (prompt := fill(request.turn, neighbor.prompt)) + following(prompt, neighbor.object, neighbor.joint)
        for neighbor in request.neighbors
    ]
    neighbors = [check_length(model, request, ids) for ids, _ in encode_texts(model.tokenizer, texts)]
    return MendExample(edit=row, scored=scored, neighbors=neighbors)


def _is_template(text: str, request: EditRequest) -> bool:
    """Whether the subject is to be put into a paraphrase."""
    return text.count("{}") == 1 and request.subject not in text
