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

    Each row begins at its subject's last token, where δ is added, and positions count from there.
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
        The batch, which of its rows stand behind the first context template, and the clean states h of those rows.
    """
    device, readout = model.device, model.readout()
    sites = [Site(layer, part) for part in config.parts(model.module)]
    width = max(prompt.width for prompt in prompts)
    spans = block_spans(model, layer, config, width)
    input_sites = [Site(span.first - 1, "resid") if span.first else None for span in spans]
    subject, fact = (
        torch.tensor(values, device=device)
        for values in zip(*((prompt.subject, prompt.fact) for prompt in prompts), strict=True)
    )
    scored, labels = (values.to(device) for values in _scored_windows(prompts, width))
    is_kl = (labels == DIVERGENCE).any(1)
    start_cache, start_lengths = shared_start_cache(model, prompts)
    cut = torch.tensor(start_lengths, device=device)
    with_kl = bool(is_kl.any())
    # Of KL prompts alone is the clean distribution asked for; in other rows any position does.
    at = (scored * (labels == DIVERGENCE)).sum(1) + subject - cut
    run = model.run(
        pad([p.ids[length:] for p, length in zip(prompts, start_lengths, strict=True)], model.tokenizer, device),
        read=[*sites, *filter(None, input_sites)],
        logits_to_keep=at[:, None] if with_kl else 0,
        stop_after=None if with_kl else model.n_layers - 1,
        kv_cache=start_cache,
        use_cache=True,
        unembed=not readout.chunked,
    )
    clean = None
    if with_kl:
        states = run.head_inputs if readout.chunked else run.logits
        clean = CleanLogits(readout.logits(states[is_kl.to(states.device), 0]))
    batch = PromptBatch(
        tokens=pad([prompt.ids[prompt.subject :] for prompt in prompts], model.tokenizer, device),
        kv_cache=run.kv_cache.before(subject, spans[0].first) if subject.any() else None,
        spans=spans,
        span_inputs=tuple(
            None if site is None else _from(subject - cut, run[site], span.reach)
            for site, span in zip(input_sites, spans, strict=True)
        ),
        scored=scored,
        labels=labels,
        clean=clean,
        fact=fact,
        weight=torch.tensor([prompt.weight for prompt in prompts], dtype=torch.float32, device=device),
    )
    bare = torch.tensor([prompt.template == 0 for prompt in prompts], device=device)
    states = [_from(subject - cut, run[site], 1)[bare, 0].float() for site in sites]
    return batch, bare, torch.stack(states, 1)


def _scored_windows(
    prompts: Sequence[SearchPrompt], width: int
) -> tuple[Int[Tensor, "row token"], Int[Tensor, "row token"]]:
    """As many consecutive positions of each row as any prompt has scored ones, its own among them, and their labels."""
    count = max(len(prompt.scored) for prompt in prompts)
    positions = torch.arange(count, device="cpu").repeat(len(prompts), 1)
    labels = torch.full_like(positions, NOT_SCORED)
    for row, prompt in enumerate(prompts):
        first = prompt.scored[0] - prompt.subject
        begin = min(first, width - count)
        positions[row] += begin
        at = torch.arange(len(prompt.scored), device="cpu") + first - begin
        labels[row, at] = torch.tensor(prompt.labels or (DIVERGENCE,), device="cpu")
    return positions, labels


def _from(
    starts: Int[Tensor, " row"], states: Float[Tensor, "row pos d_model"], width: int
) -> Float[Tensor, "row width d_model"]:
    """The states of `width` positions from each row's start on; beyond the end the last one is repeated."""
    positions = starts[:, None] + torch.arange(width, device=starts.device)
    rows = torch.arange(len(starts), device=starts.device)[:, None]
    return states[rows, positions.clamp(max=states.shape[1] - 1)]


def shared_start_cache(model: Model, prompts: Sequence[SearchPrompt]) -> tuple[KVCache | None, list[int]]:
    """Run the tokens that all prompts behind one context template begin with, once per template.

    Returns:
        The KV cache of each prompt's shared start, and the start's length per prompt; None and zeros where sharing
        saves less than another run costs.
    """
    by_template: dict[int, list[SearchPrompt]] = defaultdict(list)
    for prompt in prompts:
        by_template[prompt.template].append(prompt)
    starts = {template: _common_start(group) for template, group in by_template.items()}
    lengths = [len(starts[prompt.template]) for prompt in prompts]
    if sum(lengths) - sum(map(len, starts.values())) <= padding_budget(model):
        return None, [0] * len(prompts)
    # A row of no tokens cannot be run; the token that stands in its place is not kept.
    rows = [list(ids) or [prompts[0].ids[0]] for ids in starts.values()]
    run = model.run(pad(rows, model.tokenizer, model.device), use_cache=True, stop_after=model.n_layers - 1)
    cache = run.kv_cache.before(torch.tensor([len(ids) for ids in starts.values()], device=model.device))
    row_of = {template: row for row, template in enumerate(starts)}
    index = torch.tensor([row_of[prompt.template] for prompt in prompts], device=model.device)
    return cache.take(index, cache.length), lengths


def _common_start(prompts: Sequence[SearchPrompt]) -> tuple[int, ...]:
    """The tokens before the subject's last one that all of the prompts begin with."""
    columns = zip(*(prompt.ids[: prompt.subject] for prompt in prompts), strict=False)
    return tuple(ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns))


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
