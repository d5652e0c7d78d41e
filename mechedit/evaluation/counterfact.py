"""CounterFact's measures: does the model say the new object where it should, and only there?

In: a model and edit requests. Out: `Scores`, one row a prompt and measure (ROME §3.4, MEMIT Appendix C.2). With
the unedited model's answers at hand (`Baseline`), also how far the edit moved what it should have left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch

from mechedit.data import EditRequest, check_unique_ids
from mechedit.data.texts import texts_hash
from mechedit.errors import InputError
from mechedit.evaluation.baseline import Baseline
from mechedit.evaluation.config import EvaluationConfig
from mechedit.evaluation.drift import drift
from mechedit.evaluation.free_text import greedy_answers, surprise_rows, write_freely
from mechedit.evaluation.likelihood import Answers, answer
from mechedit.evaluation.prompts import NEIGHBORS, Question, Row, ask, measure
from mechedit.evaluation.references import References, resemblance
from mechedit.evaluation.scores import ANSWER_COLUMNS, TABLE_COLUMNS, Scores
from mechedit.files import plain_copy
from mechedit.models import Model
from mechedit.provenance import value_hash

DEFAULTS = EvaluationConfig()


def evaluate(
    model: Model,
    requests: Sequence[EditRequest],
    config: EvaluationConfig | None = None,
    state: str = "after",
    *,
    baseline: Baseline | None = None,
    texts: Sequence[str] = (),
    references: References | None = None,
) -> Scores:
    """Measure a model, as it is now, on edit requests.

    ES, PS: share of rewrite and paraphrase prompts with P(new) > P(true); NS: share of neighborhood prompts with
    P(true) > P(new), NS+ with the edit's sentence before them; EM, PM, NM, NM+: the probability differences, each
    in the direction that counts as success. `exact_match`, `exact_match_paraphrase`: greedy decoding writes the new
    object, read from the argmax after each of its tokens, which by induction is the same. KL, KL+, top1, top1+:
    against the unedited model (`drift`). GE: n-gram entropy of sampled text, RS: its likeness to references, both
    with the prompt as in the published code. PPL: perplexity of `texts`. A measure that a request has no data
    for is absent for it, and counted in `Scores.counts`.

    Args:
        model: the model; inside `edited(...)` its edited self.
        requests: the edits that were or will be made.
        config: how to measure; by default as the baseline was, else `EvaluationConfig()`.
        state: name of this model state in the table: before, after or now.
        baseline: the unedited model's answers to the same (`measure_baseline`); without it there is no KL and top1.
        texts: held-out documents for PPL.
        references: for RS.

    Raises:
        InputError: no requests, a repeated id, a prompt that the model cannot take, or a baseline of another model,
            of other requests, texts, references or settings.
    """
    config = config or (baseline.scores.config if baseline else DEFAULTS)
    inquiry = _Inquiry(model=model, requests=requests, config=config, texts=texts, references=references)
    if baseline is None:
        return inquiry.scores(state, inquiry.answers())
    baseline.check(inquiry.provenance, config)
    found = inquiry.answers(watch=True)
    moved = drift(model, inquiry.questions, baseline.by_prompt, found.states, batch_size=config.batch_size)
    return inquiry.scores(state, found, list(moved))


def measure_baseline(
    model: Model,
    requests: Sequence[EditRequest],
    config: EvaluationConfig = DEFAULTS,
    *,
    texts: Sequence[str] = (),
    references: References | None = None,
) -> Baseline:
    """Measure the unedited model, and keep what edits of it are compared with.

    Its scores have the state `before`; `baseline.scores.join(evaluate(model, requests, baseline=baseline))`, within
    `edited(...)`, is the whole result.

    Args:
        model: unedited.
        requests: the edits that will be made.
        config: how to measure, now and after the edits.
        texts: as in `evaluate`.
        references: as in `evaluate`.

    Raises:
        InputError: as `evaluate`.
    """
    inquiry = _Inquiry(model=model, requests=requests, config=config, texts=texts, references=references)
    found = inquiry.answers(watch=True)
    states = torch.stack(list(found.states.values())) if found.states else torch.empty(0, model.d_model)
    return Baseline(scores=inquiry.scores("before", found), prompts=tuple(found.states), states=states)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Inquiry:
    """What is asked of one state of a model."""

    model: Model
    requests: Sequence[EditRequest]
    config: EvaluationConfig
    texts: Sequence[str]
    references: References | None

    def __post_init__(self) -> None:
        check_asked(self.requests)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """The model as it is now, what of it no edit changes, and what it is asked."""
        return asked_of(self.model, self.requests, self.texts, self.references)

    @cached_property
    def questions(self) -> list[Question]:
        """Every prompt that judges a request."""
        return [question for request in self.requests for question in ask(request, plus=self.config.plus)]

    def answers(self, *, watch: bool = False) -> Answers:
        """All pairs scored in one pass; the states after neighborhood prompts only where they are wanted."""
        pairs = (pair for question in self.questions for pair in question.pairs)
        watched = {question.text for question in self.questions if question.kind in NEIGHBORS} if watch else ()
        return answer(self.model, pairs, watched=watched, batch_size=self.config.batch_size)

    def scores(self, state: str, found: Answers, moved: Sequence[Row] = ()) -> Scores:
        """Everything measured of this state, in one table."""
        rows: list[Row] = [row for question in self.questions for row in measure(question, found.scores, self.config)]
        fluency, written = write_freely(self.model, self.requests, self.config)
        said = [*greedy_answers(self.model, self.requests, self.config), *written]
        answers = pd.DataFrame(said, columns=list(ANSWER_COLUMNS[:-1])).assign(state=state)
        likeness = resemblance(answers, self.requests, self.references) if self.references else []
        rows += [*moved, *fluency, *likeness, *surprise_rows(self.model, self.texts, self.config)]
        return Scores(
            table=pd.DataFrame(rows, columns=list(TABLE_COLUMNS[:-1])).assign(state=state),
            answers=answers,
            cases=tuple(request.id for request in self.requests),
            config=self.config,
            provenance={state: plain_copy(self.provenance)},
        )


def check_asked(requests: Sequence[EditRequest]) -> None:
    """Raise InputError when there are no requests, or one id twice."""
    if not requests:
        raise InputError("no edit requests were found, expected at least one; check the requests file")
    check_unique_ids((request.id for request in requests), "requests")


def asked_of(
    model: Model, requests: Sequence[EditRequest], texts: Sequence[str], references: References | None = None
) -> dict[str, Any]:
    """Provenance of scores: the model as it is now, what of it no edit changes, and what it is asked."""
    count = sum(1 for text in texts if text.strip())
    return {
        **model.provenance(),
        "outer_hash": model.weights_hash(blocks=False),
        "requests": value_hash([asdict(request) for request in requests]),
        "texts": {"hash": texts_hash(texts), "count": count} if len(texts) else None,
        "references": references.hash if references else None,
    }
