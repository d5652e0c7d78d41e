"""Perplexity: the exponential of transformers' own loss, whatever runs together."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.scoring import REQUESTS

from mechedit.errors import InputError
from mechedit.evaluation import QUICK, Scores, evaluate, perplexity
from mechedit.evaluation.free_text import text_loss_rows

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
        lens_model.projection(1).fill_(torch.nan)
    assert math.isnan(perplexity(lens_model, TEXTS))


@pytest.mark.parametrize(("texts", "options"), [([], {}), (["", "   "[:0]], {}), (TEXTS, {"max_length": 1})])
def test_nothing_to_predict_is_refused(lens_model: Any, texts: list[str], options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected"):
        perplexity(lens_model, texts, **options)


def test_it_is_a_measure_with_an_interval_over_texts(lens_model: Any) -> None:
    scores = evaluate(lens_model, REQUESTS, QUICK, texts=TEXTS)
    rows = scores.table[scores.table["kind"] == "text"]
    # Two of the five texts have fewer than two tokens or none at all.
    assert set(rows["case"]) == {""}
    long = [place for place, text in enumerate(TEXTS) if len(lens_model.tokenizer(text)["input_ids"]) > 1]
    assert sorted(set(rows["prompt"])) == long != list(range(len(TEXTS)))
    wide = rows.pivot(index="prompt", columns="measure", values="value")
    for place in long:
        assert math.exp(wide["NLL"][place] / wide["tokens"][place]) == pytest.approx(
            naive(lens_model, [TEXTS[place]]), rel=1e-4
        )
    found = scores.summary()["PPL"]
    assert found["mean"] == pytest.approx(perplexity(lens_model, TEXTS), rel=1e-6)  # as it is, not × 100
    assert found["n"] == len(long)
    assert found["low"] < found["mean"] < found["high"]
    alone = [naive(lens_model, [TEXTS[place]]) for place in long]
    assert min(alone) * 0.999 < found["low"]
    assert found["high"] < max(alone) * 1.001
    assert scores.protocol["texts"]["count"] == 4  # that are not blank
    # Texts are no cases.
    assert scores.summary()["ES"]["n"] == 2
    assert "PPL" not in scores.counts
    assert "PPL" not in evaluate(lens_model, REQUESTS, QUICK).summary()


def test_perplexity_from_the_table_by_hand() -> None:
    # Two texts, of 3 tokens at 2 nats each and of 1 token at 6: Σ NLL / Σ tokens = 12 / 4 = 3 nats. The mean of
    # the texts' own perplexities would be (e² + e⁶) / 2. Resamples are aa, ab, ba and bb: e², e³, e³ and e⁶.
    rows = [("", "NLL", "text", 0, 6.0), ("", "tokens", "text", 0, 3.0)]
    rows += [("", "NLL", "text", 1, 6.0), ("", "tokens", "text", 1, 1.0)]
    table = pd.DataFrame(rows, columns=["case", "measure", "kind", "prompt", "value"]).assign(state="after")
    answers = pd.DataFrame(columns=["case", "kind", "prompt", "question", "expected", "answer", "state"])
    found = Scores(table=table, answers=answers, cases=("a",), provenance={"after": {}}).summary()
    expected = {"mean": math.exp(3), "low": math.exp(2), "high": math.exp(6), "n": 2}
    assert found == {"PPL": {name: pytest.approx(value) for name, value in expected.items()}}


def test_texts_are_cut_and_a_model_that_broke_has_no_score(lens_model: Any) -> None:
    cut = evaluate(lens_model, REQUESTS, replace(QUICK, text_tokens=5), texts=TEXTS).summary()["PPL"]["mean"]
    assert cut == pytest.approx(naive(lens_model, TEXTS, 5), rel=1e-4)
    with pytest.raises(InputError, match="two tokens"):
        evaluate(lens_model, REQUESTS, QUICK, texts=["", "Apple"[:1]])
    with torch.no_grad():
        lens_model.projection(1).fill_(torch.nan)
    with pytest.raises(InputError, match="perplexity of the 5 texts is nan"):
        text_loss_rows(lens_model, TEXTS, QUICK)
