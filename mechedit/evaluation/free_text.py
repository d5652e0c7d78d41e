"""What is measured on running text: what the model writes about each request, and how well it predicts others' text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechedit.data import EditRequest
from mechedit.errors import InputError
from mechedit.evaluation.config import EvaluationConfig
from mechedit.evaluation.generation import generate, ngram_entropy, uniform_draws
from mechedit.evaluation.measures import TEXT_MEASURES
from mechedit.evaluation.perplexity import surprises
from mechedit.evaluation.prompts import Row, filled
from mechedit.models import Model

AnswerRow = tuple[str, str, int, str, str, str]
"""case, kind, prompt, question, expected, answer."""


def write_freely(
    model: Model, requests: Sequence[EditRequest], config: EvaluationConfig
) -> tuple[list[Row], list[AnswerRow]]:
    """GE of every generation prompt, and the texts."""
    wanted = config.generation_prompts
    asked = [(r, i, filled(text, r)) for r in requests for i, text in enumerate(r.generations[:wanted])]
    if not asked or not config.generation_tokens:
        return [], []
    prompts = [prompt for *_, prompt in asked]
    uniform = uniform_draws(config.seed, [f"{r.id}/{i}" for r, i, _ in asked], config.generation_tokens)
    texts = generate(
        model,
        prompts,
        tokens=config.generation_tokens,
        top_k=config.top_k,
        uniform=uniform,
        batch_size=config.batch_size,
    )
    measured, answers = [], []
    for (request, index, prompt), text in zip(asked, texts, strict=True):
        entropy = ngram_entropy(prompt + text, config.entropy)
        measured.append((request.id, "GE", "generation", index, entropy))
        answers.append((request.id, "generation", index, prompt, request.target_new, text))
    return measured, answers


def greedy_answers(model: Model, requests: Sequence[EditRequest], config: EvaluationConfig) -> list[AnswerRow]:
    """Greedy answers to the rewrite prompts, kept as examples."""
    if not config.answer_tokens:
        return []
    prompts = [request.text for request in requests]
    texts = generate(model, prompts, tokens=config.answer_tokens, batch_size=config.batch_size)
    return [
        (request.id, "rewrite", 0, request.text, request.target_new, text)
        for request, text in zip(requests, texts, strict=True)
    ]


def surprise_rows(model: Model, texts: Sequence[str], config: EvaluationConfig) -> list[Row]:
    """NLL and number of predicted tokens of each held-out text, in a case of no name; texts below two tokens have none.

    Raises:
        InputError: no text has two tokens, or the model's perplexity is not finite.
    """
    if not len(texts):
        return []
    losses, tokens = surprises(model, texts, max_length=config.text_tokens)
    with np.errstate(over="ignore"):
        found = np.exp(losses.sum() / tokens.sum())
    if not np.isfinite(found):
        raise InputError(
            f"the perplexity of the {len(texts)} texts is {found}, expected a finite number: the model no longer "
            f"predicts text, check its weights and the edit, or leave the texts out"
        )
    return [
        ("", measure, "text", place, float(value))
        for place, values in enumerate(zip(losses, tokens, strict=True))
        if values[1]
        for measure, value in zip(TEXT_MEASURES, values, strict=True)
    ]
