"""The evidence by layer: means over facts with bootstrap intervals, and how often resamples select the layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mechedit.selection.bootstrap import BootstrapSelections
from mechedit.selection.config import SelectConfig
from mechedit.selection.curves import ResampledCurves, SubjectEffects, ablation, contribution
from mechedit.statistics import percentile_interval

MEASURES_OF = {
    "attn_severed": ("attn_severed", "attn_severed_low", "attn_severed_high"),
    "mlp_window": ("mlp_window", "mlp_window_low", "mlp_window_high", "mlp_window_layers"),
    "ablation": ("ablation", "ablation_low", "ablation_high", "ablation_from"),
}
"""Fields of `LayerEvidence` that selection.json leaves out where their effects were not traced."""


@dataclass(frozen=True, kw_only=True)
class LayerEvidence:
    """Evidence for one layer at the subject's last token, in units of the metric.

    `_low` and `_high` are the ends of a bootstrap interval over facts. The optional fields are None where their
    effects were not traced.
    """

    layer: int
    state: float | None
    """AIE of the layer's state."""
    state_low: float | None = None
    state_high: float | None = None
    mlp_severed: float | None
    """AIE of the state with all MLPs severed."""
    mlp_severed_low: float | None = None
    mlp_severed_high: float | None = None
    attn_severed: float | None = None
    """AIE of the state with attention severed."""
    attn_severed_low: float | None = None
    attn_severed_high: float | None = None
    gap: float | None
    """Effect that the MLPs above the layer mediate: state − mlp_severed."""
    gap_low: float | None = None
    gap_high: float | None = None
    contribution: float | None
    """Contribution of the layer's MLP: gap(l − 1) − gap(l)."""
    contribution_low: float | None = None
    contribution_high: float | None = None
    mlp_window: float | None = None
    """AIE of the window of MLP outputs centered at the layer."""
    mlp_window_low: float | None = None
    mlp_window_high: float | None = None
    ablation: float | None = None
    """Loss of the state of `ablation_from` when this layer's MLP alone is severed."""
    ablation_low: float | None = None
    ablation_high: float | None = None
    mlp_window_layers: tuple[int, int] | None = None
    """First and last layer of that window."""
    ablation_from: int | None = None
    """Layer of the restored state in `ablation`."""
    membership: float
    """Share of bootstrap resamples whose range holds the layer."""


def layer_evidence(
    subject: SubjectEffects,
    resampled: Mapping[str, ResampledCurves],
    selections: BootstrapSelections,
    config: SelectConfig,
) -> tuple[LayerEvidence, ...]:
    """The evidence of each layer for the range of one rule."""
    ablated, restored_layer = ablation(subject)
    measures = {
        "state": subject.state,
        "mlp_severed": subject.mlp_severed,
        "attn_severed": subject.attn_severed,
        "gap": subject.gap,
        "contribution": contribution(subject.gap),
        "mlp_window": subject.window,
        "ablation": ablated,
    }
    numbers: list[dict[str, float | None]] = [{} for _ in range(subject.n_layers)]
    for name, effects in measures.items():
        if effects is None or name not in resampled:
            continue
        low, high = percentile_interval(resampled[name], config.confidence)
        for layer, of_layer in enumerate(numbers):
            interval = (effects[:, layer].mean(), low[layer], high[layer])
            for end, value in zip(("", "_low", "_high"), interval, strict=True):
                of_layer[f"{name}{end}"] = float(value) if np.isfinite(value) else None
    membership = selections.membership(subject.n_layers)
    spans = [(span[0], span[-1]) for span in subject.spans] or [None] * subject.n_layers
    return tuple(
        LayerEvidence(
            layer=layer,
            mlp_window_layers=spans[layer],
            ablation_from=restored_layer.get(layer),
            membership=membership[layer],
            **of_layer,
        )
        for layer, of_layer in enumerate(numbers)
    )


def evidence_records(evidence: Sequence[LayerEvidence]) -> list[dict[str, Any]]:
    """The evidence as selection.json holds it: one record per layer, without measures that no layer has."""
    untraced = {
        name
        for measure, names in MEASURES_OF.items()
        if all(getattr(of_layer, measure) is None for of_layer in evidence)
        for name in names
    }
    return [{name: value for name, value in asdict(of_layer).items() if name not in untraced} for of_layer in evidence]
