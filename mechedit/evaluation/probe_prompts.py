"""The prompts that probe a request, and the scores that follow from the likelihood of two objects after each.

CounterFact probes an edit by its own prompt, reworded prompts and prompts about neighbors (ROME §3.3, MEMIT Appendix
C.2). CounterFact+ (Hoelscher-Obermaier et al. 2023) repeats the neighbors' prompts with the edit as a sentence before
them: `The Louvre is in Rome. The Colosseum is in`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mechedit.data import EditRequest, Neighbor, fill
from mechedit.data.characters import writes_spaces
from mechedit.data.facts import NO_TURN
from mechedit.data.joint import following
from mechedit.evaluation.config import EvaluationConfig
from mechedit.evaluation.likelihood import Pair, TargetScore

Kind = Literal["rewrite", "paraphrase", "neighborhood", "neighborhood_plus"]
SUCCESS: Mapping[Kind, str] = {"rewrite": "ES", "paraphrase": "PS", "neighborhood": "NS", "neighborhood_plus": "NS+"}
MAGNITUDE: Mapping[Kind, str] = {"rewrite": "EM", "paraphrase": "PM", "neighborhood": "NM", "neighborhood_plus": "NM+"}
EXACT: Mapping[Kind, str] = {"rewrite": "exact_match", "paraphrase": "exact_match_paraphrase"}
NEIGHBORS: tuple[Kind, ...] = ("neighborhood", "neighborhood_plus")
"""Kinds of prompts whose completions an edit should leave as they are."""

ScoreRow = tuple[str, str, str, int, float]
"""case, measure, kind, prompt, value: a row of the scores table, but for the state."""


@dataclass(frozen=True, kw_only=True)
class ProbePrompt:
    """One prompt that probes a request, with the two objects that compete for it."""

    case: str
    """Id of the request."""
    kind: Kind
    """Kind of test: the edit's prompt, a reworded one, or a neighbor's, with or without the edit before it."""
    index: int
    """Index of the prompt among those of its kind."""
    text: str
    """The prompt, with its subject in it."""
    target_new: str
    """The request's new object."""
    target_true: str | None
    """The true object; of a neighbor, its own. None leaves out the measures that compare the two."""
    joint: str | None = None
    """Text between the prompt and an object; None lets the characters that meet decide."""

    @property
    def pairs(self) -> list[Pair]:
        """The pairs that must be scored."""
        return [self.pair(target) for target in (self.target_new, self.target_true) if target is not None]

    def pair(self, target: str) -> Pair:
        """The prompt, and an object as it follows it."""
        return self.text, following(self.text, target, self.joint)


def probe_prompts(request: EditRequest, *, plus: bool = True) -> Iterator[ProbePrompt]:
    """All prompts that probe one request, those of CounterFact+ only if `plus`."""
    yield _probe(request, "rewrite", 0, request.text, request.target_true)
    for index, text in enumerate(request.paraphrases):
        yield _probe(request, "paraphrase", index, prompt_text(text, request), request.target_true)
    for index, neighbor in enumerate(request.neighbors):
        yield _neighbor_probe(request, "neighborhood", index, neighbor, neighbor.prompt)
    for index, neighbor in enumerate(request.neighbors if plus else ()):
        yield _neighbor_probe(request, "neighborhood_plus", index, neighbor, edit_sentence(request) + neighbor.prompt)


def prompt_text(text: str, request: EditRequest) -> str:
    """A prompt about the request's subject in its turn; the subject is filled in where a `{}` stands for it."""
    is_template = text.count("{}") == 1 and request.subject not in text
    return fill(request.turn, fill(text, request.subject) if is_template else text)


def edit_sentence(request: EditRequest) -> str:
    """The request's prompt and new object as a sentence before another one; one dot, or other mark, ends it."""
    prompt = fill(request.prompt, request.subject)
    # The joint of a chat is the template's, between a question and its answer.
    sentence = prompt + following(prompt, request.target_new, request.joint if request.turn == NO_TURN else None)
    spaced = writes_spaces(sentence[-1])
    if unicodedata.normalize("NFKC", sentence[-1])[-1] in ".!?…。।؟":  # such as that of "Washington, D.C."
        return f"{sentence} " if spaced else sentence
    return f"{sentence}. " if spaced else f"{sentence}。"


def likelihood_rows(
    probe: ProbePrompt, scores: Mapping[Pair, TargetScore], config: EvaluationConfig
) -> Iterator[ScoreRow]:
    """Success, magnitude and exact match of one prompt; ties are failures, as in the published code.

    Success is 1 where P(new) > P(true), on neighbors where P(true) > P(new), else 0. Magnitude is the difference of
    the two probabilities, with the sign that makes success positive.

    Args:
        probe: the prompt.
        scores: of its `pairs`.
        config: which likelihood counts.
    """
    new = scores[probe.pair(probe.target_new)]
    name = (probe.kind, probe.index)
    if probe.kind in EXACT:
        yield probe.case, EXACT[probe.kind], *name, float(new.greedy)
    if probe.target_true is None:
        return
    expected, rival = new, scores[probe.pair(probe.target_true)]
    if probe.kind in NEIGHBORS:
        expected, rival = rival, expected
    # Logarithms decide: two small probabilities of long objects may both round to 0.
    success = expected.log_likelihood(config.likelihood) > rival.log_likelihood(config.likelihood)
    yield probe.case, SUCCESS[probe.kind], *name, float(success)
    difference = expected.probability(config.likelihood) - rival.probability(config.likelihood)
    yield probe.case, MAGNITUDE[probe.kind], *name, difference


def _probe(request: EditRequest, kind: Kind, index: int, text: str, target_true: str | None) -> ProbePrompt:
    return ProbePrompt(
        case=request.id, kind=kind, index=index, text=text, target_new=request.target_new, target_true=target_true,
        joint=request.joint,
    )  # fmt: skip


def _neighbor_probe(request: EditRequest, kind: Kind, index: int, neighbor: Neighbor, text: str) -> ProbePrompt:
    return ProbePrompt(
        case=request.id, kind=kind, index=index, text=fill(request.turn, text), target_new=request.target_new,
        target_true=neighbor.object, joint=request.joint if neighbor.joint is None else neighbor.joint,
    )  # fmt: skip
