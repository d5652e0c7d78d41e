"""The TransformerLens backend: sites are hook points of a `TransformerBridge` around a copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
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
        self.bridge = build_bridge_from_module(model, family.architecture, hf_config=model.config)
        self.bridge.requires_grad_(False)
        if family.model_type == "olmo2":
            for block in self.bridge.blocks:
                for point in (block.attn.hook_rot_q, block.attn.hook_rot_k):
                    point.add_perma_hook(_cast_to(dtype))

    def forward(self, arguments: dict[str, Any], steps: Sequence[SiteStep], exit_site: Site | None) -> Run:
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
        if point is None:
            raise UnsupportedModelError(
                "TransformerLens differs",
                f"TransformerLens has no hook point at {site} of {self.family.architecture} "
                f"({self.family.path(site)}); pass backend='nnsight', which needs none",
            )
        return point


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
