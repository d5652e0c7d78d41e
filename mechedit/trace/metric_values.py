"""Metrics of the rows of a trace's runs, and what each reads of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.errors import InputError
from mechedit.models import Model, Readout, Run
from mechedit.trace.config import TraceConfig
from mechedit.trace.metrics import (
    NORMALIZED,
    OF_OBJECT,
    MetricInputs,
    ObjectInputs,
    are_of_object,
    find_metric,
    metric_name,
)
from mechedit.trace.traced_fact import TracedFact

MetricValues = dict[str, Float[Tensor, " row"]]
"""Metric name → one number per row."""


def metric_values(
    run: Run,
    clean: Run,
    facts: Int[Tensor, " row"],
    group: Sequence[TracedFact],
    foils: Int[Tensor, " fact"],
    config: TraceConfig,
) -> MetricValues:
    """Every metric of a run's rows, before normalization; row i belongs to the fact `group[facts[i]]`."""
    return metrics_of(metric_inputs(run, clean, facts, group, foils), config)


def metrics_of(inputs: MetricInputs, config: TraceConfig) -> MetricValues:
    """Every metric of some rows, before normalization."""
    metrics = {metric_name(metric).removeprefix(NORMALIZED): metric for metric in config.metrics}
    return {name: checked_values(name, find_metric(metric)(inputs), inputs) for name, metric in metrics.items()}


def checked_values(name: str, values: Any, inputs: MetricInputs) -> Float[Tensor, " row"]:
    """What a metric, which may be the user's own function, gives for some rows.

    Raises:
        InputError: it is no tensor of one floating-point number per row.
    """
    count = len(inputs.facts)
    if not isinstance(values, Tensor):
        what = f"a {type(values).__name__}"
    elif values.shape != (count,) or not values.is_floating_point():
        what = f"a tensor of shape {tuple(values.shape)} and dtype {str(values.dtype).removeprefix('torch.')}"
    else:
        return values
    raise InputError(
        f"the metric {name!r} gives {what} for {count} rows, expected a tensor of {count} floating-point numbers; end "
        f"the function with one number for each row, such as .float()"
    )


def metrics_of_object(inputs: ObjectInputs, config: TraceConfig) -> MetricValues:
    """As `metrics_of`, where all metrics are of the object alone."""
    names = dict.fromkeys(metric_name(metric).removeprefix(NORMALIZED) for metric in config.metrics)
    return {name: OF_OBJECT[name](inputs) for name in names}


def object_inputs(run: Run, readout: Readout, facts: Int[Tensor, " row"], group: Sequence[TracedFact]) -> ObjectInputs:
    """What metrics of the object alone read, of a run that ended before the unembedding."""
    objects = torch.tensor([traced.object_ids for traced in group], device=facts.device)[facts]
    log_probs = readout.score(run.head_inputs.flatten(0, 1), objects.flatten()).log_prob
    return ObjectInputs(log_probability=log_probs.view(objects.shape).sum(1))


def find_trace_readout(model: Model, config: TraceConfig) -> Readout | None:
    """What reads a trace's metrics off the states before the unembedding; None where they need all logits."""
    if not are_of_object(config.metrics):
        return None
    readout = model.readout()
    return readout if isinstance(readout, Readout) else None


def metric_inputs(
    run: Run, clean: Run, facts: Int[Tensor, " row"], group: Sequence[TracedFact], foils: Int[Tensor, " fact"]
) -> MetricInputs:
    """What metrics of a run's rows read; row i belongs to the fact `group[facts[i]]`."""
    objects = torch.tensor([traced.object_ids for traced in group], device=facts.device)
    return MetricInputs(
        logits=run.logits, clean_runs=clean.logits, facts=facts, objects=objects[facts], foils=foils[facts]
    )
