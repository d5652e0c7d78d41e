"""Metrics: how well a run still says the object, read off its logits.

A metric maps `MetricInputs` to one number per row; several are read off one forward pass. In effects, `score`,
`corrupted` and `clean` are the metric's value in the restored, the corrupted and the clean run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.errors import InputError, brief
from mechedit.models import log_probabilities

NORMALIZED = "normalized_"
"""Prefix of a metric's name: the recovered part of the total effect, (score − corrupted) / (clean − corrupted)."""
_BRITISH = "normalised_"
"""The same prefix in option values and effects files of earlier versions."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MetricInputs:
    """What a metric may read; position i predicts the object's token i, given those before it."""

    logits: Float[Tensor, "row object vocab"]
    clean_runs: Float[Tensor, "fact object vocab"]
    """Logits of the clean run of every fact."""
    facts: Int[Tensor, " row"]
    """Index of each row's fact in `clean_runs`."""
    objects: Int[Tensor, "row object"]
    """Token ids of the object."""
    foils: Int[Tensor, " row"]
    """First token of the foil: the fact's own, else the clean run's likeliest first token that is not the object's."""

    @property
    def clean(self) -> Float[Tensor, "row object vocab"]:
        """Logits of the clean run of the same fact."""
        return self.clean_runs[self.facts]

    @property
    def log_probability(self) -> Float[Tensor, " row"]:
        """Σ log p(oᵢ | prompt, o<ᵢ), in nats."""
        log_probs = log_probabilities(self.logits.float())
        return log_probs.gather(2, self.objects[:, :, None])[:, :, 0].sum(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class ObjectInputs:
    """What the metrics read that ask for the object alone: `OF_OBJECT`."""

    log_probability: Float[Tensor, " row"]
    """Σ log p(oᵢ | prompt, o<ᵢ), in nats."""


Metric = Callable[[MetricInputs], Float[Tensor, " row"]]


def probability(inputs: MetricInputs | ObjectInputs) -> Float[Tensor, " row"]:
    """Joint probability of the object, Π p(oᵢ | prompt, o<ᵢ)."""
    return inputs.log_probability.exp()


def log_probability(inputs: MetricInputs | ObjectInputs) -> Float[Tensor, " row"]:
    """Joint log-probability of the object, in nats."""
    return inputs.log_probability


def logit_difference(inputs: MetricInputs) -> Float[Tensor, " row"]:
    """Logit of the object's first token minus that of the foil's (Zhang & Nanda 2024)."""
    first = inputs.logits[:, 0].float()
    tokens = torch.stack([inputs.objects[:, 0], inputs.foils], 1)
    logits = first.gather(1, tokens)
    return logits[:, 0] - logits[:, 1]


def kl(inputs: MetricInputs) -> Float[Tensor, " row"]:
    """KL(clean ‖ run) of the next-token distribution after the prompt, in nats: 0 when everything is restored."""
    clean, run = (log_probabilities(logits[:, 0].float()) for logits in (inputs.clean, inputs.logits))
    return (clean.exp() * (clean - run)).sum(-1)


METRICS: Mapping[str, Metric] = {
    "probability": probability,
    "log_probability": log_probability,
    "logit_difference": logit_difference,
    "kl": kl,
}
OF_OBJECT: Mapping[str, Callable[[ObjectInputs], Float[Tensor, " row"]]] = {
    "probability": probability,
    "log_probability": log_probability,
}
"""Metrics for which no other token's logit is needed."""


def metric_name(metric: str | Metric) -> str:
    """The name in the column `metric` of effects: a callable's own, or a name in its present spelling.

    Earlier versions wrote `normalised_` where `normalized_` is written now.
    """
    if not isinstance(metric, str):
        return getattr(metric, "__name__", type(metric).__name__)
    return NORMALIZED + metric.removeprefix(_BRITISH) if metric.startswith(_BRITISH) else metric


def are_of_object(metrics: Iterable[str | Metric]) -> bool:
    """Whether all of these metrics are among `OF_OBJECT`, normalized or not."""
    return all(
        isinstance(metric, str) and metric_name(metric).removeprefix(NORMALIZED) in OF_OBJECT for metric in metrics
    )


def find_metric(metric: str | Metric) -> Metric:
    """The function behind a name; a normalized metric is computed from the metric without the prefix.

    Raises:
        InputError: an unknown name.
    """
    if callable(metric):
        return metric
    base = metric_name(metric).removeprefix(NORMALIZED) if isinstance(metric, str) else None
    if base is None or base not in METRICS:
        raise InputError(
            f"the metric is {brief(metric)}, expected one of {', '.join(METRICS)}, one of them after {NORMALIZED!r}, "
            f"or a function of mechedit.trace.MetricInputs"
        )
    return METRICS[base]
