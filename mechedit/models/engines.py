"""The engines that every family has: the unhooked copy's own forward, and the backend's hooks.

Both call a weight-sharing copy of the transformers model, with the shortcuts that the plan allows.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mechedit.models.family import Family
from mechedit.models.kv_cache import KVCache
from mechedit.models.protocol import Run
from mechedit.models.run_plan import RunPlan, RunStopped, SiteStep
from mechedit.models.shortcuts import (
    Forwards,
    blocks_of,
    bypass_hooks,
    end_before_head,
    narrow_head,
    narrow_mlp,
    replace_forwards,
    skip_blocks,
    stop_after,
)
from mechedit.models.sites import Site


class UnhookedEngine:
    """Runs the unhooked copy, for plans that look at nothing but the residual that a stopped run ends with."""

    def __init__(self, model: Any, family: Family) -> None:
        self.model, self.family = model, family

    def can_run(self, plan: RunPlan) -> bool:
        """Whether the plan needs no hooks."""
        return plan.reads_final_residual_only

    def run(self, plan: RunPlan) -> Run:
        """Call the copy's own forward."""
        arguments, blocks, values = call_arguments(plan, self.model), blocks_of(self.model, self.family), {}
        mlp = blocks[-1].get_submodule(self.family.parts(len(blocks) - 1).narrowed)
        forwards, head_inputs = narrow_mlp(mlp, plan.logits_to_keep), list[Tensor]()
        forwards |= _head(self.model, plan, head_inputs)
        if plan.resume is not None:
            forwards |= skip_blocks(blocks[: plan.resume.layer], plan.resume.resid, self.family)
        if plan.stop_after is not None:
            forwards |= stop_after(blocks[plan.stop_after], plan.steps, values)
        run = Run(None, values)
        with replace_forwards(forwards), contextlib.suppress(RunStopped):
            run = Run(at_kept_positions(plan, arguments, self.model(**arguments).logits), values)
        return finished(plan, run, arguments, head_inputs)


class HookedEngine(ABC):
    """Runs the copy that a backend has wrapped, with the steps in the backend's hooks; it can run every plan."""

    def __init__(self, model: Any, family: Family, unhooked: Any = None) -> None:
        """Wrap `model`, a weight-sharing copy; modules without a step run in `unhooked` instead, if it is given."""
        self.model, self.family, self.unhooked = model, family, unhooked

    def can_run(self, plan: RunPlan) -> bool:
        """True: hooks can carry out any plan."""
        return True

    def run(self, plan: RunPlan) -> Run:
        """Call the wrapped copy's forward."""
        arguments, head_inputs = call_arguments(plan, self.model), list[Tensor]()
        with replace_forwards(self._shortcuts(plan) | _head(self.model, plan, head_inputs)):
            run = self.forward(arguments, plan.steps, plan.exit_site, unembed=plan.unembed)
        if run.final_logits is not None:
            run = Run(at_kept_positions(plan, arguments, run.final_logits), run.values)
        return finished(plan, run, arguments, head_inputs)

    @abstractmethod
    def forward(
        self, arguments: dict[str, Any], steps: Sequence[SiteStep], exit_site: Site | None, *, unembed: bool = True
    ) -> Run:
        """Call the wrapped copy, run the steps at their sites, and stop after `exit_site` if there is one.

        Without `unembed`, a module ends the run with `RunStopped`, and the run has no logits.
        """

    def _shortcuts(self, plan: RunPlan) -> Forwards:
        blocks, forwards = blocks_of(self.model, self.family), {}
        if plan.resume is not None:
            forwards |= skip_blocks(blocks[: plan.resume.layer], plan.resume.resid, self.family)
        if self.unhooked is not None:
            forwards |= bypass_hooks(self.model, self.unhooked, self.family, plan)
            last = blocks_of(self.unhooked, self.family)[-1]
            if forwards.get(blocks[-1]) is last:
                mlp = last.get_submodule(self.family.parts(len(blocks) - 1).narrowed)
                forwards |= narrow_mlp(mlp, plan.logits_to_keep)
        return forwards


def _head(model: Any, plan: RunPlan, head_inputs: list[Tensor]) -> Forwards:
    """The unembedding of the kept positions alone, or the end of the run before it."""
    if plan.unembed:
        return narrow_head(model, plan.positions_per_row)
    return end_before_head(model, plan.positions_per_row, head_inputs)


def finished(plan: RunPlan, run: Run, arguments: dict[str, Any], head_inputs: list[Tensor]) -> Run:
    """The run with the unembedding's input and the cache in it, where the plan asks for them."""
    if head_inputs:
        run = Run(None, run.values, None, at_kept_positions(plan, arguments, head_inputs[0]))
    return plan.finished(run, computed_cache(plan, arguments))


def call_arguments(plan: RunPlan, model: Any) -> dict[str, Any]:
    """Arguments of a transformers model's forward: ids and mask, and the cache where one is used or returned."""
    cache, mask = plan.kv_cache, plan.tokens.mask
    if cache is not None:
        mask = torch.cat([cache.mask.to(mask), mask], dim=1)
    keep = plan.logits_to_keep if plan.positions_per_row is None else 0
    arguments = {
        "input_ids": plan.tokens.ids,
        "attention_mask": mask,
        "use_cache": plan.use_cache,
    }
    if takes(model, "logits_to_keep"):
        arguments["logits_to_keep"] = keep
    if cache is not None and cache.lengths is not None:
        # By itself, the model would count the empty positions before a shorter row's cache.
        positions = cache.lengths[:, None] + torch.arange(plan.tokens.ids.shape[1], device=cache.lengths.device)
        arguments["position_ids"] = positions.clamp(max=max_positions(model.config) - 1).to(mask.device)
    if cache is not None or plan.use_cache:
        arguments["past_key_values"] = transformers_cache(cache)
    return arguments


def takes(model: Any, argument: str) -> bool:
    """Whether a transformers model's forward has an argument of its own by this name."""
    # A backend may have put another forward on the instance.
    return argument in inspect.signature(type(model).forward).parameters


def max_positions(config: Any) -> int:
    """The most positions that a model is made for, by its config; without a limit there, a large number."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None) or 1 << 20


def at_kept_positions(plan: RunPlan, arguments: dict[str, Any], states: Tensor) -> Tensor:
    """Logits, or the unembedding's input, at the positions that the plan keeps, of a model that computes all."""
    keep = plan.logits_to_keep
    if "logits_to_keep" in arguments or plan.positions_per_row is not None:
        return states
    return states[:, -keep:] if isinstance(keep, int) else states[:, keep]


def computed_cache(plan: RunPlan, arguments: dict[str, Any]) -> KVCache | None:
    """The cache that a call has filled, if the plan asks for it."""
    return kv_cache_of(arguments["past_key_values"], plan) if plan.use_cache else None


def kv_cache_of(cache: Any, plan: RunPlan) -> KVCache:
    """The keys and values that a plan's run has put into a transformers cache."""
    layers: Any = tuple((layer.keys, layer.values) for layer in cache.layers)
    count = plan.tokens.ids.shape[1]
    return KVCache(layers, None if plan.kv_cache is None else plan.kv_cache.lengths_with(count))


def transformers_cache(kv_cache: KVCache | None) -> DynamicCache:
    """A transformers cache that starts with the keys and values of `kv_cache`, without copying them."""
    # Without a config every layer keeps all positions, also those with a sliding window.
    cache = DynamicCache()
    for keys, values in kv_cache.layers if kv_cache is not None else ():
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache
