"""The TransformerLens backend: sites are hook points of a `TransformerBridge` around a copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.sources import build_bridge_from_module

from mechedit.errors import first_line
from mechedit.models.backend import BackendModel
from mechedit.models.family import Family
from mechedit.models.hook_points import HookPointEngine, ModulePoint
from mechedit.models.sites import Site
from mechedit.models.unsupported import UnsupportedModelError

_HOOK_POINTS = {"attn_key": "attn.o.hook_in", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}
"""Hook points whose components do not lie where the modules were, in some architectures."""


class TransformerLensEngine(HookPointEngine):
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
            raise UnsupportedModelError(
                "TransformerLens differs",
                f"TransformerLens cannot wrap this {family.architecture} ({type(error).__name__}: "
                f"{first_line(error)}); pass backend='nnsight', which wraps any module",
            ) from error
        self.bridge.requires_grad_(False)
        if family.model_type == "olmo2":
            for block in self.bridge.blocks:
                for point in (block.attn.hook_rot_q, block.attn.hook_rot_k):
                    point.add_perma_hook(_cast_to(dtype))

    def point(self, site: Site) -> Any:
        """The hook point of a site; see `HookPointEngine.point`."""
        # The bridge puts its components where the modules were, so that most paths lead to the hook points.
        side = "hook_in" if site.part in ("attn_key", "mlp_key") else "hook_out"
        with contextlib.suppress(AttributeError):
            point = getattr(self.model.get_submodule(self.family.path(site)), side)
            if isinstance(point, HookPoint):
                return point
        point = self.bridge.get_hook_point(f"blocks.{site.layer}.{_HOOK_POINTS.get(site.part)}")
        # Modules that an adapter leaves as they are have no hook point, but are run as they are.
        return ModulePoint(self.model.get_submodule(self.family.path(site)), side) if point is None else point


class TransformerLensModel(BackendModel):
    """A model run by TransformerLens."""

    backend = "transformer_lens"
    engine = TransformerLensEngine


def _cast_to(dtype: torch.dtype) -> Callable[..., Tensor]:
    """OLMo 2 rotates queries and keys in float32; the bridge leaves them so, and fails in half precision."""
    return lambda activation, hook: activation.to(dtype)
