"""Effects at the subject's last token, by fact and layer, and the mean curves that rules read.

The *gap* at layer l is AIE(l) − AIE_mlp-severed(l): what the MLPs above l do at that token once the state of l is
clean. All checks of the effects are here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechedit.errors import InputError, brief, brief_list
from mechedit.selection.config import SelectConfig
from mechedit.tables import where
from mechedit.trace import Sever, window_span, with_present_metric_names
from mechedit.trace.averages import corrected_effects
from mechedit.trace.metrics import metric_name

LayerCurve = Float[np.ndarray, " layer"]
"""A mean over facts, by layer."""
FactEffects = Float[np.ndarray, "fact layer"]
"""Effects by fact and layer."""
ResampledCurves = Float[np.ndarray, "resample layer"]
"""Means over bootstrap resamples of the facts, by resample and layer."""

NEEDED_COLUMNS = ("fact", "kind", "sever", "layer", "role", "metric", "effect")


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanCurves:
    """Means over facts, the input of a rule."""

    gap: LayerCurve
    """State minus MLP-severed effect of each layer."""
    window: LayerCurve | None = None
    """Effect of the MLP window centered at each layer."""
    spans: tuple[range, ...] = ()
    """Layers that each window restores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SubjectEffects:
    """Indirect effects at the subject's last token, one row per fact and one column per layer."""

    facts: tuple[str, ...]
    """Ids of the facts."""
    metric: str
    state: FactEffects
    mlp_severed: FactEffects
    attn_severed: FactEffects | None = None
    window: FactEffects | None = None
    """Effects of MLP windows; None when `mlp` was not among the kinds traced."""
    spans: tuple[range, ...] = ()
    single_severed: Mapping[int, Mapping[int, Float[np.ndarray, " fact"]]]
    """single_severed[L][l]: effect of state l with the MLP of layer L alone severed (`mlp@L`)."""

    @property
    def gap(self) -> FactEffects:
        """State minus MLP-severed effect."""
        return self.state - self.mlp_severed

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return self.state.shape[1]


def contribution(gap: Float[np.ndarray, "*rows layer"]) -> Float[np.ndarray, "*rows layer"]:
    """c(l) = gap(l−1) − gap(l): what the MLP of layer l adds; 0 for layer 0, below which no state was restored."""
    return np.concatenate([np.zeros_like(gap[..., :1]), gap[..., :-1] - gap[..., 1:]], axis=-1)


def subject_effects(effects: pd.DataFrame, config: SelectConfig) -> SubjectEffects:
    """Read and check what selection needs from tidy effects.

    Effects of a metric that falls as the fact is restored (`kl…`, divergence from the clean run) are negated, so
    that larger is better in every measure.

    Raises:
        InputError: columns or severings are missing; several models or metrics; too few facts; an effect that is
            missing, duplicated or not finite (named by fact, layer and severing).
    """
    rows = _subject_rows(effects, config)
    metric = str(rows["metric"].iloc[0])
    _check_one_model(rows)
    state = where(rows, kind="state")
    severings = set(state["sever"])
    for sever in ("nothing", "mlp"):
        if sever not in severings:
            raise InputError(
                f"the effects hold no states at subject_last with sever = {brief(sever)}, which selection needs; "
                f"trace again with sever nothing and mlp"
            )
    facts = list(dict.fromkeys(state["fact"]))
    if len(facts) < config.min_facts:
        raise InputError(
            f"the effects hold {len(facts)} fact(s), expected at least {config.min_facts} to select layers: trace more"
        )
    layers = _all_layers(state)
    state_effects = {
        sever: _by_fact_and_layer(where(state, sever=sever), facts, layers, f"state, sever = {brief(sever)}")
        for sever in ("nothing", "mlp", "attn")
        if sever in severings
    }
    windows = where(rows, kind="mlp", sever="nothing")
    return SubjectEffects(
        facts=tuple(map(str, facts)),
        metric=metric,
        state=state_effects["nothing"],
        mlp_severed=state_effects["mlp"],
        attn_severed=state_effects.get("attn"),
        window=_by_fact_and_layer(windows, facts, layers, "mlp window") if len(windows) else None,
        spans=window_spans(windows, len(layers)) if len(windows) else (),
        single_severed=_single_severed(state, facts),
    )


def ablation(subject: SubjectEffects) -> tuple[FactEffects, dict[int, int]]:
    """Loss of the state below a layer when that layer's MLP alone is severed.

    a(L) = IE(l) − IE_mlp@L-severed(l), with l the layer below L at which the mean gap is largest (of those traced
    with that severing): from there the MLPs above do most. NaN for layers without such rows.

    Returns:
        a, and the restored layer l of each L.
    """
    ablated, restored_layer = np.full_like(subject.state, np.nan), {}
    gap = subject.gap.mean(0)
    for layer, severed in subject.single_severed.items():
        below = sorted(restored for restored in severed if restored < layer)
        if below and layer < subject.n_layers:
            best = restored_layer[layer] = below[int(gap[below].argmax())]
            ablated[:, layer] = subject.state[:, best] - severed[best]
    return ablated, restored_layer


def window_spans(windows: pd.DataFrame, n_layers: int) -> tuple[range, ...]:
    """The layers that each window restored.

    The column `window` holds their number, cut at the edges; the width given to the trace follows from it.

    Raises:
        InputError: the widths are not those of one trace, or there are none.
    """
    _require_columns(windows, ("window",))
    widths = windows.groupby("layer")["window"].agg(["min", "max"]).to_numpy().tolist()
    for width in range(max(high for _, high in widths), 2 * n_layers + 1):
        spans = tuple(window_span("mlp", layer, n_layers, int(width)) for layer in range(n_layers))
        if widths == [[len(span)] * 2 for span in spans]:
            return spans
    raise InputError(
        f"the MLP windows restore {[low if low == high else f'{low} or {high}' for low, high in widths]} layers, "
        f"expected windows of one width, cut at the edges: pass the effects of one trace"
    )


def _subject_rows(effects: pd.DataFrame, config: SelectConfig) -> pd.DataFrame:
    """Rows at the subject's last token, of one metric, of which larger is better."""
    _require_columns(effects, NEEDED_COLUMNS)
    rows = with_present_metric_names(where(effects, role="subject_last"))
    metrics = list(dict.fromkeys(map(str, rows["metric"])))
    by_default = "probability" if "probability" in metrics or not metrics else metrics[0]
    metric = metric_name(config.metric) if config.metric else by_default
    if metric not in metrics or (config.metric is None and metric != "probability" and len(metrics) > 1):
        raise InputError(
            f"the effects at subject_last are in the metrics {brief_list(metrics or ['none'])}, expected "
            f"{metric if config.metric else 'probability, or a choice of one by `metric`'}: "
            f"{'choose one of these' if metrics else 'trace the subject_last role'}"
        )
    rows = where(rows, metric=metric)
    rows = rows.assign(effect=corrected_effects(rows))
    return rows.assign(effect=-rows["effect"]) if metric.startswith("kl") else rows


def _require_columns(effects: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in effects]
    if missing:
        raise InputError(
            f"the effects lack the columns {', '.join(missing)}, expected what `mechedit trace` or trace_facts made"
        )


def _check_one_model(rows: pd.DataFrame) -> None:
    """Refuse effects of several models, told by the model's name or by scores of one fact that differ between rows."""
    for column in ("model", "weights_hash"):
        names = list(dict.fromkeys(rows[column])) if column in rows else []
        if len(names) > 1:
            raise InputError(
                f"the effects are of several models ({', '.join(map(str, names[:3]))}), expected "
                f"one: select layers for each model by itself"
            )
    code, facts = pd.factorize(rows["fact"])
    for column in sorted({"clean", "corrupted"} & set(rows)):
        scores = rows[column].to_numpy(dtype=float)
        low, high = np.full(len(facts), np.inf), np.full(len(facts), -np.inf)
        np.minimum.at(low, code, scores)
        np.maximum.at(high, code, scores)
        # Batches of another shape round differently in half precision; another model differs by more.
        differing = np.flatnonzero(high - low > 0.01 + 0.05 * np.maximum(np.abs(low), np.abs(high)))
        for f in differing[:1]:
            raise InputError(
                f"fact {str(facts[f])!r} has {column} scores from {low[f]:.4g} to {high[f]:.4g}, expected one: "
                f"these effects are of several models or noises; pass those of one trace"
            )


def _all_layers(state: pd.DataFrame) -> range:
    layers = sorted(set(state["layer"]))
    if layers != list(range(len(layers))):
        raise InputError(f"the effects hold the layers {layers}, expected every layer from 0 up: trace all layers")
    return range(len(layers))


def _by_fact_and_layer(
    rows: pd.DataFrame, facts: Sequence[str], layers: Sequence[int], description: str
) -> FactEffects:
    """Effects of one kind and severing; refuses effects that are missing, duplicated or not finite."""
    fact, layer = pd.Index(facts).get_indexer(pd.Index(rows["fact"])), rows["layer"].to_numpy() - layers[0]
    known = (fact >= 0) & (layer >= 0) & (layer < len(layers))
    cell = fact[known] * len(layers) + layer[known]
    times = np.bincount(cell, minlength=len(facts) * len(layers)).reshape(len(facts), len(layers))
    effects = np.zeros(times.size)
    effects[cell] = rows["effect"].to_numpy(dtype=float)[known]
    effects = effects.reshape(times.shape)
    for bad, problem, remedy in (
        (times > 1, "is there more than once", "pass the effects of one trace"),
        (times == 0, "is missing", "trace these facts again, all layers and severings"),
        (~np.isfinite(effects), "is not finite", "half precision may have overflowed: trace in float32"),
    ):
        if bad.any():
            f, column = np.argwhere(bad)[0]
            others = f" (and {bad.sum() - 1} others)" if bad.sum() > 1 else ""
            raise InputError(
                f"fact {str(facts[f])!r}, layer {layers[column]}, {description}: the effect{others} {problem}, "
                f"expected one finite number; {remedy}"
            )
    return effects


def _single_severed(state: pd.DataFrame, facts: Sequence[str]) -> dict[int, dict[int, Float[np.ndarray, " fact"]]]:
    """Effects with one layer's MLP severed, by that layer and the restored one."""
    effects: dict[int, dict[int, np.ndarray]] = {}
    for label, rows in state.groupby("sever"):
        sever = Sever.parse_if_known(str(label))
        if sever is None or sever.layers is None or sever != Sever(module="mlp", layers=sever.layers[:1]):
            continue
        layers = rows["layer"].tolist()
        restored = range(min(layers), max(layers) + 1)
        by_layer = _by_fact_and_layer(rows, facts, restored, f"state, sever = {str(label)!r}")
        effects[sever.layers[0]] = dict(zip(restored, by_layer.T, strict=True))
    return effects
