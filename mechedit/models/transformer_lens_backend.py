"""The TransformerLens backend: sites are hook points of a `TransformerBridge` around the twin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.sources import build_bridge_from_module

from mechedit.models.backend import Backbone
from mechedit.models.plan import Step, Stopped
from mechedit.models.protocol import Run, Site

_LEVEL = 2_000
"""Marks our hooks, so that only they are removed afterwards."""
_NAMES = {
    "attn_key": "attn.o.hook_in",
    "attn_out": "hook_attn_out",
    "mlp_key": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid": "hook_resid_post",
}


class TransformerLensModel(Backbone):
    """A model run by TransformerLens.

    The bridge keeps the raw weights (nothing is folded or centered). GPT-NeoX's fused attention matrix is the
    one weight it copies: an edit in place of that one would not be seen here.
    """

    backend = "transformer_lens"

    def _wrap(self, twin: nn.Module) -> nn.Module:
        config: Any = twin.config
        self.bridge = build_bridge_from_module(twin, self.family.architecture, hf_config=config)
        self.bridge.requires_grad_(False)
        if self.family.model_type == "olmo2":
            for block in self.bridge.blocks:
                for point in (block.attn.hook_rot_q, block.attn.hook_rot_k):
                    point.add_perma_hook(_cast_back(self.dtype))
        return twin

    def _forward(self, inputs: dict[str, Any], steps: Sequence[Step], end: Site | None) -> Run:
        values: dict[Site, Tensor] = {}
        with self._hooks(steps, values, end), contextlib.suppress(Stopped):
            # The twin and not the bridge is called: it takes ids and mask as they are.
            return Run(self.twin(**inputs).logits, values)
        return Run(None, values)

    @contextlib.contextmanager
    def _hooks(self, steps: Sequence[Step], values: dict[Site, Tensor], end: Site | None) -> Iterator[None]:
        points = []
        try:
            for step in steps:
                points.append(self._point(step.site))
                points[-1].add_hook(_visitor(step, values), level=_LEVEL)
            if end is not None:
                # Registered last, so that it runs after the reads and writes of the same place.
                points.append(self._point(end))
                points[-1].add_hook(_stop, level=_LEVEL)
            yield
        finally:
            for point in points:
                point.remove_hooks("fwd", level=_LEVEL)

    def _point(self, site: Site) -> Any:
        name = "hook_embed" if site.part == "embed" else f"blocks.{site.layer}.{_NAMES[site.part]}"
        point = self.bridge.get_hook_point(name)
        assert point is not None, name
        return point


def _visitor(step: Step, values: dict[Site, Tensor]) -> Callable[..., Tensor | None]:
    def visit(activation: Tensor, hook: Any) -> Tensor | None:
        if step.site.part != "attn_key":
            after = step(activation, values)
            return after if step.writes else None
        # Here heads have an axis of their own.
        after = step(activation.flatten(2), values)
        return after.unflatten(2, activation.shape[2:]) if step.writes else None

    return visit


def _cast_back(dtype: torch.dtype) -> Callable[..., Tensor]:
    """OLMo 2 rotates queries and keys in float32; the bridge leaves them so, and fails in half precision."""
    return lambda activation, hook: activation.to(dtype)


def _stop(activation: Tensor, hook: Any) -> None:
    raise Stopped
