"""Perplexity: the exponential of transformers' own loss, whatever runs together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mechedit.errors import InputError
from mechedit.evaluation import perplexity

TEXTS = [
    "Toko Yasuda plays the instrument guitar, while Miles Davis plays the trumpet.",
    "The mother tongue of Leon Blum is French.",
    "Apple",
    "",
    "The Eiffel Tower is located in the city of Paris, and the Space Needle is in downtown Seattle.",
]


def naive(model: Any, texts: list[str], limit: int = 64) -> float:
    """One text at a time, one token at a time, from the full distribution."""
    total, count = 0.0, 0
    for text in texts:
        ids = model.tokenizer(text)["input_ids"][:limit]
        if len(ids) > 1:
            with torch.no_grad():
                logs = model.hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            total -= sum(float(logs[place, token]) for place, token in enumerate(ids[1:]))
            count += len(ids) - 1
    return math.exp(total / count)


def test_it_is_a_naive_loop_over_tokens(small_model: Any) -> None:
    assert perplexity(small_model, TEXTS) == pytest.approx(naive(small_model, TEXTS), rel=1e-5)
    assert perplexity(small_model, TEXTS, max_length=5) == pytest.approx(naive(small_model, TEXTS, 5), rel=1e-5)
    assert naive(small_model, TEXTS, 5) != pytest.approx(naive(small_model, TEXTS), rel=1e-2)


def test_it_is_the_exponential_of_transformers_own_loss(family_model: Any) -> None:
    text = TEXTS[0]
    ids = torch.tensor([family_model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = family_model.hf(ids, labels=ids).loss
    assert perplexity(family_model, [text]) == pytest.approx(float(loss.double().exp()), rel=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_it_does_not_depend_on_what_runs_together(lens_model: Any, batch_tokens: int) -> None:
    found = perplexity(lens_model, TEXTS[::-1], batch_tokens=batch_tokens)
    assert found == pytest.approx(perplexity(lens_model, TEXTS), rel=1e-6)


def test_a_model_that_knows_nothing_is_as_good_as_a_draw(lens_model: Any) -> None:
    with torch.no_grad():
        for name, parameter in lens_model.hf.named_parameters():
            if "ln_f" in name:
                parameter.zero_()
    assert perplexity(lens_model, TEXTS) == pytest.approx(lens_model.hf.config.vocab_size, rel=1e-5)


def test_a_broken_model_has_none(lens_model: Any) -> None:
    with torch.no_grad():
        lens_model.down_projection(1).fill_(torch.nan)
    assert math.isnan(perplexity(lens_model, TEXTS))


@pytest.mark.parametrize(("texts", "options"), [([], {}), (["", "   "[:0]], {}), (TEXTS, {"max_length": 1})])
def test_nothing_to_predict_is_refused(lens_model: Any, texts: list[str], options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected"):
        perplexity(lens_model, texts, **options)
