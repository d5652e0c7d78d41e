"""Shortcuts through a copy's modules: forwards that are replaced for one run, to compute less or to stop early.

Each function returns the replacements as `Forwards`; `replace_forwards` puts them in place and takes them back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from mechedit.models.family import Family
from mechedit.models.protocol import LogitsToKeep
from mechedit.models.run_plan import RunPlan, RunStopped, SiteStep
from mechedit.models.sites import Site

Forwards = dict[nn.Module, Callable[..., Any]]
"""The function that each module computes in place of its own forward."""
_ABSENT = object()


@contextlib.contextmanager
def replace_forwards(forwards: Forwards) -> Iterator[None]:
    """Let modules compute other functions, and give them their own forward back at the end.

    The model's list of blocks stays as it is, because some models look up masks and layer types by a block's index.
    """
    # A backend may have put a forward of its own on the instance, so it is put back and not just removed.
    saved = {module: module.__dict__.get("forward", _ABSENT) for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in saved.items():
            if forward is _ABSENT:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def blocks_of(model: nn.Module, family: Family) -> list[nn.Module]:
    """A copy's blocks."""
    return list(model.get_submodule(family.blocks).children())


def skip_blocks(blocks: Sequence[nn.Module], resid: Float[Tensor, "batch pos d_model"], family: Family) -> Forwards:
    """Blocks return a cached residual instead of computing one."""
    output = (resid, *[None] * (family.tuple_items - 1)) if family.tuple_items else resid
    return dict.fromkeys(blocks, lambda *args, **kwargs: output)


def stop_after(block: nn.Module, steps: Sequence[SiteStep], values: dict[Site, Tensor]) -> Forwards:
    """A block runs the steps on the residual that it returns, and then ends the run with `RunStopped`."""
    compute = block.forward

    def forward(*args: Any, **kwargs: Any) -> None:
        output = compute(*args, **kwargs)
        for step in steps:
            step(output[0] if isinstance(output, tuple) else output, values)
        raise RunStopped

    return {block: forward}


def narrow_mlp(mlp: nn.Module, positions: LogitsToKeep) -> Forwards:
    """The last block's MLP computes the kept positions alone, because no other is passed on; the others get 0."""
    if not isinstance(positions, Tensor):
        return {}
    compute = mlp.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden.ndim != 3 or positions.shape[-1] >= hidden.shape[1]:
            return compute(hidden, *args, **kwargs)
        at = positions.to(hidden.device).expand(len(hidden), -1)[..., None]
        output = compute(hidden.take_along_dim(at, 1), *args, **kwargs)
        first, *rest = output if isinstance(output, tuple) else (output,)
        # Some experts return their rows joined.
        states = first.unflatten(0, at.shape[:2]) if first.ndim == 2 else first
        full = hidden.new_zeros(*hidden.shape[:-1], states.shape[-1]).scatter(1, at.expand_as(states), states)
        full = full.flatten(0, 1) if first.ndim == 2 else full
        return (full, *rest) if isinstance(output, tuple) else full

    return {mlp: forward}


def narrow_head(model: Any, positions: Int[Tensor, "batch kept"] | None) -> Forwards:
    """The unembedding sees each row's kept positions alone; everything after it works position by position."""
    if positions is None:
        return {}
    head = model.get_output_embeddings()
    compute = head.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return compute(hidden.take_along_dim(positions[..., None].to(hidden.device), 1), *args, **kwargs)

    return {head: forward}


def end_before_head(
    model: Any, positions: Int[Tensor, "batch kept"] | None, inputs: list[Float[Tensor, "batch kept d_model"]]
) -> Forwards:
    """The unembedding puts its input into `inputs`, each row's positions alone where it has some, and ends the run."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> None:
        inputs.append(hidden if positions is None else hidden.take_along_dim(positions[..., None].to(hidden.device), 1))
        raise RunStopped

    return {model.get_output_embeddings(): forward}


def bypass_hooks(hooked: nn.Module, unhooked: nn.Module, family: Family, plan: RunPlan) -> Forwards:
    """Blocks without a step, and modules of other blocks without one, run without the backend's slower hooks."""
    visited = {step.site.layer: set[str]() for step in plan.steps if step.site.part != "embed"}
    if plan.stop_after is not None:
        visited[plan.stop_after] = set()
    for step in plan.steps:
        visited.get(step.site.layer, set()).update(family.parts(step.site.layer).modules_of(step.site.part))
    forwards: Forwards = {}
    pairs = list(zip(blocks_of(hooked, family), blocks_of(unhooked, family), strict=True))
    for layer, (slow, fast) in list(enumerate(pairs))[plan.first_layer :]:
        forwards |= {slow: fast} if layer not in visited else _bypass_children(slow, fast, visited[layer])
    return forwards


def _bypass_children(slow: nn.Module, fast: nn.Module, visited: set[str]) -> Mapping[nn.Module, nn.Module]:
    """A block's modules but the visited ones."""
    names = [name for name, _ in fast.named_children() if name not in visited]
    return {slow.get_submodule(name): fast.get_submodule(name) for name in names}
