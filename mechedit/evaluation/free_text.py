"""Scores of running text: text that the model writes about each request, and held-out text that it predicts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechedit.data import EditRequest
from mechedit.errors import InputError
from mechedit.evaluation.config import EvaluationConfig
from mechedit.evaluation.generation import generate, ngram_entropy, uniform_draws
from mechedit.evaluation.measures import TEXT_MEASURES
from mechedit.evaluation.perplexity import text_losses
from mechedit.evaluation.probe_prompts import ScoreRow, prompt_text
from mechedit.models import Model

AnswerRow = tuple[str, str, int, str, str, str]
"""case, kind, prompt, question, expected, answer."""


def generation_rows(
    model: Model, requests: Sequence[EditRequest], config: EvaluationConfig
) -> tuple[list[ScoreRow], list[AnswerRow]]:
    """Sample a text after every generation prompt: its GE, and the text itself."""
    prompts = [
        (request, index, prompt_text(text, request))
        for request in requests
        for index, text in enumerate(request.generations[: config.generation_prompts])
    ]
    if not prompts or not config.generation_tokens:
        return [], []
    names = [f"{request.id}/{index}" for request, index, _ in prompts]
    texts = generate(
        model,
        [prompt for *_, prompt in prompts],
        tokens=config.generation_tokens,
        top_k=config.top_k,
        uniform=uniform_draws(config.seed, names, config.generation_tokens),
        stop_words=config.stop_words,
        batch_size=config.batch_size,
        with_prompt=config.free_text == "published",
        ends=config.free_text == "natural",
    )
    rows, answers = [], []
    for (request, index, prompt), text in zip(prompts, texts, strict=True):
        entropy = ngram_entropy(prompt + text, config.entropy, config.words)
        rows.append((request.id, "GE", "generation", index, entropy))
        answers.append((request.id, "generation", index, prompt, request.target_new, text))
    return rows, answers


def greedy_answers(model: Model, requests: Sequence[EditRequest], config: EvaluationConfig) -> list[AnswerRow]:
    """Greedy continuations of the rewrite prompts, as examples for readers."""
    if not config.answer_tokens:
        return []
    prompts = [request.text for request in requests]
    texts = generate(model, prompts, tokens=config.answer_tokens, batch_size=config.batch_size)
    return [
        (request.id, "rewrite", 0, request.text, request.target_new, text)
        for request, text in zip(requests, texts, strict=True)
    ]


def text_loss_rows(model: Model, texts: Sequence[str], config: EvaluationConfig) -> list[ScoreRow]:
    """NLL and number of predicted tokens of each held-out text, from which PPL follows.

    Their case is "", because a text belongs to no request. Texts of fewer than two tokens have no rows.

    Raises:
        InputError: no text has two tokens, or the model's perplexity is not finite.
    """
    if not len(texts):
        return []
    losses, tokens = text_losses(model, texts, max_length=config.text_tokens)
    with np.errstate(over="ignore"):
        perplexity = np.exp(losses.sum() / tokens.sum())
    if not np.isfinite(perplexity):
        raise InputError(
            f"the perplexity of the {len(texts)} texts is {perplexity}, expected a finite number: the model no longer "
            f"predicts text, check its weights and the edit, or leave the texts out"
        )
    return [
        ("", measure, "text", index, float(value))
        for index, values in enumerate(zip(losses, tokens, strict=True))
        if values[1]
        for measure, value in zip(TEXT_MEASURES, values, strict=True)
    ]
