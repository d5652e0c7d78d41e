"""Causal tracing by the published schedule, on plain transformers with torch hooks, on any family.

For every cell one forward pass of eleven rows (one clean, ten corrupted), all layers, all positions, all logits. What
it severs is precomputed, which spares it the second pass that the published notebook takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mechedit as me
from benchmarks.plain_model import Hook, PlainModel, first_item, hooks, with_first_item
from mechedit.models import EMBED, Site
from mechedit.trace.config import PART_OF_KIND
from mechedit.trace.corruption import draw_noise
from mechedit.trace.traced_fact import TracedFact


class PublishedTracing:
    """The published schedule on one fact; making it takes the run that is made once per fact."""

    def __init__(self, model: me.Model, traced: TracedFact, config: me.TraceConfig, std: float) -> None:
        self.plain, self.traced, self.samples = PlainModel(model), traced, config.samples
        self.layers = range(model.n_layers)
        self.ids = torch.tensor([traced.ids], device=model.device).repeat(self.samples + 1, 1)
        self.subject = list(traced.subject)
        shape = (self.samples, len(traced.subject), model.d_model)
        draws = draw_noise(traced.fact, shape, config.corrupted_by, None, config.seed)
        self.noise = std * draws.to(model.device, model.dtype)
        self.outputs: dict[tuple[str, int], Tensor] = {}
        with hooks(self._noisy(), *self._keeping()):
            self.corrupted = self._probability()

    def cell(self, kind: str, sever: str, span: range, position: int) -> float:
        """Mean probability of the object over the noise samples, one state or window put back."""
        pairs = [self._noisy()]
        if sever != "nothing":
            last = self.subject[-1]
            for layer in self.layers:
                corrupted = self.outputs[sever, layer][:, last]
                pairs.append((self._module(layer, sever), self._writer(last, corrupted)))
        for layer in span:
            clean = self.outputs[kind, layer][:1, position].expand(self.samples + 1, -1)
            pairs.append((self._module(layer, kind), self._writer(position, clean)))
        with hooks(*pairs):
            return self._probability()

    def _probability(self) -> float:
        objects = self.traced.object_ids
        logits = self.plain.hf(self.ids, use_cache=False).logits
        # In float64: torch's float32 log_softmax is off by 1e-4 of P over Gemma 3's vocabulary.
        log_probs = logits[1:, self.traced.prompt_length - 1 :].double().log_softmax(-1)
        return log_probs[:, range(len(objects)), list(objects)].sum(1).exp().mean().item()

    def _noisy(self) -> Hook:
        def add(module: Any, inputs: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[1:, self.subject] += self.noise
            return output

        return self.plain.module(EMBED), add

    def _keeping(self) -> Iterator[Hook]:
        for kind in PART_OF_KIND:
            for layer in self.layers:

                def keep(module: Any, inputs: Any, output: Any, key: tuple[str, int] = (kind, layer)) -> None:
                    self.outputs[key] = first_item(output).clone()

                yield self._module(layer, kind), keep

    @staticmethod
    def _writer(position: int, values: Tensor) -> Callable[..., Any]:
        def write(module: Any, inputs: Any, output: Any) -> Any:
            written = first_item(output).clone()
            written[1:, position] = values[1:]
            return with_first_item(output, written)

        return write

    def _module(self, layer: int, kind: str) -> nn.Module:
        return self.plain.module(Site(layer, PART_OF_KIND[kind]))
