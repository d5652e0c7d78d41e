"""The selection: which layers, by which rule, and the evidence for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mechedit.errors import InputError
from mechedit.files import read_json, write_json
from mechedit.selection.bootstrap import bootstrap_selections, resampled_curves
from mechedit.selection.config import SelectConfig
from mechedit.selection.curves import SubjectEffects, subject_effects
from mechedit.selection.early_site import EarlySite, early_site
from mechedit.selection.evidence import LayerEvidence, evidence_of_records, evidence_records, layer_evidence
from mechedit.selection.published_ranges import PublishedRange, published_ranges
from mechedit.selection.rules import Layers, moving_width

UNIT_NAMES = {"log_probability": "nats", "logit_difference": "logits"}
"""Units of metrics in reasons; others are called by their own name."""


@dataclass(frozen=True, kw_only=True)
class RuleSelection:
    """The range that one rule selects, and its support among bootstrap resamples of the facts."""

    layers: tuple[int, ...]
    """Range on all facts; empty when the facts show no early MLP site."""
    modal: tuple[int, ...]
    """The range that resamples give most often."""
    stability: float
    """Share of resamples that give exactly `layers`."""
    membership: tuple[float, ...]
    """Share of resamples whose range holds each layer."""


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
    stability: float
    """Share of bootstrap resamples that give exactly `layers`."""
    modal: tuple[int, ...]
    """The range that resamples give most often."""
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

    def plain(self) -> dict[str, Any]:
        """The content of `selection.json`."""
        return {**asdict(self), "evidence": evidence_records(self.evidence)}

    def save(self, path: str | Path) -> None:
        """Write `selection.json`, atomically."""
        write_json(path, self.plain())

    @staticmethod
    def load(path: str | Path) -> Selection:
        """Read `selection.json`.

        Raises:
            InputError: no such file, not JSON, or not a selection.
        """
        content = read_json(path)
        try:
            if not isinstance(content, dict):
                raise TypeError(f"it holds a {type(content).__name__}")
            for name in ("layers", "modal"):
                content[name] = _layers(content[name], name)
            content["evidence"] = evidence_of_records(content["evidence"])
            content["rules"] = {name: _rule_selection(rule) for name, rule in content.get("rules", {}).items()}
            content["published"] = tuple(
                PublishedRange(**{**entry, "layers": _layers(entry["layers"], "published")})
                for entry in content.get("published", ())
            )
            return Selection(**content)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{error.args[0]!r} is absent" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"{str(path)!r} is not a selection ({problem}); expected a file that `mechedit select` wrote"
            ) from error


def select_layers(effects: pd.DataFrame, rule: str | None = None, *, config: SelectConfig | None = None) -> Selection:
    """Choose the layers whose MLPs recall facts at the subject's last token.

    Args:
        effects: from `trace_facts`, with state effects at `subject_last`, severed `nothing` and `mlp`; for the
            rule `mlp-window` also the kind `mlp`.
        rule: one of `RULES`; overrides `config.rule`.
        config: bounds, share, resamples, seed.

    Returns:
        The range of the rule, with the evidence of each layer, the ranges of the other rules, and how stable all of
        them are under resampling of the facts. It is empty when the facts show no early site.

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
    model = effects.attrs.get("provenance", {})
    return Selection(
        layers=selected.layers,
        rule=config.rule,
        n_facts=len(subject.facts),
        evidence=layer_evidence(subject, resampled, selected, config),
        alternatives={name: list(rival.layers) for name, rival in selections.items() if name != config.rule},
        stability=selected.stability,
        modal=selected.modal,
        reason=reason(subject, selected.layers, site, config),
        rules={
            name: RuleSelection(
                layers=of_rule.layers,
                modal=of_rule.modal,
                stability=of_rule.stability,
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
    portion = f"{(gap[first - 1] - gap[last]) / fall:.0%}" if first and fall > 0 else "a part"
    text = {
        "contribution": f"the shortest run over which {portion} of the MLPs' contribution is made",
        "gap-peak": f"the run around layer {site.layer} where the gap is at least {config.share:.0%} of {largest}",
        "mlp-window": "restored by the window of MLP outputs with the largest effect",
        "moving-average": f"the {len(layers)} layers with the highest mean contribution, {portion} of it in all",
    }[config.rule]
    span = f"layers {first}–{last}" if len(layers) > 1 else f"layer {first}"
    # More than half of all layers does not localize anything.
    wide = 2 * len(layers) > len(gap) and "; so wide a range says that the contribution is spread over the depth"
    return f"{span}: {text}{wide or ''}{doubt}"


def _amount(value: float, metric: str) -> str:
    return f"{100 * value:.2f}%" if metric == "probability" else f"{value:.3g} {UNIT_NAMES.get(metric, metric)}"


def _rule_selection(content: Mapping[str, Any]) -> RuleSelection:
    """A rule's selection from its entry in selection.json."""
    fields = dict(content)
    for name in ("layers", "modal"):
        fields[name] = _layers(fields[name], f"{name} of a rule")
    return RuleSelection(**{**fields, "membership": tuple(fields["membership"])})


def _layers(values: Any, name: str) -> Layers:
    if not isinstance(values, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name} is {values!r}, not a list of layers")
    return tuple(values)
