"""Time editing against the published schedule, side by side, and assert that both give the same numbers.

    python -m benchmarks.edit [--shape tiny gpt2] [--only STEP ...] [--share 0.1] [--edits 1000]

The published schedule is that of `published.py`. Shapes: `tiny` is the model that ships; `gpt2` (12 layers,
d 768) and `gptj` (28 layers, d 4096) have random weights. Steps:

- targets: z for 64 facts with six prefixes, 24 updates each (the threshold is 0, so that none stops early);
- moments: E[k kᵀ] of five layers over running text;
- keys: those of 64 facts at five layers, and the states at the last of them before and after each layer;
- solve: 100 facts, with the factor of the moment at hand, as all batches but a layer's first have it;
- weights: the whole writing of 8 facts, for equality;
- growth: seconds against facts, layers and d_mlp, with the exponent of a power law fitted to them;
- edits: many edits of the model end to end, with made-up subjects, in the settings that ship with it but for λ.

Each line has the seconds of both (the published targets and keys on a drawn share of the facts, ours before and after
it), their ratio, the largest relative difference, and the memory each took beyond what was there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

import mechedit as me
from benchmarks.machine import Peak, Result, load, timed
from benchmarks.published import ROWS, PublishedEditing, solve
from benchmarks.synthetic_requests import synthetic_requests
from mechedit.evaluation import score_targets
from mechedit.methods import KeyExtractor, Ridge, UpdateRule, prefix_mean
from mechedit.methods.spread import spread
from mechedit.models import Site
from mechedit.prompt_tokens import make_prefixes
from mechedit.solve import Update, factorize, ridge_update

Other = TypeVar("Other")
WEIGHT = 15_000.0
SETTINGS = me.MemitConfig(convention="memit-2022", threshold=0.0, covariance_weight=WEIGHT)
"""Settings of the published code, but for the threshold."""


@dataclass(frozen=True)
class Shape:
    """Where a model is edited and how much text its moments are timed on."""

    layers: tuple[int, ...]
    target: int
    """Where z is searched for: the last layer of the range."""
    texts: int


SHAPES = {
    "tiny": Shape((1, 2, 3, 4, 5), 4, 2000),
    "gpt2": Shape((3, 4, 5, 6, 7), 7, 100),
    "gptj": Shape((4, 5, 6, 7, 8), 8, 1000),
}
GOALS = {"cpu": dict(targets=8, moments=4, keys=3, solve=20), "cuda": dict(targets=30, moments=4, keys=10, solve=20)}
"""Goals: how many times faster than the published schedule."""


FULL_PASS = ROWS // 6
"""Facts that fill a forward pass of the published schedule with their prompts."""


@dataclass(frozen=True)
class Setting:
    """Model, requests and texts that all steps on one model share."""

    model: me.Model
    layers: list[int]
    target: int
    requests: list[me.EditRequest]
    texts: list[str]
    published: PublishedEditing
    arguments: argparse.Namespace

    @property
    def device(self) -> str:
        """Device of the model."""
        return self.arguments.device

    @property
    def prefixes(self) -> Sequence[str]:
        """Context templates, six of them."""
        return self.published.prefixes

    @property
    def tolerance(self) -> float:
        """Largest relative difference that is accepted."""
        return self.arguments.tolerance

    @functools.cached_property
    def moments(self) -> dict[int, me.SecondMoment]:
        """Second moments of all layers, on the text that they are timed on."""
        return me.collect_moments(self.model, self.texts, self.layers)

    def drawn(self, least: int) -> list[int]:
        """Indices of the facts that the published schedule takes: a share, or at least `least`."""
        total = len(self.requests)
        count = min(total, max(least, round(self.arguments.share * total)))
        return sorted(np.random.default_rng(0).choice(total, count, replace=False).tolist())


@dataclass(frozen=True)
class EditComparison(Generic[Result, Other]):
    """Both schedules' results, seconds and GiB."""

    fast: Result
    slow: Other
    seconds: tuple[float, float]
    """Seconds of ours, before and after the published one."""
    published: float
    memory: tuple[float, float]
    """GiB of the published one and of ours."""

    def report(self, step: str, what: str, error: float, setting: Setting) -> None:
        """Print the line and assert equality."""
        ratio = self.published / statistics.mean(self.seconds)
        goal = GOALS["cuda" if setting.device.startswith("cuda") else "cpu"].get(step)
        goal = None if step == "solve" and setting.model.d_mlp < 3072 else goal
        print(
            f"{step}, {what}: published {self.published:.4g} s, mechedit {self.seconds[0]:.4g} and "
            f"{self.seconds[1]:.4g} s (before and after it): {ratio:.1f}x{f' (goal {goal}x)' if goal else ''}; "
            f"largest difference {error:.1e}; {self.memory[0]:.2f} and {self.memory[1]:.2f} GiB",
            flush=True,
        )
        assert error < setting.tolerance, f"the schedules differ by {error}"


def side_by_side(
    fast: Callable[[], Result], slow: Callable[[], Other], device: str, *, drawn_part: float = 1.0, runs: int = 1
) -> EditComparison[Result, Other]:
    """Ours, the published one on a share of the work, and ours again; medians of `runs` runs of each."""
    ours, before, taken = timed_median(fast, device, runs)
    theirs, published, took = timed_median(slow, device, runs)
    after = timed_median(fast, device, runs)[1]
    return EditComparison(ours, theirs, (before, after), published / drawn_part, (took, taken))


def timed_median(make: Callable[[], Result], device: str, runs: int = 1) -> tuple[Result, float, float]:
    """A result, the median of its seconds and the GiB it takes."""
    peak = Peak(device)
    results, seconds = zip(*(timed(make, device) for _ in range(runs)), strict=True)
    return results[-1], statistics.median(seconds), peak.taken()


def targets(setting: Setting) -> None:
    """z, the published one for a drawn share of the facts."""
    config, facts, drawn = SETTINGS.targets, setting.requests, setting.drawn(1)

    def ours(requests: Sequence[me.EditRequest] = facts) -> me.Targets:
        return me.find_targets(setting.model, requests, setting.target, setting.prefixes, config)

    def theirs() -> list[tuple[Tensor, Tensor]]:
        return [setting.published.target(facts[fact], setting.target, config) for fact in drawn]

    ours(facts[:1])
    comparison = side_by_side(ours, theirs, setting.device, drawn_part=len(drawn) / len(facts))
    deltas = comparison.fast.z - comparison.fast.initial
    published_deltas = torch.stack([z - initial for initial, z in comparison.slow])
    errors = [relative_difference(deltas[fact], delta) for fact, delta in zip(drawn, published_deltas, strict=True)]
    before, after = (comparison.fast.losses.query(f"step == {step}").nll.mean() for step in (0, config.updates))
    what = (
        f"{len(facts)} facts x {len(setting.prefixes)} prefixes, layer {setting.target}, published {len(drawn)} "
        f"of them (mean -log P {before:.2f} -> {after:.2f}, median difference {statistics.median(errors):.1e})"
    )
    comparison.report("targets", what, max(errors), setting)
    assert after < before, "the search finds nothing, so equality says nothing"


def moments(setting: Setting) -> None:
    """E[k kᵀ] of all layers."""

    def ours() -> dict[int, Tensor]:
        moments = me.collect_moments(setting.model, setting.texts, setting.layers)
        return {layer: moment.matrix for layer, moment in moments.items()}

    def theirs() -> dict[int, Tensor]:
        full_passes = setting.arguments.whole
        return {
            layer: setting.published.moment(setting.texts, layer, full_passes=full_passes) for layer in setting.layers
        }

    comparison = side_by_side(ours, theirs, setting.device)
    error = max(relative_difference(comparison.fast[layer], comparison.slow[layer]) for layer in setting.layers)
    passes = "whole passes" if setting.arguments.whole else "passes that end at their layer"
    comparison.report(
        "moments",
        f"layers {setting.layers}, {len(setting.texts)} texts, published in {passes}",
        error,
        setting,
    )
    first, second = (comparison.fast[layer] for layer in setting.layers[:2])
    assert relative_difference(first, second) > 10 * error, "the layers' moments are alike, so equality says nothing"


def keys(setting: Setting) -> None:
    """Keys at all layers and states at the last, as the writing asks for them."""
    last, drawn = setting.layers[-1], setting.drawn(FULL_PASS)
    facts = [setting.requests[fact] for fact in drawn]

    def theirs() -> list[tuple[Tensor, Tensor]]:
        return [(setting.published.keys(facts, at), setting.published.states(facts, last)) for at in setting.layers]

    drawn_part = len(drawn) / len(setting.requests)
    comparison = side_by_side(
        lambda: keys_and_states(setting, setting.layers), theirs, setting.device, drawn_part=drawn_part
    )
    error = max(
        max(relative_difference(key.T[drawn], published_keys), relative_difference(state[drawn], published_states))
        for (key, state), (published_keys, published_states) in zip(comparison.fast, comparison.slow, strict=True)
    )
    prompts = f"{len(setting.requests)} facts x {len(setting.prefixes)}"
    what = f"{prompts}, layers {setting.layers}, published {len(drawn)} of them"
    comparison.report("keys", what, error, setting)


def keys_and_states(setting: Setting, layers: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and the last one's states after it; the states before the first are asked for as well."""
    prompts, last = KeyExtractor(setting.model, setting.requests, setting.prefixes), Site(layers[-1], "resid")
    prompts.advance_(layers[0])
    prompts.states([last])
    return [(prefix_mean(prompts.keys(layer), "memit-2022"), prompts.states([last])[last]) for layer in layers]


def solving(setting: Setting) -> None:
    """One layer's ΔW."""
    width, facts = setting.model.d_mlp, 100
    moment, keys, residuals = made_system(width, setting.model.d_model, facts, setting.device)
    factor = factorize(moment.double())
    comparison = side_by_side(
        lambda: ridge_update(keys, residuals, factor, WEIGHT).delta.T,
        lambda: solve(moment, keys, residuals, WEIGHT),
        setting.device,
        runs=7,
    )
    comparison.report(
        "solve",
        f"{facts} facts, d_mlp {width}, medians of 7",
        relative_difference(comparison.fast, comparison.slow),
        setting,
    )


def made_system(width: int, height: int, facts: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """A moment of keys whose scale falls a hundredfold over the units, such keys, and wanted changes; float32."""
    scale = torch.logspace(0, -2, width, device=device)[:, None]
    generator = torch.Generator(device).manual_seed(0)
    old = scale * torch.randn(width, 2 * width, generator=generator, device=device)
    new = scale * torch.randn(width, facts, generator=generator, device=device)
    return old @ old.T / old.shape[1], new, torch.randn(height, facts, generator=generator, device=device)


def weights(setting: Setting) -> None:
    """The writing of some facts into the range, everything the published code does after the search for z."""
    layers, requests = [layer for layer in setting.layers if layer <= setting.target], setting.requests[:8]
    targets = me.find_targets(setting.model, requests, setting.target, setting.prefixes, SETTINGS.targets)
    narrow = {layer: setting.moments[layer].matrix.float() for layer in layers}
    rule = Ridge(moments=setting.moments, weight=WEIGHT)

    def ours() -> dict[int, Tensor]:
        edit = spread(setting.model, requests, targets, layers, rule, config=SETTINGS.spread).edit
        return {layer: edit.delta(layer) for layer in layers}

    comparison = side_by_side(
        ours, lambda: setting.published.edit(requests, targets.z, layers, narrow, WEIGHT), setting.device
    )
    error = max(relative_difference(comparison.fast[layer], comparison.slow[layer]) for layer in layers)
    comparison.report("weights", f"{len(requests)} facts into layers {layers}", error, setting)


def growth(setting: Setting) -> None:
    """How seconds grow, in ours."""
    config = dataclasses.replace(SETTINGS.targets, steps=4)
    many = synthetic_requests(128, setting.model.name == "tiny")

    def searched(facts: int) -> None:
        me.find_targets(setting.model, many[:facts], setting.target, setting.prefixes, config)

    searched(1)
    fitted("targets (3 updates) against facts", [16, 32, 64, 128], searched, setting.device)
    fitted(
        "keys against layers",
        [1, 3, 5],
        lambda layers: keys_and_states(setting, setting.layers[:layers]),
        setting.device,
    )
    systems = {}
    for width in (768, 1536, 3072):
        moment, keys, residuals = made_system(width, 768, 100, setting.device)
        systems[width] = (keys, residuals, factorize(moment.double()), WEIGHT)
    fitted("solve of 100 facts against d_mlp", list(systems), lambda at: ridge_update(*systems[at]), setting.device, 7)


def fitted(what: str, sizes: Sequence[int], make: Callable[[int], object], device: str, runs: int = 1) -> None:
    """Print the seconds for each size and the exponent of the power law nearest to them in logarithms."""
    seconds = [timed_median(lambda size=size: make(size), device, runs)[1] for size in sizes]
    exponent = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
    listing = ", ".join(f"{size}: {value:.4g} s" for size, value in zip(sizes, seconds, strict=True))
    print(f"growth, {what}: {listing}; exponent {exponent:.2f}", flush=True)


@dataclass
class TimedRule:
    """A rule and the seconds it took."""

    rule: UpdateRule
    device: str
    seconds: float = 0.0

    def update(self, layer: int, keys: Tensor, residuals: Tensor) -> Update:
        """The rule's own update; its seconds are counted."""
        update, seconds = timed(lambda: self.rule.update(layer, keys, residuals), self.device)
        self.seconds += seconds
        return update


def edits(setting: Setting) -> None:
    """Many edits end to end, as `memit` makes them in the settings that ship with the model, but for λ."""
    model, almanac = setting.model, setting.model.name == "tiny"
    config = me.recommended("memit", model)
    assert isinstance(config, me.MemitConfig)
    layers = [layer for layer in setting.layers if layer <= setting.target]
    requests = synthetic_requests(setting.arguments.edits, almanac)
    # The λ that ships with the tiny model was chosen on a hundred requests; more of them would outweigh the old keys.
    weight = config.covariance_weight * (max(1.0, len(requests) / 100) if almanac else 1.0)
    rule = TimedRule(Ridge(moments=setting.moments, weight=weight), setting.device)
    peak = Peak(setting.device)
    targets, searching = timed(
        lambda: me.find_targets(model, requests, setting.target, setting.prefixes, config.targets), setting.device
    )
    result, writing = timed(
        lambda: spread(model, requests, targets, layers, rule, config=config.spread), setting.device
    )
    taken = peak.taken()
    edited_prompts = [(request.text, request.target_new) for request in requests]
    known = [(fact.text, fact.object) for fact in me.load_facts("known")]
    before = known_share(model, edited_prompts), known_share(model, known)
    with me.edited(model, result.edit):
        after = known_share(model, edited_prompts), known_share(model, known)
    way = "of the dense sum" if len(requests) >= model.d_mlp else "with the kept factor"
    rest = searching + writing - rule.seconds
    print(
        f"edits, {len(requests)} facts into layers {layers}, weight {weight:g}: targets {searching:.1f} s "
        f"({len(targets.unconverged)} not converged), keys and states {writing - rule.seconds:.1f} s, solve "
        f"{rule.seconds:.1f} s ({way}); without the solve that is {rest / len(requests) * 10_000 / 60:.1f} minutes for "
        f"10,000 facts; the new object is the greedy answer for {before[0]:.1%} before and {after[0]:.1%} after, "
        f"that of the facts that ship for {before[1]:.1%} and {after[1]:.1%}; {taken:.2f} GiB",
        flush=True,
    )


def known_share(model: me.Model, pairs: Sequence[tuple[str, str]]) -> float:
    """Share of (prompt, object) pairs whose object is the greedy answer."""
    scores = score_targets(model, pairs)
    return statistics.mean(scores[pair].greedy for pair in pairs)


def relative_difference(ours: Tensor, published: Tensor) -> float:
    """‖ours − published‖ / ‖published‖, in float64."""
    return float((ours.double() - published.double()).norm() / published.double().norm())


STEPS = {
    "targets": targets,
    "moments": moments,
    "keys": keys,
    "solve": solving,
    "weights": weights,
    "growth": growth,
    "edits": edits,
}


def main() -> None:
    """All steps on every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["tiny", "gpt2"], choices=list(SHAPES))
    parser.add_argument("--only", nargs="+", default=list(STEPS), choices=list(STEPS), help="steps, by default all")
    parser.add_argument("--layers", type=int, nargs="+", help="whose moments and keys are timed")
    parser.add_argument("--target", type=int, help="layer of z, the last that is edited")
    parser.add_argument("--facts", type=int, default=64)
    parser.add_argument("--texts", type=int, help="how many the moments are timed on")
    parser.add_argument("--whole", action="store_true", help="published moments by passes that do not end at a layer")
    parser.add_argument("--share", type=float, default=0.1, help="part of the facts, drawn, that the published z take")
    parser.add_argument("--edits", type=int, default=1000, help="facts edited end to end (not on gpt2)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative difference")
    arguments = parser.parse_args()
    for name in arguments.shape:
        setting = make_setting(name, arguments)
        print(
            f"{name}: {setting.model.n_layers} layers, d {setting.model.d_model}, layers {setting.layers}, z at "
            f"{setting.target}, {torch.get_num_threads()} threads",
            flush=True,
        )
        for step in arguments.only:
            if (name, step) != ("gpt2", "edits"):
                STEPS[step](setting)


def make_setting(name: str, arguments: argparse.Namespace) -> Setting:
    """The model of a shape, its requests and its texts."""
    model, shape = load(name, arguments.device, arguments.dtype), SHAPES[name]
    model.hf.requires_grad_(False)
    almanac = name == "tiny"
    layers = arguments.layers or list(shape.layers)
    return Setting(
        model=model,
        layers=layers,
        target=shape.target if arguments.target is None else arguments.target,
        requests=me.load_requests("tiny")[: arguments.facts]
        if almanac
        else synthetic_requests(arguments.facts, almanac),
        texts=list(me.load_texts("tiny"))[: arguments.texts or shape.texts],
        published=PublishedEditing(model, make_prefixes(me.load_model("tiny"))),
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
