"""What is read off the logits: how well a run still says the object.

A metric maps `Answers` to one number a row; several are read off one forward pass. In `effects`, `score`,
`corrupted` and `clean` are the metric's value in the restored, the corrupted and the clean run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.errors import InputError

NORMALIZED = "normalized_"
"""Before a metric's name: the share of the total effect won back, (score − corrupted) / (clean − corrupted)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """What a metric may look at; position i predicts the object's token i, given those before it."""

    logits: Float[Tensor, "row object vocab"]
    clean_runs: Float[Tensor, "fact object vocab"]
    """Logits of the clean run of every fact."""
    facts: Int[Tensor, " row"]
    """The fact of each row."""
    objects: Int[Tensor, "row object"]
    foils: Int[Tensor, " row"]
    """First token of the foil: the fact's own, else the clean run's likeliest first token that is not the object's."""

    @property
    def clean(self) -> Float[Tensor, "row object vocab"]:
        """Logits of the clean run of the same fact."""
        return self.clean_runs[self.facts]

    @property
    def log_probability(self) -> Float[Tensor, " row"]:
        """Σ log p(oᵢ | prompt, o<ᵢ), in nats."""
        return self.logits.float().log_softmax(-1).gather(2, self.objects[:, :, None])[:, :, 0].sum(1)


Metric = Callable[[Answers], Float[Tensor, " row"]]


def probability(answers: Answers) -> Float[Tensor, " row"]:
    """Joint probability of the object, Π p(oᵢ | prompt, o<ᵢ)."""
    return answers.log_probability.exp()


def log_probability(answers: Answers) -> Float[Tensor, " row"]:
    """Joint log-probability of the object, in nats."""
    return answers.log_probability


def logit_difference(answers: Answers) -> Float[Tensor, " row"]:
    """Logit of the object's first token minus that of the foil's (Zhang & Nanda 2024)."""
    first = answers.logits[:, 0].float()
    wanted = torch.stack([answers.objects[:, 0], answers.foils], 1)
    chosen = first.gather(1, wanted)
    return chosen[:, 0] - chosen[:, 1]


def kl(answers: Answers) -> Float[Tensor, " row"]:
    """KL(clean ‖ run) of the next-token distribution after the prompt, in nats: 0 when all is restored."""
    clean, run = (logits[:, 0].float().log_softmax(-1) for logits in (answers.clean, answers.logits))
    return (clean.exp() * (clean - run)).sum(-1)


METRICS: Mapping[str, Metric] = {
    "probability": probability,
    "log_probability": log_probability,
    "logit_difference": logit_difference,
    "kl": kl,
}


def metric_name(metric: str | Metric) -> str:
    """What stands in `effects.metric`: a name, or a callable's own."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def find_metric(metric: str | Metric) -> Metric:
    """The function behind a name; a normalized metric is computed from the plain one.

    Raises:
        InputError: an unknown name.
    """
    if not isinstance(metric, str):
        return metric
    plain = metric.removeprefix(NORMALIZED)
    if plain not in METRICS:
        raise InputError(
            f"the metric is {metric!r}, expected one of {', '.join(METRICS)}, one of them after {NORMALIZED!r}, "
            f"or a function of mechedit.trace.Answers"
        )
    return METRICS[plain]
