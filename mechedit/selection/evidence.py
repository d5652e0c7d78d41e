"""The evidence by layer: means over facts with bootstrap intervals, and what one MLP's cut alone takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mechedit.selection.bootstrap import Vote
from mechedit.selection.config import SelectConfig
from mechedit.selection.curves import Draws, Grid, SubjectEffects, contribution
from mechedit.statistics import bootstrap_means, percentile_interval


def resample(subject: SubjectEffects, config: SelectConfig) -> dict[str, Draws]:
    """Means of every grid over bootstrap resamples of the facts, the same resamples for all."""
    grids = {
        "state": subject.state,
        "mlp_severed": subject.mlp_severed,
        "attn_severed": subject.attn_severed,
        "mlp_window": subject.window,
        "ablation": ablation(subject)[0] if subject.alone else None,
    }
    found = {name: grid for name, grid in grids.items() if grid is not None}
    means = bootstrap_means(np.hstack(list(found.values())), seed=config.seed, resamples=config.resamples)
    draws = dict(zip(found, np.split(means, len(found), axis=1), strict=True))
    draws["gap"] = draws["state"] - draws["mlp_severed"]
    draws["contribution"] = contribution(draws["gap"])
    return draws


def ablation(
    subject: SubjectEffects,
) -> tuple[Grid, dict[int, int]]:
    """What severing one layer's MLP alone takes from the state below it.

    a(L) = IE(l) − IE_mlp@L-severed(l), with l the layer below L at which the mean gap is largest (of those traced
    with that severing): from there the MLPs above do most. NaN for layers without such rows.

    Returns:
        a, and the restored layer l of each L.
    """
    lost, restored = np.full_like(subject.state, np.nan), {}
    gap = subject.gap.mean(0)
    for layer, severed in subject.alone.items():
        below = sorted(other for other in severed if other < layer)
        if below and layer < subject.n_layers:
            place = restored[layer] = below[int(gap[below].argmax())]
            lost[:, layer] = subject.state[:, place] - severed[place]
    return lost, restored


def evidence(
    subject: SubjectEffects, draws: Mapping[str, Draws], chosen: Vote, config: SelectConfig
) -> list[dict[str, Any]]:
    """One record a layer: means with intervals over facts, and how often resamples include the layer."""
    lost, restored = ablation(subject)
    grids = {
        "state": subject.state,
        "mlp_severed": subject.mlp_severed,
        "attn_severed": subject.attn_severed,
        "gap": subject.gap,
        "contribution": contribution(subject.gap),
        "mlp_window": subject.window,
        "ablation": lost,
    }
    records: list[dict[str, Any]] = [{"layer": layer} for layer in range(subject.n_layers)]
    for name, grid in grids.items():
        if grid is None or name not in draws:
            continue
        low, high = percentile_interval(draws[name], config.confidence)
        for layer, record in enumerate(records):
            numbers = (grid[:, layer].mean(), low[layer], high[layer])
            for end, value in zip(("", "_low", "_high"), numbers, strict=True):
                record[f"{name}{end}"] = float(value) if np.isfinite(value) else None
    for layer, (record, member) in enumerate(zip(records, chosen.membership(subject.n_layers), strict=True)):
        if subject.spans:
            record["mlp_window_layers"] = [subject.spans[layer][0], subject.spans[layer][-1]]
        if subject.alone:
            record["ablation_from"] = restored.get(layer)
        record["membership"] = member
    return records
