"""The nnsight backend: sites are outputs and inputs of the envoys of an `NNsight` around the twin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnsight import NNsight
from torch import Tensor, nn

from mechedit.models.backend import Backbone
from mechedit.models.plan import Step
from mechedit.models.protocol import Run, Site


class NNsightModel(Backbone):
    """A model run by nnsight."""

    backend = "nnsight"

    def _wrap(self, twin: nn.Module) -> nn.Module:
        self.nnsight: Any = NNsight(twin)
        return twin

    def _forward(self, inputs: dict[str, Any], steps: Sequence[Step], end: Site | None) -> Run:
        # Values outlive the trace because they are put into containers made outside it.
        values: dict[Site, Tensor] = {}
        logits: list[Tensor] = []
        model = self.nnsight
        visits = [(step, self._envoy(step.site)) for step in steps]
        last = None if end is None or (steps and steps[-1].site == end) else self._envoy(end)
        with model.trace(**inputs) as tracer:
            for step, envoy in visits:
                _visit(step, envoy, values)
            if last is not None:
                _ = last.output
            if end is None:
                logits.append(model.output.logits)
            else:
                tracer.stop()
        return Run(logits[0] if logits else None, values)

    def _envoy(self, site: Site) -> Any:
        if site.part == "embed":
            return self.nnsight.get(self.family.embedding)
        block = f"{self.family.blocks}.{site.layer}"
        paths = {
            "attn_key": f"{block}.{self.family.attn_proj}",
            "attn_out": f"{block}.{self.family.attn_out}",
            "mlp_key": f"{block}.{self.family.down}",
            "mlp_out": f"{block}.{self.family.mlp_out}",
            "resid": block,
        }
        return self.nnsight.get(paths[site.part])


def _visit(step: Step, envoy: Any, values: dict[Site, Tensor]) -> None:
    """Read and write one site inside a trace."""
    if step.site.part in ("attn_key", "mlp_key"):
        after = step(envoy.input, values)
        if step.writes:
            envoy.input = after
        return
    output = envoy.output
    if not isinstance(output, tuple):
        after = step(output, values)
        if step.writes:
            envoy.output = after
        return
    after = step(output[0], values)
    if step.writes:
        # The tuple is rebuilt: a bare tensor in its place is silently unpacked along a batch of two.
        envoy.output = (after, *output[1:])
