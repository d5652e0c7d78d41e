"""Runs that begin behind a prefix, for models whose blocks keep more than attention's keys and values.

The state of a convolution, a linear attention or a state space at the end of a prefix depends on where the prefix ends,
so it cannot be cut out of one run and put into another. For such models a `KVCache` holds each block's input at the
cached positions instead, one "head" of width d_model, and the ids in the place of the values; a run that begins behind
the prefix computes it again, from the cached input of the block at which it resumes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.models.kv_cache import KVCache
from mechedit.models.protocol import Resume, Run, Tokens
from mechedit.models.run_plan import RunPlan, SiteStep, Write
from mechedit.models.sites import EMBED, Site


def run_again(plan: RunPlan, carry_out: Callable[[RunPlan], Run], n_layers: int) -> Run:
    """Carry out a plan that has a cache or asks for one, by a plan that does neither."""
    cache, width = plan.kv_cache, plan.tokens.ids.shape[1]
    joined = plan if cache is None else _behind_prefix(plan, cache)
    last = n_layers - 1 if plan.stop_after is None else plan.stop_after
    # The input of block l + 1 is the residual after block l; before the first stands the embedding.
    inputs = [Site(layer, "resid") for layer in range(plan.first_layer, last)] if plan.use_cache else []
    inputs += [EMBED] if plan.use_cache and plan.first_layer == 0 else []
    run = carry_out(
        dataclasses.replace(joined, steps=_with_reads(joined.steps, inputs), use_cache=False, kv_cache=None)
    )
    starts = _starts(cache, len(plan.tokens.ids), plan.tokens.ids.device)
    at = starts[:, None] + torch.arange(width, device=starts.device)
    values = {site: _at(states, at) for site, states in run.values.items()}
    read_sites = {step.site for step in plan.steps if step.read}
    read = {site: states for site, states in values.items() if site in read_sites}
    cache = _cache(plan, values, n_layers) if plan.use_cache else None
    return Run(run.final_logits, read, cache, run.final_head_inputs)


def _starts(cache: KVCache | None, rows: int, device: torch.device) -> Int[Tensor, " batch"]:
    """Cached positions of each row."""
    if cache is None:
        return torch.zeros(rows, dtype=torch.long, device=device)
    lengths = torch.full((rows,), cache.length, device=device) if cache.lengths is None else cache.lengths
    return lengths.to(device)


def _behind_prefix(plan: RunPlan, cache: KVCache) -> RunPlan:
    """The plan for whole rows: each row's cached positions, then its own."""
    ids, mask = plan.tokens.ids, plan.tokens.mask
    rows, width, longest = len(ids), ids.shape[1], cache.length
    starts = _starts(cache, rows, ids.device)
    columns = torch.arange(longest + width, device=ids.device).expand(rows, -1)
    # Cached positions stand at the right end of the cache; behind the row's own positions comes padding.
    index = torch.where(
        columns < starts[:, None], columns + longest - starts[:, None], columns - starts[:, None] + longest
    )
    is_inside = index < longest + width
    index = index.clamp(max=longest + width - 1)
    states, cached_ids = cache.layers[plan.first_layer]
    all_ids = torch.cat([cached_ids[:, 0, :, 0].to(ids), ids], 1).gather(1, index)
    all_mask = torch.cat([torch.ones_like(ids[:, :1]).expand(rows, longest), mask], 1).gather(1, index) * is_inside
    resume = plan.resume
    if resume is not None:
        resume = Resume(resume.layer, _at(torch.cat([states[:, 0].to(resume.resid), resume.resid], 1), index))
    return dataclasses.replace(
        plan,
        tokens=Tokens(all_ids, all_mask),
        steps=_with_embeddings(tuple(_shifted(step, starts) for step in plan.steps), plan, states[:, 0], starts),
        resume=resume,
        logits_to_keep=_kept(plan, starts),
    )


def _with_embeddings(
    steps: tuple[SiteStep, ...],
    plan: RunPlan,
    states: Float[Tensor, "batch cached width"],
    starts: Int[Tensor, " batch"],
) -> tuple[SiteStep, ...]:
    """The steps of a run from the tokens, which also writes the prefix's embeddings as they were, corrupted or not."""
    if plan.resume is not None or not states.is_floating_point():
        return steps
    longest = states.shape[1]
    rows, columns = (torch.arange(longest, device=starts.device) < starts[:, None]).nonzero(as_tuple=True)
    value = states[rows.to(states.device), (columns + longest - starts[rows]).to(states.device)]
    write = Write(rows, columns, value)
    if steps and steps[0].site == EMBED:
        return (dataclasses.replace(steps[0], writes=(write, *steps[0].writes)), *steps[1:])
    return (SiteStep(EMBED, (write,), False), *steps)


def _shifted(step: SiteStep, starts: Int[Tensor, " batch"]) -> SiteStep:
    """A step whose positions are counted from the beginning of each row."""
    writes = tuple(
        Write(write.rows, write.columns + starts.to(write.rows.device)[write.rows], write.value, write.add)
        for write in step.writes
    )
    return dataclasses.replace(step, writes=writes)


def _kept(plan: RunPlan, starts: Int[Tensor, " batch"]) -> Int[Tensor, "batch kept"]:
    """Positions whose logits are returned, counted from the beginning of each row."""
    keep, width = plan.logits_to_keep, plan.tokens.ids.shape[1]
    if isinstance(keep, int):
        keep = torch.arange(width - keep if keep else 0, width, device=starts.device)
    keep = keep.to(starts.device)
    return starts[:, None] + (keep if keep.ndim == 2 else keep[None])


def _with_reads(steps: tuple[SiteStep, ...], sites: list[Site]) -> tuple[SiteStep, ...]:
    """The steps, which also read these sites."""
    by_site = {step.site: step for step in steps}
    for site in sites:
        by_site[site] = dataclasses.replace(by_site[site], read=True) if site in by_site else SiteStep(site, (), True)
    return tuple(sorted(by_site.values(), key=lambda step: step.site.order))


def _cache(plan: RunPlan, values: dict[Site, Tensor], n_layers: int) -> KVCache:
    """The blocks' inputs at all positions; a placeholder where they were not computed."""
    ids, earlier = plan.tokens.ids, plan.kv_cache
    layers = []
    for layer in range(n_layers):
        states = values.get(Site(layer - 1, "resid") if layer else EMBED)
        if plan.resume is not None and layer == plan.resume.layer:
            states = plan.resume.resid
        entry = (ids.new_zeros(()).expand(*ids.shape, 1) if states is None else states)[:, None], ids[:, None, :, None]
        if earlier is not None:
            old = earlier.layers[layer]
            entry = tuple(
                torch.cat([before, now], 2)
                if before.shape[-1] == now.shape[-1]
                else now.new_zeros(()).expand(*now.shape[:2], before.shape[2] + now.shape[2], now.shape[3])
                for before, now in zip(old, entry, strict=True)
            )
        layers.append(entry)
    lengths = None if earlier is None else earlier.lengths_with(ids.shape[1])
    return KVCache(tuple(layers), lengths)


def _at(states: Tensor, index: Int[Tensor, "batch kept"]) -> Tensor:
    """Each row's states at its own positions."""
    return states.take_along_dim(index[..., None].to(states.device), 1)
