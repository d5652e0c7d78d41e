"""CounterFact's measures: does the model say the new object where it should, and only there?

In: a model and edit requests. Out: `Scores`, one row per prompt and measure (ROME §3.3, MEMIT Appendix C.2). Given a
`Baseline` of the unedited model, also how far the edit moved distributions that it should have left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch

from mechedit.chat import prompted
from mechedit.data import EditRequest, check_unique_ids, texts_hash
from mechedit.errors import InputError
from mechedit.evaluation.baseline import Baseline
from mechedit.evaluation.config import EvaluationConfig
from mechedit.evaluation.drift import drift_rows
from mechedit.evaluation.free_text import generation_rows, greedy_answers, text_loss_rows
from mechedit.evaluation.likelihood import Answers, score_pairs
from mechedit.evaluation.probe_prompts import NEIGHBORS, ProbePrompt, ScoreRow, likelihood_rows, probe_prompts
from mechedit.evaluation.references import References, reference_scores
from mechedit.evaluation.scores import ANSWER_COLUMNS, TABLE_COLUMNS, Scores
from mechedit.files import plain_copy
from mechedit.models import Model, exclusive
from mechedit.provenance import value_hash

DEFAULTS = EvaluationConfig()


@exclusive
def evaluate(
    model: Model,
    requests: Sequence[EditRequest],
    config: EvaluationConfig | None = None,
    state: str = "after",
    *,
    baseline: Baseline | None = None,
    texts: Sequence[str] = (),
    references: References | None = None,
    chat: bool = False,
    joint: str | None = None,
) -> Scores:
    """Measure a model, as it is now, on edit requests by CounterFact's measures.

    ES, PS: rate of rewrite and paraphrase prompts with P(new) > P(true); NS: rate of neighborhood prompts with
    P(true) > P(new), NS+ with the edit's sentence before them; EM, PM, NM, NM+: the probability differences, each
    in the direction that counts as success. `exact_match`, `exact_match_paraphrase`: greedy decoding writes the new
    object, read from the argmax after each of its tokens, which by induction is the same. KL, KL+, top1, top1+:
    against the unedited model (`drift_rows`). GE: n-gram entropy of sampled text, RS: its similarity to reference
    texts, both with the prompt as in the published code. PPL: perplexity of `texts`. A measure that a request has no
    data for is absent for it, and counted in `Scores.counts`.

    Args:
        model: the model; inside `edited(...)` its edited self.
        requests: the edits that were or will be made.
        config: how to measure; by default as the baseline was, else `EvaluationConfig()`.
        state: name of this model state in the table: before, after or now.
        baseline: the unedited model on the same input (`measure_baseline`); without it there is no KL and top1.
        texts: held-out documents for PPL.
        references: reference texts for RS.
        chat: ask each prompt as a user's question, through the tokenizer's chat template.
        joint: text between prompt and object where a request names none; by default the characters that meet decide.

    Raises:
        InputError: no requests, a repeated id, a prompt that the model cannot take, or a baseline of another model,
            of other requests, texts, references or settings.

    Example:
        >>> before = evaluate(model, requests, state="before")
        >>> with edited(model, edit):
        ...     after = evaluate(model, requests)
        >>> entry = before.join(after).summary("after")["ES"]  # mean, low, high and n
    """
    config = config or (baseline.scores.config if baseline else DEFAULTS)
    requests = prompted(model.tokenizer, requests, chat=chat, joint=joint)
    evaluation = _Evaluation(model=model, requests=requests, config=config, texts=texts, references=references)
    if baseline is None:
        return evaluation.scores(state, evaluation.score_probes())
    baseline.check(evaluation.provenance, config)
    answers = evaluation.score_probes(with_states=True)
    drift = drift_rows(model, evaluation.probes, baseline.by_prompt, answers.states, batch_size=config.batch_size)
    return evaluation.scores(state, answers, list(drift))


@exclusive
def measure_baseline(
    model: Model,
    requests: Sequence[EditRequest],
    config: EvaluationConfig = DEFAULTS,
    *,
    texts: Sequence[str] = (),
    references: References | None = None,
    chat: bool = False,
    joint: str | None = None,
) -> Baseline:
    """Measure the unedited model, with the states that edited models are compared with for KL and top1.

    Its scores have the state `before`; `baseline.scores.join(evaluate(model, requests, baseline=baseline))`, within
    `edited(...)`, is the complete result.

    Args:
        model: unedited.
        requests: the edits that will be made.
        config: how to measure, now and after the edits.
        texts: as in `evaluate`.
        references: as in `evaluate`.
        chat: as in `evaluate`.
        joint: as in `evaluate`.

    Raises:
        InputError: as `evaluate`.
    """
    requests = prompted(model.tokenizer, requests, chat=chat, joint=joint)
    evaluation = _Evaluation(model=model, requests=requests, config=config, texts=texts, references=references)
    answers = evaluation.score_probes(with_states=True)
    empty = torch.empty(0, model.d_model, dtype=torch.float32, device="cpu")
    states = torch.stack(list(answers.states.values())) if answers.states else empty
    return Baseline(scores=evaluation.scores("before", answers), prompts=tuple(answers.states), states=states)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Evaluation:
    """One evaluation: a model in one state, the requests and the settings."""

    model: Model
    requests: Sequence[EditRequest]
    config: EvaluationConfig
    texts: Sequence[str]
    references: References | None

    def __post_init__(self) -> None:
        check_cases(self.requests)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """The model as it is now, its part that no edit changes, and the input."""
        return evaluation_provenance(self.model, self.requests, self.texts, self.references)

    @cached_property
    def probes(self) -> list[ProbePrompt]:
        """All prompts that probe the requests."""
        return [probe for request in self.requests for probe in probe_prompts(request, plus=self.config.plus)]

    def score_probes(self, *, with_states: bool = False) -> Answers:
        """Score all pairs in one pass; with the states after neighborhood prompts if they will be compared."""
        pairs = (pair for probe in self.probes for pair in probe.pairs)
        neighbors = {probe.text for probe in self.probes if probe.kind in NEIGHBORS} if with_states else ()
        return score_pairs(self.model, pairs, state_prompts=neighbors, batch_size=self.config.batch_size)

    def scores(self, state: str, answers: Answers, drift: Sequence[ScoreRow] = ()) -> Scores:
        """All measures of this state, in one table."""
        rows: list[ScoreRow] = [
            row for probe in self.probes for row in likelihood_rows(probe, answers.scores, self.config)
        ]
        entropies, free_texts = generation_rows(self.model, self.requests, self.config)
        texts = [*greedy_answers(self.model, self.requests, self.config), *free_texts]
        written = pd.DataFrame(texts, columns=list(ANSWER_COLUMNS[:-1])).assign(state=state)
        consistency = reference_scores(written, self.requests, self.references) if self.references else []
        rows += [*drift, *entropies, *consistency, *text_loss_rows(self.model, self.texts, self.config)]
        return Scores(
            table=pd.DataFrame(rows, columns=list(TABLE_COLUMNS[:-1])).assign(state=state),
            answers=written,
            cases=tuple(request.id for request in self.requests),
            config=self.config,
            provenance={state: plain_copy(self.provenance)},
        )


def check_cases(requests: Sequence[EditRequest]) -> None:
    """Raise InputError when there are no requests, or two with one id."""
    if not requests:
        raise InputError("no edit requests were found, expected at least one; check the requests file")
    check_unique_ids((request.id for request in requests), "requests")


def evaluation_provenance(
    model: Model, requests: Sequence[EditRequest], texts: Sequence[str], references: References | None = None
) -> dict[str, Any]:
    """Provenance of scores: the model as it is now, its part that no edit changes, and the input."""
    count = sum(1 for text in texts if text.strip())
    return {
        **model.provenance(),
        "outer_hash": model.weights_hash(blocks=False),
        "requests": value_hash([request.plain() for request in requests]),
        "texts": {"hash": texts_hash(texts), "count": count} if len(texts) else None,
        "references": references.hash if references else None,
    }
