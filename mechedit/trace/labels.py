"""How kinds, roles, severings, tokens and metrics are written for people, in figures and in notebooks."""

from __future__ import annotations

from dataclasses import dataclass

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
"""In reading order."""
METRIC_LABELS = {"log_probability": "log-probability", "logit_difference": "logit difference", "kl": "KL"}
LONGEST_TOKEN = 14
"""Characters of a token that are shown."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What effects of a metric are shown in."""

    factor: float = 1.0
    """Multiplies an effect before it is shown."""
    name: str
    """For an axis: what one unit is."""
    short: str = ""
    """For a number: what follows it."""
    helps: int = 1
    """Sign of an effect that brings the clean run back."""


UNITS = {
    "probability": Unit(factor=100.0, name="% of probability", short="%"),
    "log_probability": Unit(name="nats of log-probability", short=" nats"),
    "logit_difference": Unit(name="logits", short=" logits"),
    "kl": Unit(name="nats of KL; negative helps", short=" nats", helps=-1),
}


def unit_of(metric: str) -> Unit:
    """The unit of a metric's effects; a metric that is not ours is shown as it is, under its own name."""
    if metric in UNITS:
        return UNITS[metric]
    if not metric.startswith("normalized_"):
        return Unit(name=metric)
    of = metric.removeprefix("normalized_")
    whole = "" if of == "probability" else f" on {METRIC_LABELS.get(of, of)}"
    return Unit(factor=100.0, name=f"% of the total effect{whole}", short="%")


def sever_label(sever: str) -> str:
    """A severing in words; `mlp@2-4` severs the MLPs of layers 2 to 4 only."""
    if sever in SEVER_LABELS:
        return SEVER_LABELS[sever]
    part, at, layers = sever.partition("@")
    if not at or part not in SEVER_LABELS:
        return f"{sever} severed"
    name = SEVER_LABELS[part].removesuffix(" severed")
    several = "s" if any(mark in layers for mark in "-,") else ""
    return f"{name} severed, layer{several} {layers.replace('-', '–')}"


def token_label(text: str, role: str) -> str:
    """A token as a label: white space made visible, cut when long, subject tokens starred as in ROME Fig. 1."""
    shown = text.replace("\n", "↵").replace("\t", "→").strip() or "␣"
    shown = shown if len(shown) <= LONGEST_TOKEN else f"{shown[: LONGEST_TOKEN - 1]}…"
    return f"{shown}*" if role.startswith("subject") else shown


ROLES = ("before", "subject_first", "subject_middle", "subject_last", "after", "further", "last")
"""In reading order."""


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
