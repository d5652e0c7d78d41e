"""zsRE's measures: are the answer's tokens the likeliest, one after another? MEMIT Appendix C.1.

In: a model and edit requests. Out: `Scores`, one row per prompt and measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from mechedit.chat import prompted
from mechedit.data import EditRequest
from mechedit.evaluation.config import EvaluationConfig
from mechedit.evaluation.counterfact import check_cases, evaluation_provenance
from mechedit.evaluation.free_text import greedy_answers, text_loss_rows
from mechedit.evaluation.likelihood import Pair, TargetScore, score_pairs
from mechedit.evaluation.probe_prompts import ProbePrompt, ScoreRow, probe_prompts
from mechedit.evaluation.scores import ANSWER_COLUMNS, TABLE_COLUMNS, Scores
from mechedit.files import plain_copy
from mechedit.models import Model, exclusive

DEFAULTS = EvaluationConfig()

ACCURACY: Mapping[str, str] = {"rewrite": "efficacy", "paraphrase": "paraphrase", "neighborhood": "specificity"}
EXACT: Mapping[str, str] = {
    "rewrite": "exact_match",
    "paraphrase": "exact_match_paraphrase",
    "neighborhood": "exact_match_neighborhood",
}


@exclusive
def evaluate_zsre(
    model: Model,
    requests: Sequence[EditRequest],
    config: EvaluationConfig = DEFAULTS,
    state: str = "after",
    *,
    texts: Sequence[str] = (),
    chat: bool = False,
    joint: str | None = None,
) -> Scores:
    """Measure a model, as it is now, on edit requests by zsRE's protocol.

    For an answer o of T tokens after a prompt p, accuracy = 1/T · Σ_t 1[o_t = argmax P(· | p, o_1 … o_{t−1})]: each
    token is predicted from the true ones before it, as published, so an answer may count in part. `efficacy` and
    `paraphrase` take the new object after the edit's and the reworded prompts; `specificity` takes each neighbor's
    own answer after its prompt, as the published code does. It is not agreement with the unedited model: a
    model that does not know those answers scores low unedited, and an edit may also raise it. S is the harmonic mean
    of the three. `exact_match`, `exact_match_paraphrase` and `exact_match_neighborhood` are the strict forms: all
    tokens right, which is what greedy decoding then writes.

    The published code decodes an answer's tokens and encodes each again by itself, keeping the first id; with a
    tokenizer that puts a token in front of every text that id is never an answer's. Here an answer's tokens are those
    that it has behind its prompt.

    Args:
        model: the model; inside `edited(...)` its edited self.
        requests: the edits that were or will be made, such as `load_requests("zsre")`.
        config: how to measure; its settings for likelihoods, free text and CounterFact+ are not used.
        state: name of this model state in the table: before, after or now.
        texts: held-out documents for PPL.
        chat: ask each prompt as a user's question, through the tokenizer's chat template.
        joint: text between prompt and object where a request names none; by default the characters that meet decide.

    Raises:
        InputError: no requests, a repeated id, or a prompt that the model cannot take.
    """
    check_cases(requests)
    requests = prompted(model.tokenizer, requests, chat=chat, joint=joint)
    probes = [probe for request in requests for probe in probe_prompts(request, plus=False)]
    scores = score_pairs(model, map(_answer_pair, probes), batch_size=config.batch_size).scores
    rows = [row for probe in probes for row in _accuracy_rows(probe, scores)]
    rows += text_loss_rows(model, texts, config)
    answers = greedy_answers(model, requests, config)
    return Scores(
        table=pd.DataFrame(rows, columns=list(TABLE_COLUMNS[:-1])).assign(state=state),
        answers=pd.DataFrame(answers, columns=list(ANSWER_COLUMNS[:-1])).assign(state=state),
        cases=tuple(request.id for request in requests),
        config=config,
        provenance={state: plain_copy(evaluation_provenance(model, requests, texts))},
    )


def _answer_pair(probe: ProbePrompt) -> Pair:
    """The prompt and its answer: the new object; of a neighbor, its own object."""
    if probe.kind != "neighborhood":
        return probe.pair(probe.target_new)
    assert probe.target_true is not None, "a neighbor has an object"
    return probe.pair(probe.target_true)


def _accuracy_rows(probe: ProbePrompt, scores: Mapping[Pair, TargetScore]) -> Iterator[ScoreRow]:
    """Accuracy over the answer's tokens, and exact match, of one prompt."""
    score = scores[_answer_pair(probe)]
    name = (probe.kind, probe.index)
    yield probe.case, ACCURACY[probe.kind], *name, score.hits / score.tokens
    yield probe.case, EXACT[probe.kind], *name, float(score.greedy)
