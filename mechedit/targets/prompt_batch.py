"""Prompts that run together, with all that δ leaves as it is cached from one clean run.

Neither the positions before the subject's last token nor the blocks below δ's layer depend on δ: their keys, values
and states come from the clean run (`run_clean`), in which prompts behind one context template share the tokens they
begin with (`shared_start_cache`). Only the blocks and positions that δ reaches run again at every step of the search
(`block_spans`, `edited_states`), and their log-probabilities are read without all logits in memory (`Model.readout`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import takewhile

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechedit.batching import pad, padding_budget
from mechedit.models import CleanLogits, KVCache, Model, Patch, Resume, Site, Tokens, TokenScores
from mechedit.targets.config import TargetConfig
from mechedit.targets.search_prompts import SearchPrompt

NOT_SCORED, DIVERGENCE = -1, -2
"""Stand in place of a label where nothing enters the loss, and where a KL prompt is scored."""


@dataclass(frozen=True, kw_only=True)
class BlockSpan:
    """Consecutive blocks in which δ reaches the same positions, which alone have to run."""

    first: int
    last: int
    reach: int
    """Number of positions that depend on δ, from the subject's last token on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptBatch:
    """Prompts of like width and what the clean run left for them.

    Each row begins at the token where δ is added, and positions count from there.
    """

    tokens: Tokens
    kv_cache: KVCache | None
    """Keys and values of the positions before; None when no row has any."""
    spans: tuple[BlockSpan, ...]
    """All blocks that depend on δ, in order."""
    span_inputs: tuple[Float[Tensor, "row _ d_model"] | None, ...]
    """Cached block inputs: the clean residual stream where each span begins; None before the first block."""
    scored: Int[Tensor, "row token"]
    """Positions that may enter the loss, different ones in each row."""
    labels: Int[Tensor, "row token"]
    """Tokens to be predicted at `scored`; `NOT_SCORED` and `DIVERGENCE` where none is."""
    clean: CleanLogits | None
    """Clean logits of the KL prompts, in order; None where there are none."""
    fact: Int[Tensor, " row"]
    """Index of each row's fact."""
    weight: Float[Tensor, " row"]
    """Weight of each row in its fact's mean loss."""

    def __len__(self) -> int:
        return len(self.fact)

    def __getitem__(self, rows: slice) -> PromptBatch:
        return self.take(torch.arange(len(self), device=self.fact.device)[rows])

    @property
    def is_kl(self) -> Bool[Tensor, " row"]:
        """Which rows are KL prompts."""
        return (self.labels == DIVERGENCE).any(1)

    def where(self, rows: Bool[Tensor, " row"]) -> PromptBatch:
        """The batch with the rows for which `rows` is true."""
        return self if rows.all() else self.take(rows.nonzero()[:, 0])

    def take(self, index: Int[Tensor, " chosen"]) -> PromptBatch:
        """The batch with the rows of these indices."""

        def chosen(value: object) -> object:
            if isinstance(value, KVCache):
                return value.take(index, value.length)
            if isinstance(value, Tokens):
                return value.rows(index)
            if isinstance(value, tuple):
                return tuple(map(chosen, value))
            return value[index] if isinstance(value, Tensor) else value

        values = {field.name: chosen(getattr(self, field.name)) for field in fields(self)}
        if self.clean is not None:
            clean_rows = (self.is_kl.cumsum(0) - 1)[index][self.is_kl[index]]
            values["clean"] = self.clean.take(clean_rows) if len(clean_rows) else None
        return PromptBatch(**values)  # type: ignore[arg-type]


def block_spans(model: Model, layer: int, config: TargetConfig, width: int) -> tuple[BlockSpan, ...]:
    """Which blocks run again when δ moves, and at how many of the `width` positions.

    The first is the one after δ, unless δ is added inside a block or after the last. With local attention (GPT-Neo)
    a change at one position reaches window − 1 positions further in each block.
    """
    inside = config.parts(model.module)[0] == "attn_out"
    last, reach, spans = model.n_layers - 1, 1, []
    for block in range(layer if inside or layer == last else layer + 1, model.n_layers):
        if block == last:
            # Any of its positions may be scored.
            reach = width
        elif block > layer:
            reach = min(width, reach + (model.window(block) or width) - 1)
        if spans and spans[-1].reach == reach:
            spans[-1] = BlockSpan(first=spans[-1].first, last=block, reach=reach)
        else:
            spans.append(BlockSpan(first=block, last=block, reach=reach))
    return tuple(spans)


@torch.no_grad()
def run_clean(
    model: Model, prompts: Sequence[SearchPrompt], layer: int, config: TargetConfig
) -> tuple[PromptBatch, Bool[Tensor, " row"], Float[Tensor, "bare part d_model"]]:
    """One clean run of prompts of like width.

    Returns:
        The batch, which of its rows are bare prompts, and the clean states h of those rows.
    """
    device = model.device
    sites = [Site(layer, part) for part in config.parts(model.module)]
    width = max(prompt.width for prompt in prompts)
    spans = block_spans(model, layer, config, width)
    input_sites = [Site(span.first - 1, "resid") if span.first else None for span in spans]
    subject, fact = (
        torch.tensor(values, device=device)
        for values in zip(*((prompt.at, prompt.fact) for prompt in prompts), strict=True)
    )
    scored, labels = (values.to(device) for values in _scored_windows(prompts, width))
    tokens = pad([prompt.ids[prompt.at :] for prompt in prompts], model.tokenizer, device)
    kv_cache = _cache_before_subjects(model, prompts, subject)
    # What comes after depends on δ; of KL prompts alone is the clean distribution asked for.
    end = max(site.layer for site in [*sites, *filter(None, input_sites)])
    end_site = Site(end, "resid")
    run = model.run(
        tokens,
        read=list(dict.fromkeys([*sites, *filter(None, input_sites), end_site])),
        stop_after=end,
        kv_cache=kv_cache,
    )
    reached = Resume(end + 1, run[end_site]) if end + 1 < model.n_layers else None
    is_kl = labels == DIVERGENCE
    batch = PromptBatch(
        tokens=tokens,
        kv_cache=None if kv_cache is None else kv_cache.since(spans[0].first),
        spans=spans,
        span_inputs=tuple(
            None if site is None else run[site][:, : span.reach] for site, span in zip(input_sites, spans, strict=True)
        ),
        scored=scored,
        labels=labels,
        clean=_clean_logits(model, tokens, kv_cache, reached, (scored * is_kl).sum(1), is_kl.any(1)),
        fact=fact,
        weight=torch.tensor([prompt.weight for prompt in prompts], dtype=torch.float32, device=device),
    )
    bare = torch.tensor([prompt.bare for prompt in prompts], device=device)
    return batch, bare, torch.stack([run[site][bare.to(run[site].device), 0].float().to(device) for site in sites], 1)


def _scored_windows(
    prompts: Sequence[SearchPrompt], width: int
) -> tuple[Int[Tensor, "row token"], Int[Tensor, "row token"]]:
    """As many consecutive positions of each row as any prompt has scored ones, its own among them, and their labels."""
    count = max(len(prompt.scored) for prompt in prompts)
    positions = torch.arange(count, device="cpu").repeat(len(prompts), 1)
    labels = torch.full_like(positions, NOT_SCORED)
    for row, prompt in enumerate(prompts):
        first = prompt.scored[0] - prompt.at
        begin = min(first, width - count)
        positions[row] += begin
        at = torch.arange(len(prompt.scored), device="cpu") + first - begin
        labels[row, at] = torch.tensor(prompt.labels or (DIVERGENCE,), device="cpu")
    return positions, labels


def _cache_before_subjects(
    model: Model, prompts: Sequence[SearchPrompt], subject: Int[Tensor, " row"]
) -> KVCache | None:
    """The KV cache of each prompt's tokens before the subject's last one; None where no prompt has any."""
    if not subject.any():
        return None
    cache, lengths = shared_start_cache(model, prompts)
    rows = [list(p.ids[length : p.at]) for p, length in zip(prompts, lengths, strict=True)]
    if any(rows):
        # A row of no tokens cannot be run; the token that stands in its place is not kept.
        tokens = pad([ids or [prompts[0].ids[0]] for ids in rows], model.tokenizer, model.device)
        cache = model.run(tokens, stop_after=model.n_layers - 1, kv_cache=cache, use_cache=True).kv_cache
    assert cache is not None, "some tokens come before the subject's last one"
    return cache.before(subject)


def _clean_logits(
    model: Model,
    tokens: Tokens,
    kv_cache: KVCache | None,
    reached: Resume | None,
    at: Int[Tensor, " row"],
    is_kl: Bool[Tensor, " row"],
) -> CleanLogits | None:
    """Logits of the KL prompts at the positions `at`, from the block that the clean run has reached, or from none."""
    if not is_kl.any():
        return None
    readout, rows = model.readout(), is_kl.nonzero()[:, 0]
    resume = None if reached is None else Resume(reached.layer, reached.resid[rows.to(reached.resid.device)])
    run = model.run(
        tokens.rows(rows),
        resume=resume,
        logits_to_keep=at[rows, None],
        kv_cache=None if kv_cache is None else kv_cache.take(rows, kv_cache.length, resume.layer if resume else 0),
        unembed=not readout.chunked,
    )
    states = run.head_inputs if readout.chunked else run.logits
    return CleanLogits(readout.logits(states[:, 0]))


def shared_start_cache(model: Model, prompts: Sequence[SearchPrompt]) -> tuple[KVCache | None, list[int]]:
    """Run the tokens that all prompts behind one context template begin with, once per template.

    Returns:
        The KV cache of each prompt's shared start, and the start's length per prompt; None and zeros where sharing
        saves less than another run costs.
    """
    counts = common_starts(prompts)
    starts = {prompt.template: prompt.ids[: counts[prompt.template]] for prompt in prompts}
    lengths = [counts[prompt.template] for prompt in prompts]
    if sum(lengths) - sum(counts.values()) <= padding_budget(model):
        return None, [0] * len(prompts)
    # A row of no tokens cannot be run; the token that stands in its place is not kept.
    rows = [list(ids) or [prompts[0].ids[0]] for ids in starts.values()]
    run = model.run(pad(rows, model.tokenizer, model.device), use_cache=True, stop_after=model.n_layers - 1)
    cache = run.kv_cache.before(torch.tensor([len(ids) for ids in starts.values()], device=model.device))
    row_of = {template: row for row, template in enumerate(starts)}
    index = torch.tensor([row_of[prompt.template] for prompt in prompts], device=model.device)
    return cache.take(index, cache.length), lengths


def common_starts(prompts: Sequence[SearchPrompt]) -> dict[int, int]:
    """How many tokens before δ's all prompts behind each context template begin with, by its index."""
    by_template: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for prompt in prompts:
        by_template[prompt.template].append(prompt.ids[: prompt.at])
    return {
        template: sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*starts, strict=False)))
        for template, starts in by_template.items()
    }


def edited_scores(
    model: Model, batch: PromptBatch, layer: int, delta: Float[Tensor, "row part d_model"], config: TargetConfig
) -> tuple[TokenScores, Int[Tensor, " label"]]:
    """What the loss needs to know of the run with δ added: log P of every label, and KL of every KL prompt.

    Returns:
        The scores, labels in the order of rows and tokens, and the row of each label.
    """
    readout, labels = model.readout(), batch.labels
    states = edited_states(model, batch, layer, delta, config, unembed=not readout.chunked)
    rows, slots = (labels >= 0).nonzero(as_tuple=True)
    kl_rows, kl_slots = (labels == DIVERGENCE).nonzero(as_tuple=True)
    at = (torch.cat([rows, kl_rows]).to(states.device), torch.cat([slots, kl_slots]).to(states.device))
    return readout.score(states[at], labels[rows, slots], batch.clean), rows


def edited_states(
    model: Model,
    batch: PromptBatch,
    layer: int,
    delta: Float[Tensor, "row part d_model"],
    config: TargetConfig,
    *,
    unembed: bool,
) -> Float[Tensor, "row token width"]:
    """Inputs of the unembedding at the positions in `scored` with δ added, computed span by span.

    Args:
        model: the model.
        batch: the prompts.
        layer: where δ is added.
        delta: δ of each row.
        config: names the activations that δ is added to.
        unembed: return logits instead.
    """
    state: Tensor | None = None
    patches: list[Patch] = []
    if batch.spans[0].first > layer:
        # Nothing of the block that δ follows is left to compute, so δ is added to the input of the next one.
        assert batch.span_inputs[0] is not None
        state = (batch.span_inputs[0][:, :1].float() + delta).to(batch.span_inputs[0].dtype)
    else:
        start = torch.zeros(len(batch), 1, dtype=torch.long, device=delta.device)
        sites = [Site(layer, part) for part in config.parts(model.module)]
        patches = [Patch(site, start, delta[:, [index]], add=True) for index, site in enumerate(sites)]
    result: Tensor | None = None
    for span, clean_input in zip(batch.spans, batch.span_inputs, strict=True):
        if state is not None and clean_input is not None:
            state = torch.cat([state, clean_input[:, state.shape[1] :]], 1)
        span_input = clean_input if state is None else state
        output, goes_on = Site(span.last, "resid"), span.last < model.n_layers - 1
        run = model.run(
            batch.tokens.first(span.reach),
            patches if span.first <= layer else (),
            read=[output] if goes_on else (),
            resume=None if span_input is None else Resume(span.first, span_input),
            stop_after=span.last if goes_on else None,
            kv_cache=batch.kv_cache,
            logits_to_keep=0 if goes_on else batch.scored,
            unembed=unembed or goes_on,
        )
        state, result = run.values.get(output), run.final_logits if unembed else run.final_head_inputs
    assert result is not None, "the last span runs to the model's end"
    return result
