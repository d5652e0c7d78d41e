"""Tidy effects → grids of facts by layers at the subject's last token, and the curves that rules read.

The *gap* at layer l is AIE(l) − AIE_mlp-severed(l): what the MLPs above l do at that token once the state of l is
clean. All checks of the effects are here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechedit.errors import InputError
from mechedit.selection.config import SelectConfig
from mechedit.tables import where
from mechedit.trace.cells import window_span

Curve = Float[np.ndarray, " layer"]
Grid = Float[np.ndarray, "fact layer"]
Draws = Float[np.ndarray, "resample layer"]

COLUMNS = ("fact", "kind", "sever", "layer", "role", "metric", "effect")
UNITS = {
    "probability": "% of probability",
    "log_probability": "nats",
    "logit_difference": "logits",
}
"""What a metric is counted in; others are called by their own name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """Means over facts, as a rule sees them."""

    gap: Curve
    """State minus MLP-severed effect of each layer."""
    window: Curve | None = None
    """Effect of the MLP window centered at each layer."""
    spans: tuple[range, ...] = ()
    """Layers that each window restores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SubjectEffects:
    """Indirect effects at the subject's last token, a row a fact and a column a layer."""

    facts: tuple[str, ...]
    metric: str
    state: Grid
    mlp_severed: Grid
    attn_severed: Grid | None = None
    window: Grid | None = None
    """Effects of MLP windows; None when `mlp` was not among the kinds traced."""
    spans: tuple[range, ...] = ()
    alone: Mapping[int, Mapping[int, Float[np.ndarray, " fact"]]]
    """alone[L][l]: effect of state l with the MLP of layer L alone severed (`mlp@L`)."""

    @property
    def gap(self) -> Grid:
        """State minus MLP-severed effect."""
        return self.state - self.mlp_severed

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return self.state.shape[1]


def contribution(gap: Float[np.ndarray, "*rows layer"]) -> Float[np.ndarray, "*rows layer"]:
    """c(l) = gap(l−1) − gap(l): what the MLP of layer l adds; 0 for layer 0, which nothing precedes."""
    return np.concatenate([np.zeros_like(gap[..., :1]), gap[..., :-1] - gap[..., 1:]], axis=-1)


def subject_effects(effects: pd.DataFrame, config: SelectConfig) -> SubjectEffects:
    """Take what selection needs out of tidy effects.

    Effects of a metric that falls as the fact comes back (`kl…`, divergence from the clean run) are negated, so
    that more is better in every grid.

    Raises:
        InputError: columns or severings are missing; several models or metrics; too few facts; a cell that is
            missing, there twice, or not finite (named by fact, layer and severing).
    """
    rows = _early_rows(effects, config)
    metric = str(rows["metric"].iloc[0])
    _one_source(rows)
    state = where(rows, kind="state")
    severings = set(state["sever"])
    for sever in ("nothing", "mlp"):
        if sever not in severings:
            raise InputError(
                f"the effects hold no states at subject_last with sever = {sever!r}, which selection needs; "
                f"trace again with sever nothing and mlp"
            )
    facts = list(dict.fromkeys(state["fact"]))
    if len(facts) < config.min_facts:
        raise InputError(
            f"the effects hold {len(facts)} fact(s), expected at least {config.min_facts} to select layers: trace "
            f"more facts, or lower min_facts and do not trust the intervals"
        )
    layers = _all_layers(state)
    grids = {
        sever: _grid(where(state, sever=sever), facts, layers, f"state, sever = {sever!r}")
        for sever in ("nothing", "mlp", "attn")
        if sever in severings
    }
    windows = where(rows, kind="mlp", sever="nothing")
    return SubjectEffects(
        facts=tuple(map(str, facts)),
        metric=metric,
        state=grids["nothing"],
        mlp_severed=grids["mlp"],
        attn_severed=grids.get("attn"),
        window=_grid(windows, facts, layers, "mlp window") if len(windows) else None,
        spans=window_spans(windows, len(layers)) if len(windows) else (),
        alone=_alone(state, facts),
    )


def window_spans(windows: pd.DataFrame, n_layers: int) -> tuple[range, ...]:
    """The layers that each window restored.

    The column `window` holds how many, cut at the edges; the width that the trace was given follows from it.

    Raises:
        InputError: the widths are not those of one trace.
    """
    found = windows.groupby("layer")["window"].agg(["min", "max"]).to_numpy().tolist()
    for width in range(max(high for _, high in found), 2 * n_layers + 1):
        spans = tuple(window_span("mlp", layer, n_layers, int(width)) for layer in range(n_layers))
        if found == [[len(span)] * 2 for span in spans]:
            return spans
    raise InputError(
        f"the MLP windows restore {[low if low == high else f'{low} or {high}' for low, high in found]} layers, "
        f"expected windows of one width, cut at the edges: pass the effects of one trace"
    )


def _early_rows(effects: pd.DataFrame, config: SelectConfig) -> pd.DataFrame:
    """Rows at the subject's last token, of one metric, more being better."""
    missing = [column for column in COLUMNS if column not in effects]
    if missing:
        raise InputError(
            f"the effects lack the columns {', '.join(missing)}, expected what `mechedit trace` or trace_facts made"
        )
    rows = where(effects, role="subject_last")
    found = list(dict.fromkeys(map(str, rows["metric"])))
    metric = config.metric or ("probability" if "probability" in found or not found else found[0])
    if metric not in found or (config.metric is None and metric != "probability" and len(found) > 1):
        raise InputError(
            f"the effects at subject_last are in the metrics {', '.join(found) or 'none'}, expected "
            f"{metric if config.metric else 'probability, or a choice of one by `metric`'}: "
            f"{'choose one of these' if found else 'trace the subject_last role'}"
        )
    rows = where(rows, metric=metric)
    return rows.assign(effect=-rows["effect"]) if metric.startswith("kl") else rows


def _one_source(rows: pd.DataFrame) -> None:
    """Refuse effects of several models: by their name, or by a fact's scores that differ from row to row."""
    for column in ("model", "weights_hash"):
        names = list(dict.fromkeys(rows[column])) if column in rows else []
        if len(names) > 1:
            raise InputError(
                f"the effects are of several models ({', '.join(map(str, names[:3]))}), expected "
                f"one: select for each by itself"
            )
    code, facts = pd.factorize(rows["fact"])
    for column in sorted({"clean", "corrupted"} & set(rows)):
        scores = rows[column].to_numpy(dtype=float)
        low, high = np.full(len(facts), np.inf), np.full(len(facts), -np.inf)
        np.minimum.at(low, code, scores)
        np.maximum.at(high, code, scores)
        # Batches of another shape round differently in half precision; another model differs by more.
        apart = np.flatnonzero(high - low > 0.01 + 0.05 * np.maximum(np.abs(low), np.abs(high)))
        for f in apart[:1]:
            raise InputError(
                f"fact {str(facts[f])!r} has {column} scores from {low[f]:.4g} to {high[f]:.4g}, expected one: "
                f"these effects are of several models or noises; pass those of one trace"
            )


def _all_layers(state: pd.DataFrame) -> range:
    layers = sorted(set(state["layer"]))
    if layers != list(range(len(layers))):
        raise InputError(f"the effects hold the layers {layers}, expected every layer from 0 up: trace all layers")
    return range(len(layers))


def _grid(rows: pd.DataFrame, facts: Sequence[str], layers: Sequence[int], what: str) -> Grid:
    """Effects of one kind and severing; every cell exactly once and finite, or an error that names one."""
    fact, layer = pd.Index(facts).get_indexer(pd.Index(rows["fact"])), rows["layer"].to_numpy() - layers[0]
    known = (fact >= 0) & (layer >= 0) & (layer < len(layers))
    place = fact[known] * len(layers) + layer[known]
    times = np.bincount(place, minlength=len(facts) * len(layers)).reshape(len(facts), len(layers))
    grid = np.zeros(times.size)
    grid[place] = rows["effect"].to_numpy(dtype=float)[known]
    grid = grid.reshape(times.shape)
    for bad, problem, remedy in (
        (times > 1, "is there more than once", "pass the effects of one trace"),
        (times == 0, "is missing", "trace these facts again, all layers and severings"),
        (~np.isfinite(grid), "is not finite", "half precision may have overflowed: trace in float32"),
    ):
        if bad.any():
            f, column = np.argwhere(bad)[0]
            others = f" (and {bad.sum() - 1} others)" if bad.sum() > 1 else ""
            raise InputError(
                f"fact {str(facts[f])!r}, layer {layers[column]}, {what}: the effect{others} {problem}, expected "
                f"one finite number; {remedy}"
            )
    return grid


def _alone(state: pd.DataFrame, facts: Sequence[str]) -> dict[int, dict[int, Float[np.ndarray, " fact"]]]:
    """Effects with one layer's MLP severed, by that layer and the restored one."""
    found: dict[int, dict[int, np.ndarray]] = {}
    for sever, rows in state.groupby("sever"):
        name, _, layer = str(sever).partition("@")
        if name == "mlp" and layer.isdigit():
            layers = rows["layer"].tolist()
            restored = range(min(layers), max(layers) + 1)
            grid = _grid(rows, facts, restored, f"state, sever = {sever!r}")
            found[int(layer)] = dict(zip(restored, grid.T, strict=True))
    return found
