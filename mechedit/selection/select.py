"""The selection: which layers, by which rule, and what speaks for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mechedit.errors import InputError
from mechedit.files import read_json, write_json
from mechedit.selection.bootstrap import vote
from mechedit.selection.config import SelectConfig
from mechedit.selection.curves import UNITS, SubjectEffects, subject_effects
from mechedit.selection.early_site import EarlySite, early_site
from mechedit.selection.evidence import evidence, resample
from mechedit.selection.published_ranges import PublishedRange, published_ranges
from mechedit.selection.rules import Layers, moving_width


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A layer range and what speaks for it."""

    layers: tuple[int, ...]
    """Contiguous, ascending; empty when the facts show no early MLP site."""
    rule: str
    n_facts: int
    evidence: tuple[dict[str, Any], ...]
    """By layer: AIEs, gap, contribution … with intervals (in units of `metric`), and membership probability."""
    alternatives: dict[str, list[int]]
    """What every other rule chooses."""
    stability: float
    """Share of bootstrap resamples that give exactly `layers`."""
    modal: tuple[int, ...]
    """The range that resamples give most often."""
    reason: str
    """Why these layers, in a sentence."""
    rules: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Every rule: its `layers`, `modal` range, `stability`, and the `membership` probability of each layer."""
    metric: str = "probability"
    early_site: dict[str, Any] = field(default_factory=dict)
    """The test for an early site: found, layer, gap, p."""
    published: tuple[PublishedRange, ...] = ()
    """Ranges that others use for this model, when its name is in the registry."""
    validation: dict[str, Any] = field(default_factory=dict)
    """What a sweep of edits says of it (`mechedit.sweep.Validation`); it may have chosen `layers`, by `by`."""
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write `selection.json`, atomically."""
        write_json(path, self)

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
            content["evidence"] = tuple(dict(record) for record in content["evidence"])
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

    Raises:
        InputError: unknown rule; effects missing, twice there, not finite or of several models; too few facts.
    """
    config = config or SelectConfig()
    config = replace(config, rule=rule) if rule else config
    subject = subject_effects(effects, config)
    moving_width(subject.n_layers, config)
    draws = resample(subject, config)
    site = early_site(subject, config)
    votes = vote(subject, draws, config, site.found)
    chosen = votes[config.rule]
    model = effects.attrs.get("provenance", {})
    return Selection(
        layers=chosen.layers,
        rule=config.rule,
        n_facts=len(subject.facts),
        evidence=tuple(evidence(subject, draws, chosen, config)),
        alternatives={name: list(other.layers) for name, other in votes.items() if name != config.rule},
        stability=chosen.stability,
        modal=chosen.modal,
        reason=reason(subject, chosen.layers, site, config),
        rules={
            name: {
                "layers": list(each.layers),
                "modal": list(each.modal),
                "stability": each.stability,
                "membership": each.membership(subject.n_layers),
            }
            for name, each in votes.items()
        },
        metric=subject.metric,
        early_site=asdict(site),
        published=tuple(published_ranges(str(model.get("model", "")))),
        settings=asdict(config),
        provenance=model,
    )


def reason(subject: SubjectEffects, layers: Layers, site: EarlySite, config: SelectConfig) -> str:
    """Why these layers, or none, in a sentence."""
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
    made = f"{(gap[first - 1] - gap[last]) / fall:.0%}" if first and fall > 0 else "a part"
    text = {
        "contribution": f"the shortest run over which {made} of the MLPs' contribution is made",
        "gap-peak": f"the run around layer {site.layer} where the gap is at least {config.share:.0%} of {largest}",
        "mlp-window": "restored by the window of MLP outputs with the largest effect",
        "moving-average": f"the {len(layers)} layers with the highest mean contribution, {made} of it in all",
    }[config.rule]
    span = f"layers {first}–{last}" if len(layers) > 1 else f"layer {first}"
    # Half of all layers is no longer a place.
    wide = 2 * len(layers) > len(gap) and "; so wide a range says that the contribution is spread over the depth"
    return f"{span}: {text}{wide or ''}{doubt}"


def _amount(value: float, metric: str) -> str:
    return f"{100 * value:.2f}%" if metric == "probability" else f"{value:.3g} {UNITS.get(metric, metric)}"


def _layers(values: Any, name: str) -> Layers:
    if not isinstance(values, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name} is {values!r}, not a list of layers")
    return tuple(values)
