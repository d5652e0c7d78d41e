"""zsRE's measures: are the answer's tokens the likeliest, one after another? MEMIT Appendix C.1.

In: a model and edit requests. Out: `Scores`, one row a prompt and measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from mechedit.data import EditRequest
from mechedit.evaluation.config import EvaluationConfig
from mechedit.evaluation.counterfact import asked_of, check_asked
from mechedit.evaluation.free_text import greedy_answers, surprise_rows
from mechedit.evaluation.likelihood import Pair, TargetScore, score_targets
from mechedit.evaluation.prompts import Question, Row, ask
from mechedit.evaluation.scores import ANSWER_COLUMNS, TABLE_COLUMNS, Scores
from mechedit.files import plain_copy
from mechedit.models import Model

DEFAULTS = EvaluationConfig()

ACCURACY: Mapping[str, str] = {"rewrite": "efficacy", "paraphrase": "paraphrase", "neighborhood": "specificity"}
EXACT: Mapping[str, str] = {
    "rewrite": "exact_match",
    "paraphrase": "exact_match_paraphrase",
    "neighborhood": "exact_match_neighborhood",
}


def evaluate_zsre(
    model: Model,
    requests: Sequence[EditRequest],
    config: EvaluationConfig = DEFAULTS,
    state: str = "after",
    *,
    texts: Sequence[str] = (),
) -> Scores:
    """Measure a model, as it is now, on edit requests by zsRE's protocol.

    For an answer o of T tokens after a prompt p, accuracy = 1/T · Σ_t 1[o_t = argmax P(· | p, o_1 … o_{t−1})]: each
    token is asked for with the true ones before it, as published, so an answer may count in part. `efficacy` and
    `paraphrase` ask for the new object after the edit's and the reworded prompts; `specificity` asks for each
    neighbor's own answer after its prompt, as the published code does. It is not agreement with the unedited model: a
    model that does not know those answers scores low unedited, and an edit may also raise it. S is the harmonic mean
    of the three. `exact_match`, `exact_match_paraphrase` and `exact_match_neighborhood` are the strict forms: all
    tokens right, which is what greedy decoding then writes.

    The published code decodes an answer's tokens and encodes each again by itself, keeping the first id; with a
    tokenizer that puts a token in front of every text that id is never an answer's. Here ids are joined as ids.

    Args:
        model: the model; inside `edited(...)` its edited self.
        requests: the edits that were or will be made, such as `load_requests("zsre")`.
        config: how to measure; what concerns likelihoods, free text and CounterFact+ is not used.
        state: name of this model state in the table: before, after or now.
        texts: held-out documents for PPL.

    Raises:
        InputError: no requests, a repeated id, or a prompt that the model cannot take.
    """
    check_asked(requests)
    asked = [question for request in requests for question in ask(request, plus=False)]
    scores = score_targets(model, map(_pair, asked), batch_size=config.batch_size)
    rows = [row for question in asked for row in _measure(question, scores)]
    rows += surprise_rows(model, texts, config)
    said = greedy_answers(model, requests, config)
    return Scores(
        table=pd.DataFrame(rows, columns=list(TABLE_COLUMNS[:-1])).assign(state=state),
        answers=pd.DataFrame(said, columns=list(ANSWER_COLUMNS[:-1])).assign(state=state),
        cases=tuple(request.id for request in requests),
        config=config,
        provenance={state: plain_copy(asked_of(model, requests, texts))},
    )


def _pair(question: Question) -> Pair:
    """A prompt and its answer: the new object, for a neighbor its own."""
    if question.kind != "neighborhood":
        return question.text, question.new
    assert question.true is not None, "a neighbor has an object"
    return question.text, question.true


def _measure(question: Question, scores: Mapping[Pair, TargetScore]) -> Iterator[Row]:
    """Rows of one prompt."""
    score = scores[_pair(question)]
    name = (question.kind, question.prompt)
    yield question.case, ACCURACY[question.kind], *name, score.hits / score.tokens
    yield question.case, EXACT[question.kind], *name, float(score.greedy)
