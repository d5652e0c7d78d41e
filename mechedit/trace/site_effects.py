"""Effects at the papers' sites, as the lines of a table."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from mechedit.tables import where
from mechedit.trace.averages import average_effects, total_effects


@dataclass(frozen=True, kw_only=True)
class EffectLine:
    """One line of the table of effects, in percent of probability."""

    name: str
    """The effect and its site."""
    meaning: str
    """Its meaning in a sentence."""
    mean: float
    """Mean over facts."""
    low: float
    """Lower end of its interval."""
    high: float
    """Upper end of its interval."""


def site_effects(effects: pd.DataFrame) -> list[EffectLine]:
    """The total effect, and the indirect effects at the papers' sites, each at its largest layer.

    At the subject's last token the layer is that at which severing the MLPs reduces the effect most.
    """
    if effects.empty:
        return []
    total = total_effects(effects).iloc[0]
    text = "The part of the object’s probability that noise on the subject removes."
    lines = [_effect("Total effect", text, total["total"], total["total_low"], total["total_high"])]
    averages = average_effects(effects)
    early = where(averages, kind="state", role="subject_last")
    unsevered = where(early, sever="nothing")
    if len(unsevered):
        severed = where(early, sever="mlp").set_index("layer")["mean"].reindex(unsevered["layer"])
        # Above the recalling layers severing changes nothing: compare where it changes most.
        difference = unsevered["mean"].to_numpy() - severed.fillna(0).to_numpy()
        best = unsevered.iloc[int(difference.argmax())]
        text = "The part that one clean state there restores."
        lines.append(_site(f"Last subject token, state of layer {best['layer']}", text, best))
        for sever, name in (("mlp", "MLPs"), ("attn", "attention")):
            severed_row = where(early, sever=sever, layer=best["layer"])
            if len(severed_row):
                text = f"The same with {name} at that token held to their outputs under noise."
                lines.append(_site(f"… with {name} severed", text, severed_row.iloc[0]))
    for kind, role, name, text in (
        ("state", "after", "First token after the subject, state", "The contrast: the next token along."),
        (
            "mlp",
            "subject_last",
            "Last subject token, MLP window",
            "The early site: MLPs that recall the fact.",
        ),
        ("attn", "last", "Last token, attention window", "The late site: attention that fetches it."),
    ):
        rows = where(averages, kind=kind, role=role, sever="nothing")
        if len(rows):
            best = rows.iloc[int(rows["mean"].to_numpy().argmax())]
            around = "of layer" if kind == "state" else "around layer"
            lines.append(_site(f"{name} {around} {best['layer']}", text, best))
    return lines


def _site(name: str, meaning: str, average: pd.Series) -> EffectLine:
    mean, low, high = (float(average.at[end]) for end in ("mean", "low", "high"))
    return _effect(name, meaning, mean, low, high)


def _effect(name: str, meaning: str, mean: float, low: float, high: float) -> EffectLine:
    return EffectLine(name=name, meaning=meaning, mean=100 * mean, low=100 * low, high=100 * high)
