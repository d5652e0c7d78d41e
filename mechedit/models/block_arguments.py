"""What a model's own forward gives to its blocks besides the residual stream: masks, positions, rotary tables.

They are recorded by running that forward with blocks that compute nothing, and kept for runs on batches of the same
shape and mask: a search runs one batch many times, and a trace one layer at a time.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mechedit.models.engines import call_arguments
from mechedit.models.family import Family
from mechedit.models.run_plan import RunPlan, RunStopped, SiteStep
from mechedit.models.shortcuts import Forwards, blocks_of, replace_forwards
from mechedit.models.sites import EMBED, Site

_CACHE = object()
"""Stands for the transformers cache among recorded arguments."""
_BATCHES = 8
"""Batches whose arguments are kept."""
_COLUMNS = 16
"""Columns of a small product that a CPU computes at once in float32."""


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which keys a query sees in one block."""

    additive: Float[Tensor, "row 1 query key"] | None
    """0 where a query sees a key, −∞ where not; None where all is seen, or all that is not later."""
    is_causal: bool
    """Whether each query sees itself and all before it, and there is no cache."""
    first: int
    """The first cached position that any query sees; those before it are not among the keys."""
    spare: int = 0
    """Columns at the end of `additive` that stand for no key, and that no query sees."""


@dataclass(frozen=True, eq=False)
class BlockArguments:
    """Arguments of every block in runs on one batch."""

    by_layer: list[dict[str, Any]]
    tokens_mask: Int[Tensor, "batch pos"]
    n_cached: int
    computed: dict[Hashable, Any] = field(default_factory=dict)
    """What was computed from the arguments so far."""

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """The value for a key, computed at its first use."""
        if key not in self.computed:
            self.computed[key] = compute()
        return self.computed[key]

    def of(self, layer: int, cache: Any) -> dict[str, Any]:
        """A block's arguments, with the run's own transformers cache among them."""
        return {name: cache if value is _CACHE else value for name, value in self.by_layer[layer].items()}

    def mask(self, layer: int, window: int | None = None) -> BlockMask:
        """A block's mask; `window` is one that attention applies itself."""
        recorded = self.by_layer[layer].get("attention_mask")
        return self.once(("mask", id(recorded), window), lambda: self._settled(recorded, window))

    def _settled(self, recorded: Tensor | None, window: int | None) -> BlockMask:
        n_queries, device = self.tokens_mask.shape[1], self.tokens_mask.device
        n_keys = self.n_cached + n_queries
        at = torch.arange(self.n_cached, n_keys, device=device)[:, None]
        keys = torch.arange(n_keys, device=device)
        if recorded is None:
            seen = (keys <= at) if self.n_cached == 0 else torch.ones_like(keys <= at)
            seen, dtype = seen[None], torch.get_default_dtype()
        else:
            if recorded.ndim != 4 or recorded.shape[1] != 1 or tuple(recorded.shape[2:]) != (n_queries, n_keys):
                raise ValueError(f"the attention mask is {tuple(recorded.shape)}")
            is_bool = recorded.dtype == torch.bool
            seen = (recorded if is_bool else recorded > torch.finfo(recorded.dtype).min / 2)[:, 0]
            dtype = torch.float32 if is_bool else recorded.dtype
        if window is not None:
            seen = seen & (at - keys < window)
        # What padding sees is of no account, but it must see something.
        seen = self._same_rows(seen | (at == keys))
        first = int(seen.flatten(0, 1).any(0).int().argmax()) if self.n_cached else 0
        seen = seen[..., first:]
        is_causal = self.n_cached == 0 and len(seen) == 1 and bool((seen[0] == (keys <= at)).all())
        if is_causal or bool(seen.all()):
            return BlockMask(None, is_causal and n_queries > 1, first)
        spare = _spare_keys(seen.shape[-1]) if device.type == "cpu" else 0
        seen = functional.pad(seen, (0, spare))
        additive = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)
        return BlockMask(additive[:, None], False, first, spare)

    def _same_rows(self, seen: Bool[Tensor, "row query key"]) -> Bool[Tensor, "_ query key"]:
        """One row where all rows' tokens see the same."""
        union = seen.any(0, keepdim=True)
        is_padding = ~self.tokens_mask.bool()[:, :, None]
        return union if bool(((seen == union) | is_padding).all()) else seen


def _spare_keys(count: int) -> int:
    """Keys to add to so many, none of whom any query sees, so that attention's products take the least time.

    These go by 16 columns, and the columns that are left over at the end cost more than another 16 from 9 of them on:
    torch's attention in float32 over 14 keys took 1.3 to 1.95 times as long as over 16 (heads of 32 to 256 numbers, 7
    to 32 queries, one core), over 24 about as long as over 32.
    """
    left_over = count % _COLUMNS
    return _COLUMNS - left_over if 2 * left_over > _COLUMNS else 0


class ArgumentRecorder:
    """Records the arguments of a copy's blocks, and keeps those of the batches that were run last."""

    def __init__(self, model: Any, family: Family) -> None:
        self.model, self.family = model, family
        self._recorded: OrderedDict[Hashable, tuple[BlockArguments, Any]] = OrderedDict()
        self.lock = threading.RLock()
        """Is taken while forwards of the copy's modules are replaced, and while what was recorded is looked up."""

    def begin(self, plan: RunPlan, values: dict[Site, Tensor]) -> tuple[Tensor, BlockArguments]:
        """The residual with which the run begins, and the blocks' arguments; a step at the embedding is carried out."""
        with self.lock:
            return self._begin(plan, values)

    def _begin(self, plan: RunPlan, values: dict[Site, Tensor]) -> tuple[Tensor, BlockArguments]:
        key = self._key(plan)
        entry = self._recorded.get(key)
        if entry is not None:
            self._recorded.move_to_end(key)
            if plan.resume is not None:
                return plan.resume.resid, entry[0]
        hidden, by_layer = self._record(plan, values, only_first=entry is not None)
        if entry is None:
            n_cached = 0 if plan.kv_cache is None else plan.kv_cache.length
            # The tensors of the key are kept alive, so that no other takes their place in memory.
            alive = (plan.tokens.mask, None if plan.kv_cache is None else plan.kv_cache.lengths)
            entry = BlockArguments(by_layer, plan.tokens.mask, n_cached), alive
            self._recorded[key] = entry
            if len(self._recorded) > _BATCHES:
                self._recorded.popitem(last=False)
        return (hidden if plan.resume is None else plan.resume.resid), entry[0]

    def clear(self) -> None:
        """Forget all arguments."""
        self._recorded.clear()

    def _key(self, plan: RunPlan) -> Hashable:
        cache, weight = plan.kv_cache, self.model.get_input_embeddings().weight
        prefix = None if cache is None else (cache.length, None if cache.lengths is None else _content(cache.lengths))
        # A tensor made in inference mode cannot be used for gradients.
        inference = torch.is_inference_mode_enabled()
        return (_content(plan.tokens.mask), prefix, plan.use_cache, weight.dtype, weight.device, inference)

    def _record(
        self, plan: RunPlan, values: dict[Site, Tensor], *, only_first: bool
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        blocks = blocks_of(self.model, self.family)
        arguments = call_arguments(plan, self.model)
        # The hidden states at the first block are all that a batch whose arguments are there still needs.
        blocks = blocks[:1] if only_first else blocks
        calls = _BlockCalls(len(blocks), self.family.tuple_items, arguments.get("past_key_values"))
        forwards: Forwards = {block: partial(calls.record, block) for block in blocks}
        step = next((step for step in plan.steps if step.site == EMBED), None)
        embedding = self.model.get_submodule(self.family.embedding)
        if plan.resume is not None:
            forwards[embedding] = partial(_nothing_embedded, self.model.get_input_embeddings().weight)
        elif step is not None:
            forwards |= _visited_embedding(embedding, step, plan, values)
        with replace_forwards(forwards), contextlib.suppress(RunStopped):
            self.model(**arguments)
        return calls.hidden[0], calls.by_layer


@dataclass(frozen=True, eq=False)
class _BlockCalls:
    """The calls of a copy's blocks in one run, which ends with the last of them."""

    n_blocks: int
    tuple_items: int
    cache: Any
    by_layer: list[dict[str, Any]] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)

    def record(self, block: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Stand for a block's forward, and return the states as they came."""
        signature, variable = _forward_signature(type(block))
        bound = signature.bind(block, *args, **kwargs).arguments
        _, hidden_name, *names = bound
        hidden, entries = bound[hidden_name], {name: bound[name] for name in names}
        entries |= entries.pop(variable, {})
        self.hidden.append(hidden)
        self.by_layer.append({name: _CACHE if _is(value, self.cache) else value for name, value in entries.items()})
        if len(self.by_layer) == self.n_blocks:
            raise RunStopped
        return (hidden, *[None] * (self.tuple_items - 1)) if self.tuple_items else hidden


@cache
def _forward_signature(block_type: type) -> tuple[inspect.Signature, str]:
    """Signature of a block's own forward, and the name of its variable keyword arguments."""
    # A backend or accelerate may have put another forward on the instance.
    signature = inspect.signature(block_type.forward)  # type: ignore[attr-defined]
    kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}
    return signature, kinds.get(inspect.Parameter.VAR_KEYWORD, "")


def _is(value: Any, cache: Any) -> bool:
    return cache is not None and value is cache


def _visited_embedding(module: Any, step: SiteStep, plan: RunPlan, values: dict[Site, Tensor]) -> Forwards:
    compute, (rows, width) = module.forward, plan.tokens.ids.shape

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return step.on_module(compute(*args, **kwargs), (rows, width), values)

    return {module: forward}


def _nothing_embedded(weight: Tensor, ids: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands for the embedding of tokens in a run that resumes behind it: zeros, which take no memory."""
    return weight.new_zeros(()).expand(*ids.shape, weight.shape[1])


def _content(tensor: Tensor) -> Hashable:
    """What tells a tensor's values: the values themselves, or on an accelerator, which one waits for, the memory."""
    if tensor.device.type == "cpu":
        return (tuple(tensor.shape), tensor.numpy().tobytes())
    return (tuple(tensor.shape), tensor.stride(), tensor.data_ptr(), tensor._version)
