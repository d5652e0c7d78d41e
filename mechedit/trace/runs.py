"""A group of facts run clean and corrupted: all that restorations start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.models import EMBED, KVCache, Model, Part, Patch, Run, Site, Tokens
from mechedit.trace.config import PART_OF_KIND, TraceConfig
from mechedit.trace.corruption import NoiseSource, Spread, draw_noise, given_noise
from mechedit.trace.metrics import NORMALIZED, Answers, find_metric, metric_name
from mechedit.trace.tokens import TracedFact, batch, read_positions, wanted

Measured = dict[str, Float[Tensor, " row"]]
"""Metric name → one number a row."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """A module's outputs in the corrupted run at the positions where it is severed."""

    positions: Int[Tensor, "row place"]
    """Of each row's fact; −1 where it has fewer."""
    outputs: Mapping[Site, Float[Tensor, "row place d_model"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A group of facts with its clean and corrupted runs; row f·samples + s is fact f under draw s."""

    model: Model
    facts: list[TracedFact]
    config: TraceConfig
    tokens: Tokens
    """One row a fact and sample."""
    noise: Patch
    clean: Run
    """One row a fact; the sites that are restored, and logits."""
    corrupted: Run
    """Residual states."""
    held: Mapping[str, Held]
    """By severing label."""
    kv_cache: KVCache
    """Keys and values of the corrupted run."""
    foils: Int[Tensor, " fact"]
    clean_scores: Mapping[str, Float[Tensor, " fact"]]
    corrupted_scores: Mapping[str, Float[Tensor, " fact"]]
    """Means over draws."""
    entries: dict[tuple[str, str, int], Float[Tensor, "row pos d_model"]] = field(default_factory=dict)
    """(kind, severing, layer) → states at `restorable` positions with which windows that start there go on; filled
    when they are first asked for."""

    @property
    def restorable(self) -> range:
        """From the first to the last position that is restored in any of the facts."""
        found = [i for traced in self.facts for i in wanted(traced, self.config) if i >= traced.subject.start]
        return range(min(found, default=0), max(found, default=-1) + 1)

    @property
    def samples(self) -> int:
        """Noise draws a fact."""
        return self.config.samples

    @property
    def read_at(self) -> Int[Tensor, " object"]:
        """Positions whose logits predict the object's tokens, the same for all facts of the group."""
        return read_positions(self.facts[0], self.model)

    def measure(self, run: Run, facts: Int[Tensor, " row"]) -> Measured:
        """Every plain metric of rows that belong to `facts`."""
        return measure(run, self.clean, facts, self.facts, self.foils, self.config)

    def with_normalized(
        self, score: Mapping[str, float], corrupted: Mapping[str, float], clean: Mapping[str, float]
    ) -> dict[str, tuple[float, float, float]]:
        """(score, corrupted, clean) of every metric asked for; a normalized one is NaN without a total effect."""
        found = {}
        for name in map(metric_name, self.config.metrics):
            plain = name.removeprefix(NORMALIZED)
            if plain == name or plain not in score:
                found[name] = (score[name], corrupted[name], clean[name])
            else:
                total = clean[plain] - corrupted[plain]
                share = (score[plain] - corrupted[plain]) / total if total else float("nan")
                found[name] = (share, 0.0, 1.0)
        return found


def measure(
    run: Run,
    clean: Run,
    facts: Int[Tensor, " row"],
    group: Sequence[TracedFact],
    foils: Int[Tensor, " fact"],
    config: TraceConfig,
) -> Measured:
    """Every plain metric of a run's rows, each of the fact that `facts` says."""
    objects = torch.tensor([traced.object_ids for traced in group], device=facts.device)
    answers = Answers(
        logits=run.logits, clean_runs=clean.logits, facts=facts, objects=objects[facts], foils=foils[facts]
    )
    names = {metric_name(metric).removeprefix(NORMALIZED): metric for metric in config.metrics}
    return {name: find_metric(metric)(answers) for name, metric in names.items()}


def run_clean_and_corrupted(
    model: Model,
    facts: list[TracedFact],
    std: float,
    config: TraceConfig,
    noise: NoiseSource | None = None,
    spread: Spread | None = None,
) -> Scene:
    """Run a group clean and corrupted, and keep what restorations need."""
    layers = range(model.n_layers)
    keep = read_positions(facts[0], model)
    tokens = batch(facts, model)
    restored = [Site(layer, PART_OF_KIND[kind]) for kind in config.kinds for layer in layers]
    clean = model.run(tokens, read=[EMBED, *restored], logits_to_keep=keep)
    repeat = torch.arange(len(facts), device=model.device).repeat_interleave(config.samples)
    repeated = tokens.rows(repeat)
    patch = corruption_patch(model, tokens, clean[EMBED], facts, std, config, noise, spread)
    modules: dict[Part, set[int]] = {}
    for sever in config.severed:
        if sever.module != "nothing":
            modules.setdefault(PART_OF_KIND[sever.module], set()).update(sever.through(model.n_layers))
    severed = [Site(layer, part) for part, cut in modules.items() for layer in sorted(cut)]
    states = [Site(layer, "resid") for layer in layers]
    corrupted = model.run(repeated, [patch], read=[*states, *severed], logits_to_keep=keep, use_cache=True)
    foils = _foils(clean, facts)
    per_fact = torch.arange(len(facts), device=model.device)
    scores = measure(corrupted, clean, repeat, facts, foils, config)
    return Scene(
        model=model,
        facts=facts,
        config=config,
        tokens=repeated,
        noise=patch,
        clean=clean,
        corrupted=Run(None, {site: corrupted[site] for site in states}),
        held=_held(corrupted, facts, config, model.n_layers),
        kv_cache=corrupted.kv_cache,
        foils=foils,
        clean_scores=measure(clean, clean, per_fact, facts, foils, config),
        corrupted_scores={name: rows.view(len(facts), -1).mean(1) for name, rows in scores.items()},
    )


def _foils(clean: Run, facts: Sequence[TracedFact]) -> Int[Tensor, " fact"]:
    """Each fact's own foil, else the likeliest first token that is not the object's."""
    rivals = clean.logits[:, 0].topk(2).indices.tolist()
    chosen = [
        traced.foil_id if traced.foil_id is not None else next(token for token in two if token != traced.object_ids[0])
        for traced, two in zip(facts, rivals, strict=True)
    ]
    return torch.tensor(chosen, device=clean.logits.device)


def _held(corrupted: Run, facts: Sequence[TracedFact], config: TraceConfig, n_layers: int) -> dict[str, Held]:
    """For each severing the corrupted outputs at its places; nothing else of them is kept."""
    found = {}
    for sever in config.severed:
        places = [sever.at(traced.roles) if sever.module != "nothing" else () for traced in facts]
        slots = max(map(len, places))
        where = [[*place, *[-1] * (slots - len(place))] for place in places]
        positions = torch.tensor(where, dtype=torch.long).view(len(facts), slots).repeat_interleave(config.samples, 0)
        rows = torch.arange(len(positions))[:, None]
        layers = sever.through(n_layers) if slots else ()
        outputs = {site: corrupted[site] for site in (Site(layer, PART_OF_KIND[sever.module]) for layer in layers)}
        found[sever.label] = Held(
            positions=positions,
            # A position of −1 takes the last one, which nobody writes.
            outputs={site: out[rows.to(out.device), positions.to(out.device)] for site, out in outputs.items()},
        )
    return found


def corruption_patch(
    model: Model,
    tokens: Tokens,
    embedded: Float[Tensor, "fact pos d_model"],
    facts: Sequence[TracedFact],
    std: float,
    config: TraceConfig,
    noise: NoiseSource | None,
    spread: Spread | None,
) -> Patch:
    """Corrupted embeddings at every corrupted token, for each fact and sample."""
    how = config.corrupted_by
    spans = [traced.corrupted(how.extra_tokens) for traced in facts]
    slots = max(map(len, spans))
    positions = torch.full((len(facts) * config.samples, slots), -1, device=embedded.device)
    value = embedded.new_zeros(len(positions), slots, embedded.shape[-1])
    for f, (traced, span) in enumerate(zip(facts, spans, strict=True)):
        rows = slice(f * config.samples, (f + 1) * config.samples)
        positions[rows, : len(span)] = torch.arange(span.start, span.stop, device=embedded.device)
        if how.distribution == "tokens":
            value[rows, : len(span)] = _swapped(model, tokens.rows(slice(f, f + 1)), traced)
            continue
        shape = (config.samples, len(span), embedded.shape[-1])
        if noise is None:
            draws = draw_noise(traced.fact, shape, how, spread, config.seed)
        else:
            draws = given_noise(traced.fact, shape, how, spread, noise)
        base = embedded[f, span.start : span.stop]
        if how.replace:
            base = spread.mean if how.distribution == "multivariate" and spread is not None else torch.zeros_like(base)
        value[rows, : len(span)] = base.to(embedded) + std * draws.to(embedded)
    return Patch(EMBED, positions, value)


def _swapped(model: Model, tokens: Tokens, traced: TracedFact) -> Float[Tensor, "sample token d_model"]:
    """Embeddings of other subjects in this one's place."""
    ids = tokens.ids.repeat(len(traced.donors), 1)
    span = slice(traced.subject.start, traced.subject.stop)
    ids[:, span] = torch.tensor(traced.donors, device=ids.device)
    run = model.run(Tokens(ids, torch.ones_like(ids)), read=[EMBED], stop_after=0)
    return run[EMBED][:, span]
