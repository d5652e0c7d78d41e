"""The TransformerLens backend: sites are hook points of a `TransformerBridge` around a copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.sources import build_bridge_from_module

from mechedit.models.backend import BackendModel
from mechedit.models.engines import HookedEngine
from mechedit.models.family import Family
from mechedit.models.protocol import Run
from mechedit.models.run_plan import RunStopped, SiteStep
from mechedit.models.sites import Site
from mechedit.models.unsupported import UnsupportedModelError

_LEVEL = 2_000
"""Level that marks our hooks, so that only they are removed afterwards."""
_HOOK_POINTS = {"attn_key": "attn.o.hook_in", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}
"""Hook points whose components do not lie where the modules were, in some architectures."""


class TransformerLensEngine(HookedEngine):
    """Runs a copy with TransformerLens's hook points.

    The bridge keeps the raw weights (nothing is folded or centered). GPT-NeoX's fused attention matrix is the
    one weight it copies: an edit in place of that one would not be seen here.
    """

    def __init__(self, model: Any, family: Family, unhooked: Any = None) -> None:
        super().__init__(model, family, unhooked)
        dtype = model.get_submodule(family.embedding).weight.dtype
        if family.architecture not in SUPPORTED_ARCHITECTURES:
            raise UnsupportedModelError(
                "no TransformerLens adapter",
                f"TransformerLens has no adapter for {family.architecture}; expected one of the "
                f"{len(SUPPORTED_ARCHITECTURES)} architectures that it knows: pass backend='nnsight', which needs none",
            )
        try:
            self.bridge = build_bridge_from_module(model, family.architecture, hf_config=model.config)
        except Exception as error:
            # TransformerLens's own code, on an architecture that it may know in another form.
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise UnsupportedModelError(
                "TransformerLens differs",
                f"TransformerLens cannot wrap this {family.architecture} ({type(error).__name__}: {reason}); "
                f"pass backend='nnsight', which wraps any module",
            ) from error
        self.bridge.requires_grad_(False)
        if family.model_type == "olmo2":
            for block in self.bridge.blocks:
                for point in (block.attn.hook_rot_q, block.attn.hook_rot_k):
                    point.add_perma_hook(_cast_to(dtype))

    def forward(
        self, arguments: dict[str, Any], steps: Sequence[SiteStep], exit_site: Site | None, *, unembed: bool = True
    ) -> Run:
        """Call the copy with hooks; see `HookedEngine.forward`."""
        values: dict[Site, Tensor] = {}
        shape = tuple(arguments["input_ids"].shape)
        with self._hooks(steps, shape, values, exit_site), contextlib.suppress(RunStopped):
            # The copy and not the bridge is called: it takes ids and mask as they are.
            return Run(self.model(**arguments).logits, values)
        return Run(None, values)

    @contextlib.contextmanager
    def _hooks(
        self, steps: Sequence[SiteStep], shape: tuple[int, int], values: dict[Site, Tensor], exit_site: Site | None
    ) -> Iterator[None]:
        points = []
        try:
            for step in steps:
                points.append(self._point(step.site))
                points[-1].add_hook(_visitor(step, shape, values), level=_LEVEL)
            if exit_site is not None:
                # Registered last, so that it runs after the reads and writes of the same site.
                points.append(self._point(exit_site))
                points[-1].add_hook(_stop, level=_LEVEL)
            yield
        finally:
            for point in points:
                point.remove_hooks("fwd", level=_LEVEL)

    def _point(self, site: Site) -> Any:
        # The bridge puts its components where the modules were, so that most paths lead to the hook points.
        side = "hook_in" if site.part in ("attn_key", "mlp_key") else "hook_out"
        with contextlib.suppress(AttributeError):
            point = getattr(self.model.get_submodule(self.family.path(site)), side)
            if isinstance(point, HookPoint):
                return point
        point = self.bridge.get_hook_point(f"blocks.{site.layer}.{_HOOK_POINTS.get(site.part)}")
        # Modules that an adapter leaves as they are have no hook point, but are run as they are.
        return _ModulePoint(self.model.get_submodule(self.family.path(site)), side) if point is None else point


class _ModulePoint:
    """The input or output of a plain module, with the methods of a `HookPoint` that are used here."""

    def __init__(self, module: nn.Module, side: str) -> None:
        self.module, self.side = module, side
        self.handles: list[RemovableHandle] = []

    def add_hook(self, visit: Callable[..., Tensor | None], level: int) -> None:
        """Call `visit` on the module's first input, or on its output (the first item of a tuple)."""

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            after = visit(args[0], None)
            return None if after is None else (after, *args[1:])

        def behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            after = visit(output[0] if isinstance(output, tuple) else output, None)
            return (after, *output[1:]) if isinstance(output, tuple) and after is not None else after

        if self.side == "hook_in":
            self.handles.append(self.module.register_forward_pre_hook(before))
        else:
            self.handles.append(self.module.register_forward_hook(behind))

    def remove_hooks(self, direction: str, level: int) -> None:
        """Remove what was added."""
        while self.handles:
            self.handles.pop().remove()


class TransformerLensModel(BackendModel):
    """A model run by TransformerLens."""

    backend = "transformer_lens"
    engine = TransformerLensEngine


def _visitor(step: SiteStep, shape: tuple[int, int], values: dict[Site, Tensor]) -> Callable[..., Tensor | None]:
    def visit(activation: Tensor, hook: Any) -> Tensor | None:
        after = step.on_module(activation, shape, values)
        return after if step.writes else None

    return visit


def _cast_to(dtype: torch.dtype) -> Callable[..., Tensor]:
    """OLMo 2 rotates queries and keys in float32; the bridge leaves them so, and fails in half precision."""
    return lambda activation, hook: activation.to(dtype)


def _stop(activation: Tensor, hook: Any) -> None:
    raise RunStopped
