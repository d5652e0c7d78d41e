"""Effects as the figures draw them: of one metric, averaged over facts, in percent or another readable unit."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes

from mechedit.errors import InputError, brief_list
from mechedit.figures.style import wrapped
from mechedit.tables import where
from mechedit.trace import KIND_LABELS, ROLE_LABELS, average_effects, unit_of
from mechedit.trace.labels import EffectUnit


def select_effects(effects: pd.DataFrame, **equal: str) -> pd.DataFrame:
    """The effects (or averages) whose columns hold the given values, of one metric.

    Raises:
        InputError: there are none, or of several metrics.
    """
    rows = where(effects, **equal)
    if rows.empty:
        criteria = " and ".join(f"{column} {value!r}" for column, value in equal.items()) or "any kind"
        raise InputError(f"the effects hold no rows of {criteria}, expected some: trace facts with those settings")
    if len(metrics := sorted(set(rows["metric"]))) > 1:
        raise InputError(
            f"the effects hold {len(metrics)} metrics ({brief_list(metrics)}), expected one: pick one, "
            f"effects[effects.metric == {metrics[0]!r}]"
        )
    return rows


def averaged(effects: pd.DataFrame, **equal: str) -> pd.DataFrame:
    """Average effects of one metric, computed by `average_effects` unless the rows are averages already.

    Raises:
        InputError: there are none, or of several metrics.
    """
    rows = select_effects(effects, **equal)
    return rows if {"mean", "low", "high"} <= set(rows) else average_effects(rows)


def unit(effects: pd.DataFrame) -> EffectUnit:
    """The unit of the one metric that effects or averages hold."""
    return unit_of(str(effects["metric"].iloc[0]))


def curve(rows: pd.DataFrame) -> tuple[Float[np.ndarray, " layer"], Float[np.ndarray, "layer 3"]]:
    """Averages by layer as arrays: the layers, and mean, low and high at each, in plotted units."""
    rows = rows.sort_values("layer")
    ends = rows[["mean", "low", "high"]].to_numpy(dtype=float) * unit(rows).factor
    return rows["layer"].to_numpy(dtype=float), ends


def role_grid(effects: pd.DataFrame, kind: str) -> pd.DataFrame:
    """AIE with nothing severed, in plotted units: roles in reading order down, layers across."""
    rows = averaged(effects, kind=kind, sever="nothing")
    grid = rows.pivot(index="role", columns="layer", values="mean") * unit(rows).factor
    return grid.reindex([role for role in ROLE_LABELS if role in grid.index])


def kinds_in(effects: pd.DataFrame) -> list[str]:
    """The kinds that were traced with nothing severed, in the papers' order."""
    traced = set(select_effects(effects, sever="nothing")["kind"])
    return [kind for kind in KIND_LABELS if kind in traced]


def aie_label(effects: pd.DataFrame, ax: Axes) -> str:
    """Label of a vertical axis: AIE and its unit."""
    figure = ax.get_figure(root=True)
    return wrapped(f"AIE ({unit(effects).name})", figure.get_figheight() if figure else 2.0)


def layer_label(kind: str) -> str:
    """Label of the layer axis: for windows, the layer is their center."""
    return "layer of the state" if kind == "state" else f"center of the {KIND_LABELS.get(kind, kind)}"
