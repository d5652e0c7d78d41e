"""How far an edit moves next-token distributions that it should leave alone: KL and agreement with the unedited model.

Unlike NS, which compares two objects, these measures compare the whole next-token distribution after each neighborhood
prompt, and needs no true object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechedit.batching import batches_of
from mechedit.evaluation.probe_prompts import Kind, ProbePrompt, ScoreRow
from mechedit.models import Model, exclusive

DIVERGENCE: Mapping[Kind, str] = {"neighborhood": "KL", "neighborhood_plus": "KL+"}
AGREEMENT: Mapping[Kind, str] = {"neighborhood": "top1", "neighborhood_plus": "top1+"}

States = Mapping[str, Float[Tensor, " d_model"]]
"""Residual state after the last block at each prompt's last token."""


@exclusive
def drift_rows(
    model: Model, probes: Sequence[ProbePrompt], before: States, after: States, *, batch_size: int = 64
) -> Iterator[ScoreRow]:
    """KL and top-1 agreement of the edited with the unedited model after every neighborhood prompt.

    KL and top1 compare the two models on the neighborhood prompt; KL+ and top1+ compare them on the same
    prompt behind the edit's sentence, so what the sentence does to the unedited model does not count.

    Args:
        model: its final norm and unembedding must be those of both models (`Baseline.check` sees to it).
        probes: of all requests; only those about neighbors count.
        before: states of the unedited model.
        after: states of the edited model.
        batch_size: prompts whose logits are computed at once.
    """
    neighbors = [probe for probe in probes if probe.kind in DIVERGENCE]
    texts = list(dict.fromkeys(probe.text for probe in neighbors))
    by_text: dict[str, tuple[float, float]] = {}
    for chunk in batches_of(texts, batch_size):
        logits = [model.unembed(torch.stack([states[text] for text in chunk])) for states in (before, after)]
        divergences, agreements = divergence(logits[0], logits[1]), same_argmax(logits[0], logits[1])
        pairs = zip(divergences.tolist(), agreements.double().tolist(), strict=True)
        by_text.update(zip(chunk, pairs, strict=True))
    for probe in neighbors:
        kl, agreement = by_text[probe.text]
        yield probe.case, DIVERGENCE[probe.kind], probe.kind, probe.index, kl
        yield probe.case, AGREEMENT[probe.kind], probe.kind, probe.index, agreement


def divergence(unedited: Float[Tensor, "row vocab"], edited: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
    """KL(P ‖ P*) = Σ P(token) · log(P(token) / P*(token)) of next-token distributions, in nats.

    P is the unedited model's, P* the edited one's (Hoelscher-Obermaier et al. 2023, NKL). The code published with
    that paper computes the other direction and divides by the size of the vocabulary, so its figures are of
    another order.
    """
    before, after = (logits.double().log_softmax(-1) for logits in (unedited, edited))
    # Rounding may leave a sum of equal distributions a hair below 0.
    return (before.exp() * (before - after)).sum(-1).clamp(min=0)


def same_argmax(unedited: Float[Tensor, "row vocab"], edited: Float[Tensor, "row vocab"]) -> Bool[Tensor, " row"]:
    """Whether the likeliest next token is the same in both models."""
    return unedited.argmax(-1) == edited.argmax(-1)
