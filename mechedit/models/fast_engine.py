"""The fast engine of every family: a run goes from block to block, without the model's own forward around them.

What that forward gives to its blocks is recorded once for a batch (`block_arguments`). Blocks of known architectures
are computed by `fast_block`; all others through their own modules, whose inputs and outputs the steps of a run visit.
Nothing is embedded where a run resumes, and nothing is unembedded where it stops. Whether all of this gives what the
model gives is measured when it is loaded (`engine_check`); where it does not, the other engines run it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.models.block_arguments import ArgumentRecorder, BlockArguments
from mechedit.models.block_layout import BlockLayout, block_layout, is_matrix
from mechedit.models.engines import kv_cache_of, transformers_cache
from mechedit.models.family import Family
from mechedit.models.fast_block import FastBlock, select
from mechedit.models.fast_norm import Norm, fast_norm
from mechedit.models.kv_cache import KVCache
from mechedit.models.packing import Packing
from mechedit.models.protocol import Run
from mechedit.models.run_plan import RunPlan, RunStopped, SiteStep
from mechedit.models.shortcuts import Forwards, blocks_of, end_before_head, narrow_mlp, replace_forwards, skip_blocks
from mechedit.models.sites import Site

Way = Literal["operations", "modules", "off"]
"""How blocks are computed: by operations of our own, by their modules, or not by this engine."""


class FastEngine:
    """Runs the unhooked copy block by block."""

    def __init__(self, model: Any, family: Family) -> None:
        self.model, self.family = model, family
        self.way: Way = "off"
        """Off until `engine_check` has found the fastest way that gives the model's own numbers."""
        self.reason = "not checked"
        """Why a faster way is not taken."""
        self._arguments = ArgumentRecorder(model, family)
        self._layouts: list[BlockLayout] | None = None
        self._final_norm: tuple[Norm, bool] | None = None

    def prepare(self, way: Way) -> bool:
        """Take a way of computing blocks; false if the model's blocks cannot be computed so."""
        self._arguments.clear()
        if way == "operations":
            self._layouts = self._read_layouts()
            if self._layouts is None:
                return False
        else:
            self._layouts = None
        if way != "off":
            self._final_norm = self._find_final_norm()
        self.way = way
        return True

    @property
    def runs_at_once(self) -> bool:
        """Whether several threads may run at once: none replaces the forward of a module that another calls."""
        return self.way == "operations" and self._is_in_one_place

    @property
    def skips_padding(self) -> bool:
        """Whether padding is computed in attention alone (`packing`)."""
        return self.way == "operations" and self._is_in_one_place

    @property
    def _is_in_one_place(self) -> bool:
        devices = {next(block.parameters()).device for block in blocks_of(self.model, self.family)}
        devices.add(self.model.get_input_embeddings().weight.device)
        return len(devices) == 1 and devices.pop().type != "meta"

    def can_run(self, plan: RunPlan) -> bool:
        """Whether the model's weights are in one place, and the cache that is asked for has all layers."""
        if self.way == "off" or (plan.use_cache and plan.resume is not None):
            return False
        return self._is_in_one_place

    def run(self, plan: RunPlan) -> Run:
        """One forward pass, up to the plan's exit site when there is one."""
        values: dict[Site, Tensor] = {}
        hidden, arguments = self._arguments.begin(plan, values)
        compute = self._by_modules if self._layouts is None else self._by_operations
        hidden, cache, is_narrow = compute(plan, hidden, arguments, values)
        if plan.exit_site is not None:
            return Run(None, values, cache)
        return self._finished(hidden if is_narrow else _at_kept(hidden, plan), plan.unembed, values, cache)

    def _by_operations(
        self, plan: RunPlan, hidden: Tensor, arguments: BlockArguments, values: dict[Site, Tensor]
    ) -> tuple[Tensor, KVCache | None, bool]:
        """The last residual, the cache, and whether the residual has the kept positions alone."""
        assert self._layouts is not None, "the way was prepared"
        cache, exit_site, last = plan.kv_cache, plan.exit_site, self._last(plan)
        positions = _kept_in_last_block(plan, last)
        packing = arguments.once("packing", lambda: Packing.of(plan.tokens.mask))
        if positions is not None and packing is not None and packing.count(positions) >= len(packing.token_of):
            positions = None
        hidden = hidden if packing is None else packing.pack(hidden)
        computed: list[Any] = []
        for layer in range(plan.first_layer, last + 1):
            block = FastBlock(
                self._layouts[layer],
                layer,
                arguments,
                _steps(plan, layer),
                values,
                positions if layer == last else None,
                packing,
            )
            exit_part = exit_site.part if exit_site is not None and layer == last else "resid"
            cached = None if cache is None else cache.layers[layer]
            hidden, keys_and_values = block.run(hidden, cached, exit_part, use_cache=plan.use_cache)
            computed.append(keys_and_values)
        lengths = None if cache is None else cache.lengths_with(plan.tokens.ids.shape[1])
        if packing is not None and positions is None and exit_site is None:
            hidden = packing.unpack(hidden)
        return hidden, KVCache(tuple(computed), lengths) if plan.use_cache else None, positions is not None

    def _by_modules(
        self, plan: RunPlan, hidden: Tensor, arguments: BlockArguments, values: dict[Site, Tensor]
    ) -> tuple[Tensor, KVCache | None, bool]:
        """As `_by_operations`, through the blocks' own modules."""
        blocks, last = blocks_of(self.model, self.family), self._last(plan)
        has_cache = plan.kv_cache is not None or plan.use_cache
        cache = transformers_cache(plan.kv_cache) if has_cache else None
        for layer in range(plan.first_layer, last + 1):
            forwards = self._visits(plan, layer, values)
            if layer == last and plan.exit_site is None and not _steps(plan, layer):
                mlp = blocks[layer].get_submodule(self.family.parts(layer).narrowed)
                forwards |= narrow_mlp(mlp, plan.logits_to_keep)
            with replace_forwards(forwards), contextlib.suppress(RunStopped):
                output = blocks[layer](hidden, **arguments.of(layer, cache))
                hidden = output[0] if isinstance(output, tuple) else output
            step = _steps(plan, layer).get("resid")
            if step is not None:
                hidden = step(hidden, values)
        if not plan.use_cache:
            return hidden, None, False
        assert cache is not None, "it was made above"
        return hidden, kv_cache_of(cache, plan), False

    def _visits(self, plan: RunPlan, layer: int, values: dict[Site, Tensor]) -> Forwards:
        """Forwards of a block's modules that carry out the steps at its parts, and stop after the last one."""
        forwards: Forwards = {}
        for part, step in _steps(plan, layer).items():
            if part == "resid":
                continue
            module = self.model.get_submodule(self.family.path(step.site))
            compute = forwards.get(module) or module.forward
            ends = step.site == plan.exit_site
            visit = _visited_input if part in ("attn_key", "mlp_key") else _visited_output
            forwards[module] = visit(compute, step, tuple(plan.tokens.ids.shape), values, ends)
        return forwards

    def _finished(self, hidden: Tensor, unembed: bool, values: dict[Site, Tensor], cache: KVCache | None) -> Run:
        """The run with logits, or the unembedding's input, from the last residual at the kept positions."""
        norm, is_plain = self._final_norm or (None, False)
        if norm is not None and (is_plain or not unembed):
            head_inputs = norm(hidden)
            if not unembed:
                return Run(None, values, cache, head_inputs)
            return Run(self.model.get_output_embeddings()(head_inputs), values, cache)
        # Everything after the blocks works position by position, so that each position may be a row of its own.
        logits, head_inputs = self._by_own_forward(hidden.flatten(0, 1)[:, None], unembed=unembed)
        shape = hidden.shape[:2]
        if not unembed:
            return Run(None, values, cache, head_inputs[0][:, 0].unflatten(0, shape))
        assert logits is not None, "the run was not ended"
        return Run(logits[:, 0].unflatten(0, shape), values, cache)

    def _by_own_forward(self, states: Tensor, *, unembed: bool) -> tuple[Tensor | None, list[Tensor]]:
        """Logits, or the unembedding's input, from the model's own forward with its blocks skipped."""
        head_inputs: list[Tensor] = []
        forwards = skip_blocks(blocks_of(self.model, self.family), states, self.family)
        if not unembed:
            forwards |= end_before_head(self.model, None, head_inputs)
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        with self._arguments.lock, replace_forwards(forwards), contextlib.suppress(RunStopped):
            return self.model(input_ids=ids, use_cache=False).logits, head_inputs
        return None, head_inputs

    @torch.no_grad()
    def _find_final_norm(self) -> tuple[Norm, bool] | None:
        """The module between the last block and the unembedding, and whether logits are the unembedding's output."""
        weight = self.model.get_output_embeddings().weight
        width = self.model.get_input_embeddings().weight.shape[1]
        states = torch.randn(3, 1, width, generator=torch.Generator().manual_seed(0)).to(weight)
        logits, _ = self._by_own_forward(states, unembed=True)
        _, (head_input,) = self._by_own_forward(states, unembed=False)
        inside = {module for block in blocks_of(self.model, self.family) for module in block.modules()}
        for module in self.model.modules():
            if module in inside or not isinstance(getattr(module, "weight", None), Tensor) or module.weight.ndim != 1:
                continue
            if module.weight.shape[0] != width or not torch.equal(module(states), head_input):
                continue
            norm = fast_norm(module)
            assert norm is not None, "there is a module"
            return norm, logits is not None and torch.equal(self.model.get_output_embeddings()(head_input), logits)
        return None

    def _read_layouts(self) -> list[BlockLayout] | None:
        """The layouts of all blocks, if all are known."""
        config, layouts = self.model.config.get_text_config(), []
        for block in blocks_of(self.model, self.family):
            try:
                layout = block_layout(block, config)
            except (AttributeError, TypeError):
                # A class of this name that is built otherwise.
                return None
            if layout is None or not all(map(is_matrix, layout.matrices)):
                return None
            layouts.append(layout)
        return layouts

    def _last(self, plan: RunPlan) -> int:
        """The last block that is run."""
        return len(blocks_of(self.model, self.family)) - 1 if plan.stop_after is None else plan.stop_after


def _steps(plan: RunPlan, layer: int) -> dict[str, SiteStep]:
    """The steps in a block, by part."""
    return {step.site.part: step for step in plan.steps if step.site.layer == layer and step.site.part != "embed"}


def _kept_positions(plan: RunPlan) -> Int[Tensor, "*batch kept"] | None:
    """The positions whose logits are kept; None where all are."""
    keep = plan.logits_to_keep
    if isinstance(keep, Tensor):
        return keep
    width = plan.tokens.ids.shape[1]
    return torch.arange(max(width - keep, 0), width, device=plan.tokens.ids.device) if keep else None


def _kept_in_last_block(plan: RunPlan, last: int) -> Int[Tensor, "*batch kept"] | None:
    """The positions that alone go through the last block; None where all do.

    All do where a step reads the block, or writes anywhere but to what is added there.
    """
    steps = _steps(plan, last)
    # What is written at a key is counted among all positions.
    only_added = all(part in ("attn_out", "mlp_out", "resid") for part in steps)
    if plan.exit_site is not None or any(step.read for step in steps.values()):
        return None
    return _kept_positions(plan) if only_added else None


def _at_kept(hidden: Float[Tensor, "batch pos d_model"], plan: RunPlan) -> Float[Tensor, "batch kept d_model"]:
    """The residual at the positions whose logits are kept."""
    keep = _kept_positions(plan)
    return hidden if keep is None else select(hidden, keep)


def _visited_input(
    compute: Callable[..., Any], step: SiteStep, shape: Sequence[int], values: dict[Site, Tensor], ends: bool
) -> Callable[..., Any]:
    """A module's forward, behind the step at its input."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = step.on_module(hidden, (shape[0], shape[1]), values)
        if ends:
            raise RunStopped
        return compute(hidden, *args, **kwargs)

    return forward


def _visited_output(
    compute: Callable[..., Any], step: SiteStep, shape: Sequence[int], values: dict[Site, Tensor], ends: bool
) -> Callable[..., Any]:
    """A module's forward, with the step at its output; of a tuple the first item counts."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = compute(*args, **kwargs)
        states, *rest = output if isinstance(output, tuple) else (output,)
        states = step.on_module(states, (shape[0], shape[1]), values)
        if ends:
            raise RunStopped
        return (states, *rest) if isinstance(output, tuple) else states

    return forward
