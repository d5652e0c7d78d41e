"""The clean and the corrupted run of a group of facts: everything that restorations start from."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechedit.models import EMBED, KVCache, Model, Patch, Readout, Resume, Run, Site, Tokens, exclusive
from mechedit.trace.config import PART_OF_KIND, TraceConfig
from mechedit.trace.corruption import EmbeddingStatistics, NoiseSource, checked_noise, draw_noise
from mechedit.trace.metric_values import (
    MetricValues,
    find_trace_readout,
    metric_inputs,
    metric_values,
    metrics_of,
    metrics_of_object,
    object_inputs,
)
from mechedit.trace.metrics import NORMALIZED, MetricInputs, ObjectInputs, metric_name
from mechedit.trace.traced_fact import TracedFact, as_batch, read_positions, restored_positions


@dataclass(frozen=True, kw_only=True, eq=False)
class SeveredOutputs:
    """A module's outputs in the corrupted run, at the positions where a severing holds them."""

    positions: Int[Tensor, "row slot"]
    """Severed positions of each row's fact; −1 where it has fewer than others."""
    outputs: Mapping[Site, Float[Tensor, "row slot d_model"]]

    def patches(
        self,
        rows: Int[Tensor, " row"],
        layer: int,
        begin: int | Int[Tensor, " row"],
        *,
        least: int | Int[Tensor, " row"] = 0,
        end: int | None = None,
        mask: Bool[Tensor, " row"] | None = None,
    ) -> list[Patch]:
        """Patches that hold the modules of one layer to these outputs.

        Args:
            rows: rows of the corrupted run to which the patched batch's rows belong.
            layer: where modules are held.
            begin: position in the prompt that is the first of the patched batch, or of each of its rows.
            least: first column of the batch, or of each row, where outputs are held; earlier ones are left out.
            end: position in the prompt from which on outputs are left out; None means none.
            mask: rows of the batch that are severed; None means all.
        """
        severed = self.positions.to(rows.device)[rows]
        columns = severed - _by_row(begin)
        inside = (severed >= 0) & (columns >= _by_row(least))
        if end is not None:
            inside &= severed < end
        if mask is not None:
            inside &= mask[:, None]
        where = torch.where(inside, columns, -1)
        sites = [site for site in self.outputs if site.layer == layer]
        return [Patch(site, where, self.outputs[site][rows]) for site in sites if inside.any()]


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceRuns:
    """A group of facts with its clean and corrupted runs.

    The clean run has one row per fact. The corrupted run has one row per fact and noise sample: row
    f·samples + s is fact f under sample s.
    """

    model: Model
    facts: list[TracedFact]
    config: TraceConfig
    tokens: Tokens
    """Tokens of the corrupted run."""
    corruption: Patch
    """Corrupted embeddings of the corrupted run."""
    clean: Run
    """Logits of the clean run, and its outputs at every site that is restored."""
    corrupted: Run
    """Residual states of the corrupted run, and MLP outputs if those are restored; where effects are estimated, its
    outputs at every site that is restored. Those of the last block are left out where no cell needs them."""
    severed: Mapping[str, SeveredOutputs]
    """Severing label → outputs that it holds."""
    kv_cache: KVCache
    """Keys and values of the corrupted run."""
    foils: Int[Tensor, " fact"]
    readout: Readout | None
    """What reads the metrics off the states before the unembedding; None where they need all logits."""
    clean_scores: Mapping[str, Float[Tensor, " fact"]]
    corrupted_scores: Mapping[str, Float[Tensor, " fact"]]
    """Means over samples."""
    corrupted_inputs: MetricInputs | ObjectInputs | None
    """What metrics of the corrupted run's rows read; None where no effects are estimated."""
    _attention_windows: dict[tuple[str, int], Float[Tensor, "row pos d_model"]] = field(
        default_factory=dict, init=False, repr=False
    )
    """Cache of `attention_window_states`, by severing and layer."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    """Is taken by the thread that computes window states, which others wait for."""

    @property
    def samples(self) -> int:
        """Noise samples per fact."""
        return self.config.samples

    @property
    def restored_span(self) -> range:
        """Positions from the first to the last that is restored in any of the facts, from the subject on."""
        positions = [
            position
            for traced in self.facts
            for position in restored_positions(traced, self.config)
            if position >= traced.subject.start
        ]
        return range(min(positions, default=0), max(positions, default=-1) + 1)

    @property
    def read_at(self) -> Int[Tensor, "fact object"]:
        """Positions whose logits predict the object's tokens."""
        return read_positions(self.facts, self.model)

    def metric_values(self, run: Run, facts: Int[Tensor, " row"]) -> MetricValues:
        """Every metric of a run's rows, before normalization; `facts` says to which fact a row belongs.

        Args:
            run: with logits; where there is a `readout`, it may have ended before the unembedding.
            facts: index of each row's fact.
        """
        if run.final_logits is None and self.readout is not None:
            return metrics_of_object(object_inputs(run, self.readout, facts, self.facts), self.config)
        return metric_values(run, self.clean, facts, self.facts, self.foils, self.config)

    def with_normalized(
        self, score: Mapping[str, float], corrupted: Mapping[str, float], clean: Mapping[str, float]
    ) -> dict[str, tuple[float, float, float]]:
        """Score, corrupted and clean of every metric asked for.

        A normalized metric is (score − corrupted) / (clean − corrupted); it is NaN without a total effect.
        """
        scores = {}
        for name in map(metric_name, self.config.metrics):
            base = name.removeprefix(NORMALIZED)
            if base == name or base not in score:
                scores[name] = (score[name], corrupted[name], clean[name])
            else:
                total = clean[base] - corrupted[base]
                recovered = (score[base] - corrupted[base]) / total if total else float("nan")
                scores[name] = (recovered, 0.0, 1.0)
        return scores

    def mlp_window_states(
        self, layer: int, rows: Int[Tensor, " row"], positions: Int[Tensor, " row"]
    ) -> Float[Tensor, "row d_model"]:
        """States after a block in which the MLP's clean output was put back at one position of each row.

        The MLP's output is added last, and nothing else in the block depends on it: the state becomes h + (m − m*),
        with the outputs m of the clean and m* of the corrupted run.

        Args:
            layer: the block.
            rows: rows of the corrupted run.
            positions: one of each row.
        """
        site, facts = Site(layer, "mlp_out"), rows // self.samples
        state, corrupted = (self.corrupted[at][rows, positions] for at in (Site(layer, "resid"), site))
        wide = torch.promote_types(state.dtype, torch.float32)
        return (state.to(wide) + (self.clean[site][facts, positions].to(wide) - corrupted.to(wide))).to(state.dtype)

    def attention_window_states(self, sever: str, layer: int) -> Float[Tensor, "row pos d_model"]:
        """States after a block in which attention's clean output was put back, at all of `restored_span`.

        A window that starts at `layer` continues from these states. They are computed when first asked for: what a
        position's state becomes depends on what is put back at that position alone, so that one run serves the
        cells of all positions.
        """
        key = sever, layer
        with self._lock:
            if key not in self._attention_windows:
                self._attention_windows[key] = self._run_attention_window(sever, layer)
            return self._attention_windows[key]

    def _run_attention_window(self, sever: str, layer: int) -> Float[Tensor, "row pos d_model"]:
        """Run one block of the corrupted run with attention's clean output at every restored position."""
        span, site, restored = self.restored_span, Site(layer, "resid"), Site(layer, "attn_out")
        every_row = torch.arange(len(self.tokens.ids), device=self.model.device)
        positions = torch.arange(len(span), device=self.model.device).repeat(len(every_row), 1)
        clean = self.clean[restored][:, span.start : span.stop]
        patches = [
            *self.severed[sever].patches(every_row, layer, span.start, end=span.stop),
            Patch(restored, positions, clean.repeat_interleave(self.samples, 0)),
        ]
        resume = None
        if layer > 0:
            resume = Resume(layer, self.corrupted[Site(layer - 1, "resid")][:, span.start : span.stop])
        else:
            patches.insert(0, slice_patch(self.corruption, every_row, span.start, span.stop))
        run = self.model.run(
            Tokens(self.tokens.ids[:, span.start : span.stop], self.tokens.mask[:, span.start : span.stop]),
            patches,
            [site],
            resume=resume,
            stop_after=layer,
            kv_cache=self.kv_cache.take(every_row, span.start, layer, layer) if span.start else None,
        )
        return run[site]


def slice_patch(
    patch: Patch, rows: Int[Tensor, " row"], start: int | Int[Tensor, " row"], end: int | None = None
) -> Patch:
    """Some rows of a patch for a batch that begins, or whose rows begin, at position `start`.

    Positions are counted from `start`; earlier ones, and those from `end` on, are left out.
    """
    positions = patch.positions[rows]
    where = positions - _by_row(start)
    if end is not None:
        where = torch.where(positions < end, where, -1)
    return Patch(patch.site, where.clamp(min=-1), patch.value[rows])


def _by_row(values: int | Int[Tensor, " row"]) -> int | Int[Tensor, "row 1"]:
    """One value for all rows, or each row's own as a column."""
    return values[:, None] if isinstance(values, Tensor) else values


@exclusive
def run_clean_and_corrupted(
    model: Model,
    facts: list[TracedFact],
    std: float,
    config: TraceConfig,
    noise: NoiseSource | None = None,
    statistics: EmbeddingStatistics | None = None,
) -> TraceRuns:
    """Run a group of facts clean and corrupted, and keep what restorations need.

    Args:
        model: any `Model`.
        facts: whose objects have equally many tokens; shorter prompts are padded.
        std: standard deviation of the noise, in absolute units.
        config: what to restore, sever, corrupt and measure.
        noise: explicit standard-normal draws; by default they are drawn from each fact's seed.
        statistics: of the subjects' embeddings, which multivariate noise needs.
    """
    layers = range(model.n_layers)
    read_at = read_positions(facts, model)
    tokens = as_batch(facts, model)
    restored_sites = [Site(layer, PART_OF_KIND[kind]) for kind in config.kinds for layer in layers]
    clean = model.run(tokens, read=[EMBED, *restored_sites], logits_to_keep=read_at)
    fact_of_row = torch.arange(len(facts), device=model.device).repeat_interleave(config.samples)
    repeated = tokens.rows(fact_of_row)
    corruption = corruption_patch(model, tokens, clean[EMBED], facts, std, config, noise, statistics)
    last = model.n_layers - 1
    severed_sites = [
        Site(layer, PART_OF_KIND[sever.module])
        for sever in config.severed
        if sever.module != "nothing"
        for layer in sever.through(model.n_layers)
        # Of the last block, only what is read counts.
        if layer < last or any(max(sever.at(traced.roles), default=0) >= traced.prompt_length - 1 for traced in facts)
    ]
    # A window of MLPs begins at the state that the MLP's output belongs to.
    outputs = [site for site in restored_sites if config.approximation is not None or site.part == "mlp_out"]
    states = [Site(layer, "resid") for layer in layers if layer < last or Site(last, "mlp_out") in outputs]
    readout = find_trace_readout(model, config)
    corrupted = model.run(
        repeated,
        [corruption],
        read=list(dict.fromkeys([*states, *severed_sites, *outputs])),
        logits_to_keep=read_at[fact_of_row],
        use_cache=True,
        unembed=readout is None,
    )
    foils = _foils(clean, facts)
    fact_indices = torch.arange(len(facts), device=model.device)
    if readout is None:
        inputs = metric_inputs(corrupted, clean, fact_of_row, facts, foils)
        values = metrics_of(inputs, config)
    else:
        inputs = object_inputs(corrupted, readout, fact_of_row, facts)
        values = metrics_of_object(inputs, config)
    return TraceRuns(
        model=model,
        facts=facts,
        config=config,
        tokens=repeated,
        corruption=corruption,
        clean=clean,
        corrupted=Run(None, {site: corrupted[site] for site in (*states, *outputs)}),
        severed=_severed_outputs(corrupted, facts, config),
        kv_cache=corrupted.kv_cache,
        foils=foils,
        readout=readout,
        clean_scores=metric_values(clean, clean, fact_indices, facts, foils, config),
        corrupted_scores={name: rows.view(len(facts), -1).mean(1) for name, rows in values.items()},
        corrupted_inputs=None if config.approximation is None else inputs,
    )


def _foils(clean: Run, facts: Sequence[TracedFact]) -> Int[Tensor, " fact"]:
    """Each fact's own foil, else the likeliest first token that is not the object's."""
    likeliest = clean.logits[:, 0].topk(2).indices.tolist()
    foils = [
        traced.foil_id
        if traced.foil_id is not None
        else next(token for token in top_two if token != traced.object_ids[0])
        for traced, top_two in zip(facts, likeliest, strict=True)
    ]
    return torch.tensor(foils, device=clean.logits.device)


def _severed_outputs(corrupted: Run, facts: Sequence[TracedFact], config: TraceConfig) -> dict[str, SeveredOutputs]:
    """The corrupted outputs that each severing holds, at its positions only."""
    severed = {}
    for sever in config.severed:
        per_fact = [sever.at(traced.roles) if sever.module != "nothing" else () for traced in facts]
        slots = max(map(len, per_fact))
        padded = [[*positions, *[-1] * (slots - len(positions))] for positions in per_fact]
        positions = (
            torch.tensor(padded, dtype=torch.long, device="cpu")
            .view(len(facts), slots)
            .repeat_interleave(config.samples, 0)
        )
        rows = torch.arange(len(positions), device="cpu")[:, None]
        outputs = {
            site: values
            for site, values in corrupted.values.items()
            if slots and site.part == PART_OF_KIND[sever.module] and sever.holds(site.layer)
        }
        severed[sever.label] = SeveredOutputs(
            positions=positions,
            # A position of −1 reads the last one; no patch writes it.
            outputs={site: out[rows.to(out.device), positions.to(out.device)] for site, out in outputs.items()},
        )
    return severed


def corruption_patch(
    model: Model,
    tokens: Tokens,
    embeddings: Float[Tensor, "fact pos d_model"],
    facts: Sequence[TracedFact],
    std: float,
    config: TraceConfig,
    noise: NoiseSource | None,
    statistics: EmbeddingStatistics | None,
) -> Patch:
    """Corrupted embeddings at every corrupted token, for each fact and sample."""
    corruption = config.corrupted_by
    spans = [traced.corrupted(corruption.extra_tokens) for traced in facts]
    slots = max(map(len, spans))
    positions = torch.full((len(facts) * config.samples, slots), -1, device=embeddings.device)
    value = embeddings.new_zeros(len(positions), slots, embeddings.shape[-1])
    for f, (traced, span) in enumerate(zip(facts, spans, strict=True)):
        rows = slice(f * config.samples, (f + 1) * config.samples)
        positions[rows, : len(span)] = torch.arange(span.start, span.stop, device=embeddings.device)
        if corruption.distribution == "tokens":
            value[rows, : len(span)] = _replacement_embeddings(model, tokens.rows(slice(f, f + 1)), traced)
            continue
        shape = (config.samples, len(span), embeddings.shape[-1])
        if noise is None:
            draws = draw_noise(traced.fact, shape, corruption, statistics, config.seed)
        else:
            draws = checked_noise(traced.fact, shape, corruption, statistics, noise)
        base = embeddings[f, span.start : span.stop]
        if corruption.replace:
            has_mean = corruption.distribution == "multivariate" and statistics is not None
            base = statistics.mean if has_mean and statistics is not None else torch.zeros_like(base)
        value[rows, : len(span)] = base.to(embeddings) + std * draws.to(embeddings)
    return Patch(EMBED, positions, value)


def _replacement_embeddings(model: Model, tokens: Tokens, traced: TracedFact) -> Float[Tensor, "sample token d_model"]:
    """Embeddings of the replacement subjects at the positions of this one."""
    ids = tokens.ids.repeat(len(traced.replacements), 1)
    span = slice(traced.subject.start, traced.subject.stop)
    ids[:, span] = torch.tensor(traced.replacements, device=ids.device)
    run = model.run(Tokens(ids, torch.ones_like(ids)), read=[EMBED], stop_after=0)
    return run[EMBED][:, span]
