"""How kinds, roles, tokens and metrics are written for people, in figures and in notebooks."""

from __future__ import annotations

from dataclasses import dataclass

from mechedit.trace.metrics import NORMALIZED

KIND_LABELS = {"state": "single state", "mlp": "MLP window", "attn": "attention window"}
SEVER_LABELS = {"nothing": "nothing severed", "attn": "attention severed", "mlp": "MLP severed"}
ROLE_LABELS = {
    "before": "before the subject",
    "subject_first": "first subject token",
    "subject_middle": "middle subject tokens",
    "subject_last": "last subject token",
    "after": "first token after",
    "further": "further tokens",
    "last": "last token",
}
"""Name of each role, in reading order."""
METRIC_LABELS = {"log_probability": "log-probability", "logit_difference": "logit difference", "kl": "KL"}
LONGEST_TOKEN = 14
"""Most characters of a token that are shown."""


@dataclass(frozen=True, kw_only=True)
class EffectUnit:
    """The unit in which effects of a metric are shown."""

    factor: float = 1.0
    """Factor by which an effect is multiplied before it is shown."""
    name: str
    """Name of the unit on an axis."""
    short: str = ""
    """Text that follows a number."""
    helps: int = 1
    """Sign of an effect that restores the clean run's behavior."""


EFFECT_UNITS = {
    "probability": EffectUnit(factor=100.0, name="% of probability", short="%"),
    "log_probability": EffectUnit(name="nats of log-probability", short=" nats"),
    "logit_difference": EffectUnit(name="logits", short=" logits"),
    "kl": EffectUnit(name="nats of KL; negative helps", short=" nats", helps=-1),
}


def unit_of(metric: str) -> EffectUnit:
    """The unit of a metric's effects; a user's own metric is shown unscaled, under its own name."""
    if metric in EFFECT_UNITS:
        return EFFECT_UNITS[metric]
    if not metric.startswith(NORMALIZED):
        return EffectUnit(name=metric)
    base = metric.removeprefix(NORMALIZED)
    suffix = "" if base == "probability" else f" on {METRIC_LABELS.get(base, base)}"
    return EffectUnit(factor=100.0, name=f"% of the total effect{suffix}", short="%")


def token_label(text: str, role: str) -> str:
    """A token as a label: white space made visible, cut when long, subject tokens starred as in ROME Fig. 1."""
    shown = text.replace("\n", "↵").replace("\t", "→").strip() or "␣"
    shown = shown if len(shown) <= LONGEST_TOKEN else f"{shown[: LONGEST_TOKEN - 1]}…"
    return f"{shown}*" if role.startswith("subject") else shown


ROLES = ("before", "subject_first", "subject_middle", "subject_last", "after", "further", "last")
"""Roles, in reading order."""


def role_of(position: int, subject: range, length: int) -> str:
    """Role of a prompt token; a one-token subject is `subject_last` only."""
    if position < subject.start:
        return "before"
    if position == subject[-1]:
        return "subject_last"
    if position == subject.start:
        return "subject_first"
    if position in subject:
        return "subject_middle"
    if position == length - 1:
        return "last"
    return "after" if position == subject.stop else "further"
