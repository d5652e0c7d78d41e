"""The selection: which layers, by which rule, and the evidence for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Required

import pandas as pd
from typing_extensions import TypedDict

from mechedit.arguments import checked
from mechedit.files import read_checked_object, write_checked_json
from mechedit.published import PublishedRange, published_ranges
from mechedit.records import ModelRecord, Number, Whole, check_record, read_record
from mechedit.selection.bootstrap import BootstrapSelections, bootstrap_selections, resampled_curves
from mechedit.selection.config import SelectConfig
from mechedit.selection.curves import SubjectEffects, subject_effects
from mechedit.selection.early_site import EarlySite, early_site
from mechedit.selection.evidence import LayerEvidence, evidence_records, layer_evidence
from mechedit.selection.rules import Layers, moving_width

State = Literal["settled", "unsettled", "no early site"]
"""Whether other such facts would select the same layers, by the bootstrap; or that there is nothing to select."""
UNIT_NAMES = {"log_probability": "nats", "logit_difference": "logits"}
"""Units of metrics in reasons; others are called by their own name."""
WIDEST = 6
"""Layers up to which a range counts as a site, whatever the depth: as wide as the widest that MEMIT edits (GPT-J)."""
WIDEST_SHARE = 1 / 5
"""Part of the depth up to which it does in deep models."""


@dataclass(frozen=True, kw_only=True)
class RuleSelection:
    """The range that one rule selects, and its support among bootstrap resamples of the facts."""

    layers: tuple[int, ...]
    """Range on all facts; empty when the facts show no early MLP site."""
    modal: tuple[int, ...]
    """The range that resamples give most often."""
    stability: float
    """Share of resamples that give exactly `layers`."""
    agreement: float
    """Share of resamples whose range overlaps `layers` by at least `SelectConfig.overlap`."""
    membership: tuple[float, ...]
    """Share of resamples whose range holds each layer."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A range that resamples of the facts give."""

    layers: tuple[int, ...]
    """The range; empty where a resample gives none."""
    share: float
    """Share of resamples that give exactly this range: its probability, were other such facts traced."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A layer range and the evidence for it."""

    layers: tuple[int, ...]
    """Selected layers, contiguous, ascending; empty when the facts show no early MLP site."""
    rule: str
    """Rule that selected the layers."""
    n_facts: int
    """Number of facts traced."""
    evidence: tuple[LayerEvidence, ...]
    """Evidence for each layer, in units of `metric`."""
    alternatives: dict[str, list[int]]
    """The range of every other rule."""
    state: State
    """`settled`; `unsettled`, when other facts of this kind might well select other layers, or where these are too many
    to be a site (`widest_site`); or `no early site`."""
    stability: float
    """Share of bootstrap resamples that give exactly `layers`."""
    agreement: float
    """Share of bootstrap resamples whose range overlaps `layers` by at least `SelectConfig.overlap`; the selection can
    be settled when it is at least `SelectConfig.agreement`."""
    modal: tuple[int, ...]
    """The range that resamples give most often."""
    candidates: tuple[Candidate, ...]
    """The ranges that resamples give most often, the likeliest first."""
    reason: str
    """Why these layers, in a sentence."""
    rules: dict[str, RuleSelection] = field(default_factory=dict)
    """The selection of every rule."""
    metric: str = "probability"
    """Metric of the effects."""
    early_site: dict[str, Any] = field(default_factory=dict)
    """The test for an early site: found, layer, gap, p (see `EarlySite`)."""
    published: tuple[PublishedRange, ...] = ()
    """Ranges that others use for this model, when its name is in the registry."""
    validation: dict[str, Any] = field(default_factory=dict)
    """Comparison with a sweep of edits (`mechedit.sweep.Validation`), which may have chosen `layers`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The `SelectConfig`."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Model that was traced."""

    @property
    def short(self) -> dict[str, Any]:
        """The layers and whether they are settled, for summaries."""
        return {"layers": list(self.layers), "state": self.state}

    def plain(self) -> dict[str, Any]:
        """The content of `selection.json`."""
        return {**asdict(self), "evidence": evidence_records(self.evidence)}

    def save(self, path: str | Path) -> None:
        """Write `selection.json` with its checksum, atomically."""
        write_checked_json(path, self.plain())

    @staticmethod
    def load(path: str | Path) -> Selection:
        """Read `selection.json`.

        Raises:
            InputError: no such file, not JSON, not a selection, or not as it was written.
        """
        what, remedy = repr(str(path)), "select again (mechedit select)"
        content = read_checked_object(path, remedy=remedy)
        check_record(content, EarlierSelection, what, remedy)
        return read_record(_with_agreement(content), Selection, what, remedy)


class _EffectsRecord(TypedDict, total=False):
    """The attributes of effects that a selection takes over."""

    provenance: ModelRecord


@checked
def select_layers(effects: pd.DataFrame, rule: str | None = None, *, config: SelectConfig | None = None) -> Selection:
    """Choose the layers whose MLPs recall facts at the subject's last token.

    Args:
        effects: from `trace_facts`, with state effects at `subject_last`, severed `nothing` and `mlp`; for the
            rule `mlp-window` also the kind `mlp`.
        rule: one of `RULES`; overrides `config.rule`.
        config: bounds, share, resamples, seed.

    Returns:
        The range of the rule, with the evidence of each layer, the ranges of the other rules, and how stable all of
        them are under resampling of the facts; `state` says whether the range is settled. It is empty when the facts
        show no early site.

    Raises:
        InputError: unknown rule; effects missing, duplicated, not finite or of several models; too few facts.

    Example:
        >>> effects = me.trace_facts(model, facts, me.TraceConfig(sever=("nothing", "mlp")))
        >>> selection = me.select_layers(effects)
        >>> selection.layers, selection.reason
    """
    config = config or SelectConfig()
    config = replace(config, rule=rule) if rule else config
    subject = subject_effects(effects, config)
    moving_width(subject.n_layers, config)
    resampled = resampled_curves(subject, config)
    site = early_site(subject, config)
    selections = bootstrap_selections(subject, resampled, config, site.found)
    selected = selections[config.rule]
    state = state_of(selected, config, subject.n_layers)
    check_record(effects.attrs, _EffectsRecord, "the attributes of the effects", "trace again")
    model = effects.attrs.get("provenance", {})
    return Selection(
        layers=selected.layers,
        rule=config.rule,
        n_facts=len(subject.facts),
        evidence=layer_evidence(subject, resampled, selected, config),
        alternatives={name: list(rival.layers) for name, rival in selections.items() if name != config.rule},
        state=state,
        stability=selected.stability,
        agreement=selected.agreement(config.overlap),
        modal=selected.modal,
        candidates=tuple(Candidate(layers=layers, share=share) for layers, share in selected.candidates()),
        reason=reason(subject, selected.layers, site, config) + support(selected, config, subject.n_layers),
        rules={
            name: RuleSelection(
                layers=of_rule.layers,
                modal=of_rule.modal,
                stability=of_rule.stability,
                agreement=of_rule.agreement(config.overlap),
                membership=tuple(of_rule.membership(subject.n_layers)),
            )
            for name, of_rule in selections.items()
        },
        metric=subject.metric,
        early_site=asdict(site),
        published=tuple(published_ranges(str(model.get("model", "")))),
        settings=asdict(config),
        provenance=model,
    )


def state_of(selected: BootstrapSelections, config: SelectConfig, n_layers: int) -> State:
    """Whether the resamples agree on the range of a rule, and it is narrow enough to be a site (`widest_site`)."""
    if not selected.layers:
        return "no early site"
    agrees = selected.agreement(config.overlap) >= config.agreement
    return "settled" if agrees and len(selected.layers) <= widest_site(config, n_layers) else "unsettled"


def widest_site(config: SelectConfig, n_layers: int) -> int:
    """Layers from which on a range localizes nothing, unless the settings ask for one as wide.

    Resamples agree on a range the more easily the wider it is, and all of them on the whole depth.
    """
    chosen = [width for width in (config.min_width, config.max_width, config.width) if width is not None]
    return max(WIDEST, int(WIDEST_SHARE * n_layers), *chosen)


def support(selected: BootstrapSelections, config: SelectConfig, n_layers: int) -> str:
    """How far resamples of the facts agree on the range of a rule; where they do not, what they give instead."""
    if not selected.layers:
        return ""
    agreement, stability = f"{selected.agreement(config.overlap):.0%}", f"{selected.stability:.0%}"
    text = f"; {agreement} of resamples of the facts agree ({stability} give just these layers)"
    if state_of(selected, config, n_layers) == "settled":
        return text
    if selected.agreement(config.overlap) >= config.agreement:
        widest = widest_site(config, n_layers)
        return f"{text}, but {len(selected.layers)} layers are no site (at most {widest} are), so that it is unsettled"
    rivals = ", ".join(f"{layers_in_words(layers)} ({share:.0%})" for layers, share in selected.candidates(3))
    return f"{text}, so that it is unsettled: the likeliest are {rivals}"


def layers_in_words(layers: Layers) -> str:
    """A range of layers for readers."""
    if not layers:
        return "no layers"
    first, last = min(layers), max(layers)
    return f"layers {first}–{last}" if first < last else f"layer {first}"


def reason(subject: SubjectEffects, layers: Layers, site: EarlySite, config: SelectConfig) -> str:
    """Why these layers were selected, or none, in a sentence."""
    gap, largest = subject.gap.mean(0), f"{_amount(site.gap, subject.metric)} at layer {site.layer}"
    few = len(subject.facts) < SelectConfig.min_facts
    doubt = f"; {len(subject.facts)} facts are too few for these intervals to be trusted" if few else ""
    if not site.found:
        why = f"were there none, {site.p:.0%} of draws of signs would show one as clear at some layer"
        if site.p <= 1 - config.confidence:
            why = "that is less than a thousandth of the state's effect"
        gaps = "the largest gap between a state's effect and its MLP-severed effect"
        return f"no early site: {gaps} is {largest}; {why}{doubt}"
    if not layers:
        return (
            f"there is an early site (a gap of {largest}), but {config.rule} finds no layer in it: the gap does not "
            f"fall from any layer to a later one, so no MLP stands out{doubt}"
        )
    first, last = min(layers), max(layers)
    fall = max(gap[a] - gap[a:].min() for a in range(len(gap)))
    part = (gap[first - 1] - gap[last]) / fall if first and fall > 0 else None
    portion = "a part" if part is None else f"{part:.0%}"
    run = f"the shortest run over which at least {config.share:.0%} of the MLPs' contribution is made"
    if part is not None:
        # A rounding error at most: the rule has held the same share against the same fall.
        enough = part >= config.share - 1e-9
        run = f"{run}: here {portion}" if enough else f"{portion} of the MLPs' contribution, in the best part of {run}"
    text = {
        "contribution": run,
        "gap-peak": f"the run around layer {site.layer} where the gap is at least {config.share:.0%} of {largest}",
        "mlp-window": "restored by the window of MLP outputs with the largest effect",
        "moving-average": f"the {len(layers)} layers with the highest mean contribution, {portion} of it in all",
    }[config.rule]
    # More than half of all layers does not localize anything.
    wide = 2 * len(layers) > len(gap) and "; so wide a range says that the contribution is spread over the depth"
    return f"{layers_in_words(layers)}: {text}{wide or ''}{doubt}"


def _amount(value: float, metric: str) -> str:
    return f"{100 * value:.2f}%" if metric == "probability" else f"{value:.3g} {UNIT_NAMES.get(metric, metric)}"


class EarlierRule(TypedDict, total=False):
    """The selection of a rule as files hold it, with what decides whether it is settled where they do not say so."""

    stability: Required[Number]


class EarlierSelection(EarlierRule, total=False):
    """What every selection.json has of that."""

    layers: Required[list[Whole]]
    rules: dict[str, EarlierRule]


def _with_agreement(content: Mapping[str, Any]) -> dict[str, Any]:
    """Say whether a selection is settled where its file does not, by the share of just these layers: it is a bound."""
    settled = "settled" if content["stability"] >= SelectConfig.agreement else "unsettled"
    rules = content.get("rules", {}).items()
    return {
        "state": settled if content["layers"] else "no early site",
        "candidates": [{"layers": content["layers"], "share": content["stability"]}],
        "agreement": content["stability"],
        **content,
        "rules": {name: {"agreement": rule["stability"], **rule} for name, rule in rules},
    }
