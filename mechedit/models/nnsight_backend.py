"""The nnsight backend: sites are outputs and inputs of the envoys of an `NNsight` around a copy."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from nnsight import NNsight
from torch import Tensor

from mechedit.models.backend import BackendModel
from mechedit.models.engines import HookedEngine
from mechedit.models.family import Family
from mechedit.models.protocol import Run
from mechedit.models.run_plan import RunStopped, SiteStep
from mechedit.models.sites import Site


class NNsightEngine(HookedEngine):
    """Runs a copy in nnsight's traces."""

    def __init__(self, model: Any, family: Family, unhooked: Any = None) -> None:
        super().__init__(model, family, unhooked)
        self.nnsight: Any = NNsight(model)

    def forward(
        self, arguments: dict[str, Any], steps: Sequence[SiteStep], exit_site: Site | None, *, unembed: bool = True
    ) -> Run:
        """Trace the copy; see `HookedEngine.forward`."""
        # Values outlive the trace because they are put into containers made outside it.
        values: dict[Site, Tensor] = {}
        logits: list[Tensor] = []
        shape = tuple(arguments["input_ids"].shape)
        visits = [(step, self._envoy(step.site)) for step in steps]
        exits_at_last_step = steps and steps[-1].site == exit_site
        exit_envoy = None if exit_site is None or exits_at_last_step else self._envoy(exit_site)
        model = self.nnsight
        # A trace that has nothing left to wait for lets `RunStopped` through.
        with contextlib.suppress(RunStopped), model.trace(**arguments) as tracer:
            for step, envoy in visits:
                _visit(step, envoy, shape, values)
            if exit_envoy is not None:
                _ = exit_envoy.output
            if exit_site is not None:
                tracer.stop()
            elif unembed:
                logits.append(model.output.logits)
        return Run(logits[0] if logits else None, values)

    def _envoy(self, site: Site) -> Any:
        return self.nnsight.get(self.family.path(site))


class NNsightModel(BackendModel):
    """A model run by nnsight."""

    backend = "nnsight"
    engine = NNsightEngine


def _visit(step: SiteStep, envoy: Any, shape: tuple[int, int], values: dict[Site, Tensor]) -> None:
    """Read and write one site inside a trace."""
    if step.site.part in ("attn_key", "mlp_key"):
        after = step.on_module(envoy.input, shape, values)
        if step.writes:
            envoy.input = after
        return
    output = envoy.output
    if not isinstance(output, tuple):
        after = step.on_module(output, shape, values)
        if step.writes:
            envoy.output = after
        return
    after = step.on_module(output[0], shape, values)
    if step.writes:
        # The tuple is rebuilt: a bare tensor in its place is silently unpacked along a batch of two.
        envoy.output = (after, *output[1:])
