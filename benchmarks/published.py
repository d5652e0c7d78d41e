"""MEMIT by the published schedule, on plain transformers with torch hooks, for comparison and nothing else.

It does what the code published with the paper (github.com/kmeng01/memit) does, in our words, on any family, and costs
what that costs:

- the search for z takes a fact at a time: 25 forward passes of all its rows, padded together, over all layers and with
  all logits; the loss unembeds the last block's states a second time; 24 backward passes through both;
- second moments take a pass over the text for each layer, which ends at that layer, aᵀ a per batch in float32;
- keys take full forward passes of all prompts for each layer, states at the last layer full passes of the bare prompts;
- each layer solves a dense, unsymmetric system in float64, with a moment kept in float32.

Texts are tokenized by the same functions as ours, so that both see the same tokens. Modules are where `model.family`
says (`plain_model`); special tokens are not counted in the moments, as in ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import mechedit as me
from benchmarks.plain_model import PlainModel, first_item, hooks
from mechedit.batching import pad
from mechedit.data import fill
from mechedit.models import Site
from mechedit.prefixes import BARE, completed_prompts, prefixed_prompts
from mechedit.prompt_tokens import encode_documents, tokenize_prompt

ROWS = 128
"""Prompts in one forward pass for keys and states."""
TEXTS = 100
"""Texts that are sorted by length together."""
BATCH_LENGTH = 2048
"""A batch of texts has three times as many tokens as the model takes, or as this where it takes more."""


class _Stopped(Exception):  # noqa: N818
    """A forward pass has come as far as it was wanted."""


@dataclass(frozen=True)
class PublishedEditing:
    """The published schedule on one model."""

    model: me.Model
    prefixes: Sequence[str]

    @cached_property
    def plain(self) -> PlainModel:
        """The transformers model by its parts."""
        return PlainModel(self.model)

    def target(self, request: me.EditRequest, layer: int, config: me.TargetConfig) -> tuple[Tensor, Tensor]:
        """One fact's h and z."""
        hf, device, blocks = self.plain.hf, self.model.device, self.plain.blocks
        completed = completed_prompts(self.model, request, self.prefixes)
        kl_tokens = tokenize_prompt(self.model.tokenizer, fill(request.turn, config.kl_prompt), request.subject)
        tokens = pad(
            [[*prompt.ids, *object_ids[:-1]] for prompt, object_ids in completed] + [kl_tokens.ids],
            self.model.tokenizer,
            device,
        )
        positions = [prompt.last_subject for prompt, _ in completed] + [kl_tokens.last_subject]
        labels = torch.full_like(tokens.ids[:-1], -100)
        for row, (prompt, object_ids) in enumerate(completed):
            labels[row, len(prompt.ids) - 1 :][: len(object_ids)] = torch.tensor(object_ids, device=device)
        inputs = {"input_ids": tokens.ids, "attention_mask": tokens.mask, "use_cache": False}
        delta = torch.zeros(self.model.d_model, device=device, requires_grad=True)
        assert config.lr is not None, "the published code has an absolute learning rate"
        optimizer = torch.optim.Adam([delta], lr=config.lr)
        initial, before, last = torch.zeros(0), torch.zeros(0), torch.zeros(0)

        def add(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal initial
            states = first_item(output)
            if not len(initial):
                initial = states[0, positions[0]].detach().clone()
            for row, position in enumerate(positions):
                states[row, position, :] += delta

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal last
            last = first_item(output)

        for step in range(config.steps):
            optimizer.zero_grad()
            with hooks((blocks[layer], add), (blocks[-1], keep)):
                logits = hf(**inputs).logits
            now = logits[-1, positions[-1]][None].log_softmax(1)
            before = before if len(before) else now.detach().clone()
            log_probs = self.plain.logits(last[: len(completed)]).log_softmax(2)
            picked = log_probs.gather(2, labels.clamp(min=0)[..., None]).squeeze(2) * (labels != -100)
            nll = (-picked.sum(1) / (labels != -100).sum(1)).mean()
            drift = config.kl_weight * functional.kl_div(before, now, log_target=True, reduction="batchmean")
            loss = nll + drift + config.weight_decay * (delta.norm() / initial.norm() ** 2)
            if loss.item() < config.threshold or step == config.steps - 1:
                break
            loss.backward()
            optimizer.step()
            radius = config.clamp * initial.norm()
            if delta.norm() > radius:
                with torch.no_grad():
                    delta.mul_(radius / delta.norm())
        return initial, (initial + delta).detach()

    @torch.no_grad()
    def moment(self, texts: Sequence[str], layer: int, *, full_passes: bool = False) -> Tensor:
        """E[k kᵀ] of one layer, in float32; with `full_passes` up to the logits, as a plain hook has it."""
        total, count, keys = torch.zeros(0), 0, torch.zeros(0)

        def stop(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal keys
            keys = inputs[0]
            if not full_passes:
                raise _Stopped

        special = torch.tensor(self.model.tokenizer.all_special_ids or [-1], device=self.model.device)
        length = min(self.model.max_positions, BATCH_LENGTH)
        with hooks((self.plain.module(Site(layer, "mlp_key")), stop)):
            for start in range(0, len(texts), TEXTS):
                rows = encode_documents(self.model.tokenizer, texts[start : start + TEXTS], self.model.max_positions)
                for batch in _packed(rows, 3 * length):
                    tokens = pad(batch, self.model.tokenizer, self.model.device)
                    with contextlib.suppress(_Stopped):
                        self.plain.hf(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False)
                    counted = tokens.mask.bool() & ~torch.isin(tokens.ids, special)
                    batch_keys = keys.flatten(0, 1)[counted.flatten().nonzero()[:, 0]].float()
                    total = batch_keys.T.mm(batch_keys) if not count else total.add_(batch_keys.T.mm(batch_keys))
                    count += len(batch_keys)
        return total / count

    def keys(self, requests: Sequence[me.EditRequest], layer: int) -> Tensor:
        """The layer's key of each fact, [fact, d_mlp]: the mean of the bare prompt's and of the mean of the others."""
        rows = self._at(
            self.plain.module(Site(layer, "mlp_key")), requests, self.prefixes, lambda inputs, output: inputs[0]
        )
        return (rows[:, 0] + rows[:, 1:].mean(1)) / 2

    def states(self, requests: Sequence[me.EditRequest], layer: int) -> Tensor:
        """The state after the layer at each bare prompt, [fact, d_model]."""
        return self._at(self.plain.blocks[layer], requests, [BARE], lambda inputs, output: first_item(output))[:, 0]

    @torch.no_grad()
    def _at(
        self,
        module: nn.Module,
        requests: Sequence[me.EditRequest],
        prefixes: Sequence[str],
        part: Callable[[Any, Any], Tensor],
    ) -> Tensor:
        """Inputs or outputs of a module at the subject's last token, [fact, prefix, width], by full forward passes."""
        prompts = [prompt for request in requests for prompt in prefixed_prompts(self.model, request, prefixes)]
        rows, values = [], torch.zeros(0)

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal values
            values = part(inputs, output)

        with hooks((module, keep)):
            for start in range(0, len(prompts), ROWS):
                batch = prompts[start : start + ROWS]
                tokens = pad([prompt.ids for prompt in batch], self.model.tokenizer, self.model.device)
                self.plain.hf(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False)
                rows += [values[row, prompt.last_subject] for row, prompt in enumerate(batch)]
        return torch.stack(rows).unflatten(0, (len(requests), len(prefixes)))

    def edit(
        self,
        requests: Sequence[me.EditRequest],
        z: Tensor,
        layers: Sequence[int],
        moments: Mapping[int, Tensor],
        weight: float,
    ) -> dict[int, Tensor]:
        """ΔW of each layer, [d_mlp, d_model]; the model ends as it began."""
        weights = {layer: self.model.projection(layer).detach().clone() for layer in layers}
        changes = {}
        with torch.no_grad():
            for index, layer in enumerate(layers):
                keys = self.keys(requests, layer).T
                residuals = (z - self.states(requests, layers[-1])).T
                changes[layer] = solve(moments[layer], keys, residuals / (len(layers) - index), weight).T
                self.model.projection(layer).copy_(weights[layer] + changes[layer])
            for layer in layers:
                self.model.projection(layer).copy_(weights[layer])
        return changes


def solve(moment: Tensor, keys: Tensor, residuals: Tensor, weight: float) -> Tensor:
    """One layer's ΔW, [d_model, d_mlp]: the dense system by LU, in float64."""
    keys, residuals = keys.double(), residuals.double()
    adjusted = torch.linalg.solve(weight * moment.double() + keys @ keys.T, keys)
    return (residuals @ adjusted.T).float()


def _packed(rows: Sequence[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    """Longest first; a batch is full once another row would take it beyond `most` tokens."""
    batch: list[Sequence[int]] = []
    for row in sorted(rows, key=len, reverse=True):
        if not row:
            break
        if batch and len(batch[0]) * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
