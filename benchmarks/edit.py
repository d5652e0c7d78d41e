"""Time editing against the published schedule, side by side, and assert that both give the same numbers.

    python -m benchmarks.edit [--shape tiny gpt2] [--only STEP ...] [--share 0.1] [--edits 1000]

The published schedule is that of `published_edit.py`. Shapes: `tiny` is the model that ships; `gpt2` (12 layers,
d 768) and `gptj` (28 layers, d 4096) have random weights. Steps:

- targets: z for 64 facts with six prefixes, 24 updates each (the threshold is 0, so that none stops early);
- moments: E[k kᵀ] of five layers over running text;
- keys: those of 64 facts at five layers, and the states at the last of them before and after each layer;
- solve: 100 facts, with the factor of the moment at hand, as all batches but a layer's first have it;
- weights: the whole writing of 8 facts, for equality;
- growth: seconds against facts, layers and d_mlp, with the exponent of a power law fitted to them;
- edits: many edits of the model end to end, with invented subjects, in the settings that ship with it but for λ.

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
from benchmarks.published import ROWS, Published, solve
from benchmarks.synthetic_requests import invented
from mechedit.evaluation.likelihood import score_targets
from mechedit.methods.keys import KeyExtractor, prefix_mean
from mechedit.methods.rules import Ridge
from mechedit.methods.spread import UpdateRule, spread
from mechedit.models import Site
from mechedit.prompts import make_prefixes
from mechedit.solve import Update, factorize, ridge_update

Other = TypeVar("Other")
WEIGHT = 15_000.0
SETTINGS = me.MemitConfig(convention="memit-2022", threshold=0.0, covariance_weight=WEIGHT)
"""The published code's, but for the threshold."""


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
"""By how much we mean to be faster."""


FULL_PASS = ROWS // 6
"""Facts that fill a forward pass of the published schedule with their prompts."""


@dataclass(frozen=True)
class Setting:
    """What all steps on one model share."""

    model: me.Model
    layers: list[int]
    target: int
    requests: list[me.EditRequest]
    texts: list[str]
    published: Published
    arguments: argparse.Namespace

    @property
    def device(self) -> str:
        """Where it runs."""
        return self.arguments.device

    @property
    def prefixes(self) -> Sequence[str]:
        """Six."""
        return self.published.prefixes

    @property
    def tolerance(self) -> float:
        """Largest relative difference."""
        return self.arguments.tolerance

    @functools.cached_property
    def moments(self) -> dict[int, me.SecondMoment]:
        """Of all layers, on the text that they are timed on."""
        return me.collect_moments(self.model, self.texts, self.layers)

    def drawn(self, least: int) -> list[int]:
        """Which facts the published schedule takes: a share, or at least so many."""
        total = len(self.requests)
        count = min(total, max(least, round(self.arguments.share * total)))
        return sorted(np.random.default_rng(0).choice(total, count, replace=False).tolist())


@dataclass(frozen=True)
class Duel(Generic[Result, Other]):
    """Both schedules' results, seconds and GiB."""

    fast: Result
    slow: Other
    seconds: tuple[float, float]
    """Of ours, before and after the published one."""
    published: float
    memory: tuple[float, float]
    """Of the published one and of ours."""

    def report(self, step: str, what: str, error: float, given: Setting) -> None:
        """Print the line and assert equality."""
        ratio = self.published / statistics.mean(self.seconds)
        goal = GOALS["cuda" if given.device.startswith("cuda") else "cpu"].get(step)
        goal = None if step == "solve" and given.model.d_mlp < 3072 else goal
        print(
            f"{step}, {what}: published {self.published:.4g} s, mechedit {self.seconds[0]:.4g} and "
            f"{self.seconds[1]:.4g} s (before and after it): {ratio:.1f}x{f' (goal {goal}x)' if goal else ''}; "
            f"largest difference {error:.1e}; {self.memory[0]:.2f} and {self.memory[1]:.2f} GiB",
            flush=True,
        )
        assert error < given.tolerance, f"the schedules differ by {error}"


def side_by_side(
    fast: Callable[[], Result], slow: Callable[[], Other], device: str, *, share: float = 1.0, runs: int = 1
) -> Duel[Result, Other]:
    """Ours, the published one on a share of the work, and ours again; medians of so many runs of each."""
    ours, before, taken = measured(fast, device, runs)
    theirs, published, took = measured(slow, device, runs)
    after = measured(fast, device, runs)[1]
    return Duel(ours, theirs, (before, after), published / share, (took, taken))


def measured(make: Callable[[], Result], device: str, runs: int = 1) -> tuple[Result, float, float]:
    """A result, the median of its seconds and the GiB it takes."""
    peak = Peak(device)
    results, seconds = zip(*(timed(make, device) for _ in range(runs)), strict=True)
    return results[-1], statistics.median(seconds), peak.taken()


def targets(given: Setting) -> None:
    """z, the published one for a drawn share of the facts."""
    config, facts, drawn = SETTINGS.targets, given.requests, given.drawn(1)

    def ours(requests: Sequence[me.EditRequest] = facts) -> me.Targets:
        return me.find_targets(given.model, requests, given.target, given.prefixes, config)

    def theirs() -> list[tuple[Tensor, Tensor]]:
        return [given.published.target(facts[fact], given.target, config) for fact in drawn]

    ours(facts[:1])
    duel = side_by_side(ours, theirs, given.device, share=len(drawn) / len(facts))
    found = duel.fast.z - duel.fast.initial
    wanted = torch.stack([z - initial for initial, z in duel.slow])
    errors = [off(found[fact], delta) for fact, delta in zip(drawn, wanted, strict=True)]
    before, after = (duel.fast.losses.query(f"step == {step}").nll.mean() for step in (0, config.updates))
    what = (
        f"{len(facts)} facts x {len(given.prefixes)} prefixes, layer {given.target}, published {len(drawn)} of them "
        f"(mean -log P {before:.2f} -> {after:.2f}, median difference {statistics.median(errors):.1e})"
    )
    duel.report("targets", what, max(errors), given)
    assert after < before, "the search finds nothing, so equality says nothing"


def moments(given: Setting) -> None:
    """E[k kᵀ] of all layers."""

    def ours() -> dict[int, Tensor]:
        found = me.collect_moments(given.model, given.texts, given.layers)
        return {layer: moment.matrix for layer, moment in found.items()}

    def theirs() -> dict[int, Tensor]:
        whole = given.arguments.whole
        return {layer: given.published.moment(given.texts, layer, whole=whole) for layer in given.layers}

    duel = side_by_side(ours, theirs, given.device)
    error = max(off(duel.fast[layer], duel.slow[layer]) for layer in given.layers)
    passes = "whole passes" if given.arguments.whole else "passes that end at their layer"
    duel.report("moments", f"layers {given.layers}, {len(given.texts)} texts, published in {passes}", error, given)
    first, second = (duel.fast[layer] for layer in given.layers[:2])
    assert off(first, second) > 10 * error, "the layers' moments are alike, so equality says nothing"


def keys(given: Setting) -> None:
    """Keys at all layers and states at the last, as the writing asks for them."""
    last, drawn = given.layers[-1], given.drawn(FULL_PASS)
    facts = [given.requests[fact] for fact in drawn]

    def theirs() -> list[tuple[Tensor, Tensor]]:
        return [(given.published.keys(facts, at), given.published.states(facts, last)) for at in given.layers]

    share = len(drawn) / len(given.requests)
    duel = side_by_side(lambda: recollected(given, given.layers), theirs, given.device, share=share)
    error = max(
        max(off(key.T[drawn], wanted), off(state[drawn], reached))
        for (key, state), (wanted, reached) in zip(duel.fast, duel.slow, strict=True)
    )
    what = f"{len(given.requests)} facts x {len(given.prefixes)}, layers {given.layers}, published {len(drawn)} of them"
    duel.report("keys", what, error, given)


def recollected(given: Setting, layers: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and the last one's states after it; the states before the first are asked for as well."""
    prompts, last = KeyExtractor(given.model, given.requests, given.prefixes), Site(layers[-1], "resid")
    prompts.advance_(layers[0])
    prompts.states([last])
    return [(prefix_mean(prompts.keys(layer), "memit-2022"), prompts.states([last])[last]) for layer in layers]


def solving(given: Setting) -> None:
    """One layer's ΔW."""
    width, facts = given.model.d_mlp, 100
    moment, keys, residuals = made_system(width, given.model.d_model, facts, given.device)
    factor = factorize(moment.double())
    duel = side_by_side(
        lambda: ridge_update(keys, residuals, factor, WEIGHT).delta.T,
        lambda: solve(moment, keys, residuals, WEIGHT),
        given.device,
        runs=7,
    )
    duel.report("solve", f"{facts} facts, d_mlp {width}, medians of 7", off(duel.fast, duel.slow), given)


def made_system(width: int, height: int, facts: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """A moment of keys whose scale falls a hundredfold over the units, such keys, and wanted changes; float32."""
    scale = torch.logspace(0, -2, width, device=device)[:, None]
    generator = torch.Generator(device).manual_seed(0)
    old = scale * torch.randn(width, 2 * width, generator=generator, device=device)
    new = scale * torch.randn(width, facts, generator=generator, device=device)
    return old @ old.T / old.shape[1], new, torch.randn(height, facts, generator=generator, device=device)


def weights(given: Setting) -> None:
    """The writing of some facts into the range, everything the published code does after the search for z."""
    layers, some = [layer for layer in given.layers if layer <= given.target], given.requests[:8]
    found = me.find_targets(given.model, some, given.target, given.prefixes, SETTINGS.targets)
    narrow = {layer: given.moments[layer].matrix.float() for layer in layers}
    rule = Ridge(moments=given.moments, weight=WEIGHT)

    def ours() -> dict[int, Tensor]:
        edit = spread(given.model, some, found, layers, rule, config=SETTINGS.spread).edit
        return {layer: edit.delta(layer) for layer in layers}

    duel = side_by_side(ours, lambda: given.published.edit(some, found.z, layers, narrow, WEIGHT), given.device)
    error = max(off(duel.fast[layer], duel.slow[layer]) for layer in layers)
    duel.report("weights", f"{len(some)} facts into layers {layers}", error, given)


def growth(given: Setting) -> None:
    """How seconds grow, in ours."""
    config = dataclasses.replace(SETTINGS.targets, steps=4)
    many = invented(128, given.model.name == "tiny")

    def searched(facts: int) -> None:
        me.find_targets(given.model, many[:facts], given.target, given.prefixes, config)

    searched(1)
    fitted("targets (3 updates) against facts", [16, 32, 64, 128], searched, given.device)
    fitted("keys against layers", [1, 3, 5], lambda layers: recollected(given, given.layers[:layers]), given.device)
    systems = {}
    for width in (768, 1536, 3072):
        moment, keys, residuals = made_system(width, 768, 100, given.device)
        systems[width] = (keys, residuals, factorize(moment.double()), WEIGHT)
    fitted("solve of 100 facts against d_mlp", list(systems), lambda at: ridge_update(*systems[at]), given.device, 7)


def fitted(what: str, sizes: Sequence[int], make: Callable[[int], object], device: str, runs: int = 1) -> None:
    """Print the seconds for each size and the exponent of the power law nearest to them in logarithms."""
    seconds = [measured(lambda size=size: make(size), device, runs)[1] for size in sizes]
    exponent = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
    each = ", ".join(f"{size}: {value:.4g} s" for size, value in zip(sizes, seconds, strict=True))
    print(f"growth, {what}: {each}; exponent {exponent:.2f}", flush=True)


@dataclass
class Clocked:
    """A rule and the seconds it took."""

    rule: UpdateRule
    device: str
    seconds: float = 0.0

    def update(self, layer: int, keys: Tensor, residuals: Tensor) -> Update:
        """As the rule does."""
        update, seconds = timed(lambda: self.rule.update(layer, keys, residuals), self.device)
        self.seconds += seconds
        return update


def edits(given: Setting) -> None:
    """Many edits end to end, as `memit` makes them in the settings that ship with the model, but for λ."""
    model, almanac = given.model, given.model.name == "tiny"
    config = me.recommended("memit", model)
    assert isinstance(config, me.MemitConfig)
    layers = [layer for layer in given.layers if layer <= given.target]
    requests = invented(given.arguments.edits, almanac)
    # The λ that ships with the tiny model was chosen on a hundred requests; more of them would outweigh the old keys.
    weight = config.covariance_weight * (max(1.0, len(requests) / 100) if almanac else 1.0)
    rule = Clocked(Ridge(moments=given.moments, weight=weight), given.device)
    peak = Peak(given.device)
    found, searching = timed(
        lambda: me.find_targets(model, requests, given.target, given.prefixes, config.targets), given.device
    )
    result, writing = timed(lambda: spread(model, requests, found, layers, rule, config=config.spread), given.device)
    taken = peak.taken()
    asked = [(request.text, request.target_new) for request in requests]
    known = [(fact.text, fact.object) for fact in me.load_facts("known")]
    before = said(model, asked), said(model, known)
    with me.edited(model, result.edit):
        after = said(model, asked), said(model, known)
    way = "of the dense sum" if len(requests) >= model.d_mlp else "with the kept factor"
    rest = searching + writing - rule.seconds
    print(
        f"edits, {len(requests)} facts into layers {layers}, weight {weight:g}: targets {searching:.1f} s "
        f"({len(found.unconverged)} not converged), keys and states {writing - rule.seconds:.1f} s, solve "
        f"{rule.seconds:.1f} s ({way}); without the solve that is {rest / len(requests) * 10_000 / 60:.1f} minutes for "
        f"10,000 facts; the new object is the greedy answer for {before[0]:.1%} before and {after[0]:.1%} after, "
        f"that of the facts that ship for {before[1]:.1%} and {after[1]:.1%}; {taken:.2f} GiB",
        flush=True,
    )


def said(model: me.Model, pairs: Sequence[tuple[str, str]]) -> float:
    """Share of (prompt, object) pairs whose object is the greedy answer."""
    scores = score_targets(model, pairs)
    return statistics.mean(scores[pair].greedy for pair in pairs)


def off(found: Tensor, wanted: Tensor) -> float:
    """Relative difference."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


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
        given = setting(name, arguments)
        print(
            f"{name}: {given.model.n_layers} layers, d {given.model.d_model}, layers {given.layers}, z at "
            f"{given.target}, {torch.get_num_threads()} threads",
            flush=True,
        )
        for step in arguments.only:
            if (name, step) != ("gpt2", "edits"):
                STEPS[step](given)


def setting(name: str, arguments: argparse.Namespace) -> Setting:
    """The model of a shape, and what is done to it."""
    model, shape = load(name, arguments.device, arguments.dtype), SHAPES[name]
    model.hf.requires_grad_(False)
    layers = arguments.layers or list(shape.layers)
    almanac = name == "tiny"
    return Setting(
        model=model,
        layers=layers,
        target=shape.target if arguments.target is None else arguments.target,
        requests=me.load_requests("tiny")[: arguments.facts] if almanac else invented(arguments.facts, almanac),
        texts=me.load_texts("tiny")[: arguments.texts or shape.texts],
        published=Published(model, make_prefixes(me.load_model("tiny"))),
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
