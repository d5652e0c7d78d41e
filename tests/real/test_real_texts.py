"""Texts of many scripts and forms under pretrained tokenizers: what is scored is what the model writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.languages import CHATML, FORMS

import mechedit as me
from analyses.real_models.make import is_made
from mechedit.chat import prompted
from mechedit.data.joint import following
from mechedit.evaluation import score_targets
from mechedit.prompt_tokens import encode, tokenize_prompt

pytestmark = pytest.mark.real
STEPS = 4


@pytest.fixture(scope="module", params=["gemma3", "smollm2"])
def model(request: pytest.FixtureRequest, load_real: Callable[[str], me.Model]) -> me.Model:
    if not is_made(request.param):
        pytest.skip(f"{request.param} is not made: run `make real` with a network")
    return load_real(request.param)


@torch.no_grad()
def words(model: me.Model, ids: list[int]) -> tuple[list[int], float]:
    """The next tokens that the model writes greedily, up to the last that ends text, and their log P."""
    written: list[int] = []
    steps: list[float] = []
    for _ in range(STEPS):
        log_probs = model.hf(torch.tensor([[*ids, *written]]), logits_to_keep=1).logits[0, -1].double().log_softmax(-1)
        written.append(int(log_probs.argmax()))
        steps.append(log_probs.max().item())
    # A character whose bytes are not all written is no text yet.
    while written and (not model.tokenizer.decode(written[-1:]).strip() or "�" in model.tokenizer.decode(written)):
        written.pop()
        steps.pop()
    return written, sum(steps)


def test_the_models_own_words_are_exact_matches(model: me.Model) -> None:
    """Continuations that go on within a word, or that re-tokenize otherwise, are counted: no prompt ends so."""
    scored, within_a_word, not_round_trip = 0, 0, 0
    prompts = [form.prompt.replace("{}", form.pairs[0][0]) for form in FORMS.values()]
    for prompt in [*prompts, CHATML.replace("{}", "What is the capital of France?")]:
        ids, _ = encode(model.tokenizer, prompt)
        written, log_prob = words(model, ids)
        text = model.tokenizer.decode([*ids, *written])[len(model.tokenizer.decode(ids)) :]
        if not text.strip():
            continue
        if following(prompt, text) != text.rstrip():
            within_a_word += 1
        elif encode(model.tokenizer, prompt + text)[0] != [*ids, *written]:
            not_round_trip += 1
        else:
            score = score_targets(model, [(prompt, text)])[prompt, text]
            assert score.greedy
            assert score.log_prob == pytest.approx(log_prob, abs=1e-4)
            scored += 1
    assert scored >= 0.8 * len(prompts)
    assert within_a_word + not_round_trip <= 0.2 * len(prompts)


def test_subjects_are_found_in_every_form(model: me.Model) -> None:
    for form in FORMS.values():
        for subject, _ in form.pairs:
            prompt = tokenize_prompt(model.tokenizer, form.prompt, subject)
            assert subject in model.tokenizer.decode([prompt.ids[i] for i in prompt.subject])


def test_a_chat_is_asked_in_the_models_own_template(model: me.Model) -> None:
    if not model.tokenizer.chat_template:
        pytest.skip("this checkpoint has no chat template")
    request = me.EditRequest(id="1", subject="France", prompt="What is the capital of {}?", target_new="Rome")
    (asked,) = prompted(model.tokenizer, [request], chat=True)
    rendered = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert asked.text == rendered
    ids, _ = encode(model.tokenizer, asked.text)
    assert ids == model.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    written, log_prob = words(model, ids)
    text = model.tokenizer.decode(written)
    score = score_targets(model, [(asked.text, text)], joint=asked.joint)[asked.text, text]
    assert score.greedy
    assert score.log_prob == pytest.approx(log_prob, abs=1e-4)
