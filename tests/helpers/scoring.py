"""Requests to score, and one score computed naively."""

from __future__ import annotations

import torch

from mechedit.data import EditRequest, Neighbor
from mechedit.evaluation import EvaluationConfig
from mechedit.prompt_tokens import continuation_ids, encode

CONFIG = EvaluationConfig(generation_tokens=6, answer_tokens=3, resamples=200)
REQUESTS = [
    EditRequest(
        id="darrieux",
        subject="Danielle Darrieux",
        prompt="The mother tongue of {} is",
        target_new="English",
        target_true="French",
        paraphrases=("Danielle Darrieux, a native", "{} speaks the language"),
        neighbors=(Neighbor(prompt="The mother tongue of Leon Blum is", object="French"),),
        generations=("Danielle Darrieux's mother tongue is", "Danielle Darrieux was born in"),
    ),
    EditRequest(
        id="needle",
        subject="Space Needle",
        prompt="{} is in downtown",
        target_new="Northumbria",
        target_true="Seattle",
        neighbors=(
            Neighbor(prompt="LeBron James is in downtown", object="Seattle"),
            Neighbor(prompt="The Eiffel Tower is in downtown", object="Paris"),
        ),
    ),
    EditRequest(id="bare", subject="Apple A5", prompt="{} was created by", target_new="Microsoft"),
]


def naive(model, prompt, target):
    """Log P(target | prompt), one unpadded row per token, and whether greedy decoding says the target."""
    ids, _ = encode(model.tokenizer, prompt)
    total, greedy = 0.0, True
    for token in continuation_ids(model.tokenizer, target):
        with torch.no_grad():
            logits = model.hf(input_ids=torch.tensor([ids])).logits[0, -1]
        total += torch.log_softmax(logits.double(), -1)[token].item()
        greedy = greedy and logits.argmax().item() == token
        ids = [*ids, token]
    return total, greedy
