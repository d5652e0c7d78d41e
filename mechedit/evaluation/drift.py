"""How far an edit moves what the model would say where it should not: against the unedited model's own answers.

Unlike NS, which looks at two objects, this looks at the whole next-token distribution after each neighborhood
prompt, and needs no true object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechedit.evaluation.prompts import Kind, Question, Row
from mechedit.models import Model

DIVERGENCE: Mapping[Kind, str] = {"neighborhood": "KL", "neighborhood_plus": "KL+"}
AGREEMENT: Mapping[Kind, str] = {"neighborhood": "top1", "neighborhood_plus": "top1+"}

States = Mapping[str, Float[Tensor, " d_model"]]
"""Of each prompt, the residual state after the last block at its last token."""


def drift(
    model: Model, questions: Sequence[Question], before: States, after: States, *, batch_size: int = 64
) -> Iterator[Row]:
    """Rows of KL and top-1 agreement of every neighborhood question.

    KL and top1 compare the two models on the neighborhood prompt; KL+ and top1+ compare them on the same
    prompt behind the edit's sentence, so what the sentence does to the unedited model does not count.

    Args:
        model: its final norm and unembedding must be those of both models (`Baseline.check` sees to it).
        questions: of all requests; those about neighbors are looked at.
        before: of the unedited model.
        after: of the edited one.
        batch_size: prompts whose logits are held at once.
    """
    asked = [question for question in questions if question.kind in DIVERGENCE]
    texts = list(dict.fromkeys(question.text for question in asked))
    found: dict[str, tuple[float, float]] = {}
    for start in range(0, len(texts), batch_size):
        chunk = texts[start : start + batch_size]
        logits = [model.unembed(torch.stack([states[text] for text in chunk])) for states in (before, after)]
        divergences, agreements = divergence(logits[0], logits[1]), same_top(logits[0], logits[1])
        pairs = zip(divergences.tolist(), agreements.double().tolist(), strict=True)
        found.update(zip(chunk, pairs, strict=True))
    for question in asked:
        kl, agreement = found[question.text]
        yield question.case, DIVERGENCE[question.kind], question.kind, question.prompt, kl
        yield question.case, AGREEMENT[question.kind], question.kind, question.prompt, agreement


def divergence(unedited: Float[Tensor, "row vocab"], edited: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
    """KL(P ‖ P*) = Σ P(token) · log(P(token) / P*(token)) of next-token distributions, in nats.

    P is the unedited model's, P* the edited one's (Hoelscher-Obermaier et al. 2023, NKL). The code published with
    that paper computes the other direction and divides by the size of the vocabulary, so its figures are of
    another order.
    """
    before, after = (logits.double().log_softmax(-1) for logits in (unedited, edited))
    # Rounding may leave a sum of equal distributions a hair below 0.
    return (before.exp() * (before - after)).sum(-1).clamp(min=0)


def same_top(unedited: Float[Tensor, "row vocab"], edited: Float[Tensor, "row vocab"]) -> Bool[Tensor, " row"]:
    """Whether both models find the same next token likeliest."""
    return unedited.argmax(-1) == edited.argmax(-1)
