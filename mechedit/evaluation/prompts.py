"""The prompts that judge a request, and what the likelihood of two objects after one says of it.

CounterFact asks with the edit's own prompt, reworded prompts and prompts about neighbors (ROME §3.4, MEMIT
Appendix C.2). CounterFact+ (Hoelscher-Obermaier et al. 2023) asks about the neighbors again, with the edit as a
sentence before the prompt: `The Louvre is in Rome. The Colosseum is in`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mechedit.data import EditRequest, fill
from mechedit.evaluation.config import EvaluationConfig
from mechedit.evaluation.likelihood import Pair, TargetScore

Kind = Literal["rewrite", "paraphrase", "neighborhood", "neighborhood_plus"]
SUCCESS: Mapping[Kind, str] = {"rewrite": "ES", "paraphrase": "PS", "neighborhood": "NS", "neighborhood_plus": "NS+"}
MAGNITUDE: Mapping[Kind, str] = {"rewrite": "EM", "paraphrase": "PM", "neighborhood": "NM", "neighborhood_plus": "NM+"}
EXACT: Mapping[Kind, str] = {"rewrite": "exact_match", "paraphrase": "exact_match_paraphrase"}
NEIGHBORS: tuple[Kind, ...] = ("neighborhood", "neighborhood_plus")
"""Prompts whose answers an edit should leave alone."""

Row = tuple[str, str, str, int, float]
"""case, measure, kind, prompt, value."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt of a request with the two objects that compete for it."""

    case: str
    kind: Kind
    prompt: int
    """Index within the kind."""
    text: str
    new: str
    true: str | None
    """For a neighbor, its own true object. None leaves out the measures that compare."""

    @property
    def pairs(self) -> list[Pair]:
        """The (prompt, object) pairs that must be scored."""
        return [(self.text, target) for target in (self.new, self.true) if target is not None]


def ask(request: EditRequest, *, plus: bool = True) -> Iterator[Question]:
    """The prompts that judge one request, those of CounterFact+ only if `plus`."""
    yield _question(request, "rewrite", 0, request.text, request.target_true)
    for index, text in enumerate(request.paraphrases):
        yield _question(request, "paraphrase", index, filled(text, request), request.target_true)
    for index, neighbor in enumerate(request.neighbors):
        yield _question(request, "neighborhood", index, neighbor.prompt, neighbor.object)
    for index, neighbor in enumerate(request.neighbors if plus else ()):
        text = f"{request.text} {request.target_new.strip()}. {neighbor.prompt}"
        yield _question(request, "neighborhood_plus", index, text, neighbor.object)


def filled(text: str, request: EditRequest) -> str:
    """A prompt as it stands, or, written as a template, with the subject in it."""
    return fill(text, request.subject) if text.count("{}") == 1 else text


def measure(question: Question, scores: Mapping[Pair, TargetScore], config: EvaluationConfig) -> Iterator[Row]:
    """Rows of one question; ties are failures, as published.

    Success is 1 where P(new) > P(true), on neighbors where P(true) > P(new), else 0; magnitude is the
    difference of the two, with the sign that makes success positive.
    """
    new = scores[question.text, question.new]
    name = (question.kind, question.prompt)
    if question.kind in EXACT:
        yield question.case, EXACT[question.kind], *name, float(new.greedy)
    if question.true is None:
        return
    wanted, other = new, scores[question.text, question.true]
    if question.kind in NEIGHBORS:
        wanted, other = other, wanted
    # Logarithms decide: two small probabilities of long objects may both round to 0.
    success = wanted.log_likelihood(config.likelihood) > other.log_likelihood(config.likelihood)
    yield question.case, SUCCESS[question.kind], *name, float(success)
    difference = wanted.probability(config.likelihood) - other.probability(config.likelihood)
    yield question.case, MAGNITUDE[question.kind], *name, difference


def _question(request: EditRequest, kind: Kind, index: int, text: str, true: str | None) -> Question:
    return Question(case=request.id, kind=kind, prompt=index, text=text, new=request.target_new, true=true)
