"""A batch of facts with all that stays the same while their δ move, and the loss of every fact at some δ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechedit.data import EditRequest
from mechedit.models import Model
from mechedit.targets.config import TargetConfig
from mechedit.targets.passes import Pass, Terms, halving, judge, prepare
from mechedit.targets.prompts import passes, rows_of

TERMS = ("loss", "nll", "kl", "decay", "probability")


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Some facts, some of which may share a δ."""

    model: Model
    layer: int
    config: TargetConfig
    unit: Int[Tensor, " fact"]
    """Whose δ a fact has."""
    share: Float[Tensor, " fact"]
    """Its part of the mean over the unit's facts."""
    initial: Float[Tensor, "fact part d_model"]
    """Clean states at the subject's last token, with the first prefix."""

    @property
    def n_units(self) -> int:
        """How many δ there are."""
        return int(self.unit.max()) + 1

    @property
    def radius(self) -> Float[Tensor, "unit part"]:
        """Of each ball: the smallest of the unit's facts'."""
        sizes = self.config.clamp * self.initial.norm(dim=2)
        return torch.stack([sizes[self.unit == unit].amin(0) for unit in range(self.n_units)])

    def decay(self, delta: Float[Tensor, "unit part d_model"]) -> Float[Tensor, " fact"]:
        """The weight decay of each fact's δ, as the convention has it."""
        size, before = delta[self.unit].norm(dim=2), self.initial.norm(dim=2)
        ratio = size / before**2 if self.config.convention == "memit-2022" else (size / before) ** 2
        return self.config.weight_decay * ratio.sum(1)

    def where_all(self, facts: Bool[Tensor, " fact"]) -> list[bool]:
        """For each unit, whether all of its facts are chosen."""
        lacking = set(self.unit[~facts].tolist())
        return [unit not in lacking for unit in range(self.n_units)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """Where the search stands at one δ."""

    terms: Float[Tensor, "fact term"]
    """`TERMS` of each fact; those of facts that have stopped mean nothing."""
    slope: Float[Tensor, "unit part d_model"]
    """Of what is minimized."""


def gather(
    model: Model, units: Sequence[Sequence[EditRequest]], layer: int, prefixes: Sequence[str], config: TargetConfig
) -> tuple[Batch, list[Pass]]:
    """Tokenize some facts and run the clean model on them."""
    requests = [request for unit in units for request in unit]
    owners = [place for place, unit in enumerate(units) for _ in unit]
    rows = rows_of(model, requests, owners, prefixes, config)
    initial = torch.zeros(len(requests), len(config.parts(model.module)), model.d_model, device=model.device)
    running = []
    together = passes(model, rows, config.pass_tokens)
    for made, bare, states in halving(together, lambda some: prepare(model, some, layer, config)):
        running.append(made)
        initial[made.fact[bare]] = states
    batch = Batch(
        model=model,
        layer=layer,
        config=config,
        unit=torch.tensor(owners, device=model.device),
        share=torch.tensor([1 / len(unit) for unit in units for _ in unit], device=model.device),
        initial=initial,
    )
    return batch, running


def measure(
    batch: Batch, running: Sequence[Pass], delta: Float[Tensor, "unit part d_model"], *, slopes: bool
) -> tuple[Measured, list[Pass]]:
    """The loss of every fact that still runs, and its slope; a pass that did not fit comes back in halves."""
    moved = delta.detach().requires_grad_(slopes)
    nll, probability = moved.new_zeros(2, len(batch.unit))
    kl, slope, done = moved.new_zeros(batch.n_units), torch.zeros_like(delta), []
    for rows, terms, own in halving(running, lambda rows: _of_pass(batch, rows, moved)):
        done.append(rows)
        nll.index_add_(0, rows.fact, rows.weight * terms.nll)
        probability.index_add_(0, rows.fact, rows.weight * terms.probability)
        kl.index_add_(0, batch.unit[rows.fact], terms.kl)
        slope += own
    decay = batch.decay(moved)
    if slopes:
        slope += torch.autograd.grad((batch.share * decay).sum(), moved)[0]
    drift = batch.config.kl_weight * kl[batch.unit]
    decay = decay.detach()
    terms = torch.stack([nll + drift + decay, nll, drift, decay, probability], 1)
    return Measured(terms=terms, slope=slope.detach()), done


def _of_pass(
    batch: Batch, rows: Pass, moved: Float[Tensor, "unit part d_model"]
) -> tuple[Pass, Terms, Float[Tensor, "unit part d_model"]]:
    """A pass's terms, and the slope that its rows add when `moved` asks for one."""
    with torch.set_grad_enabled(moved.requires_grad):
        terms = judge(batch.model, rows, batch.layer, moved[batch.unit[rows.fact]], batch.config)
    if not moved.requires_grad:
        return rows, terms, torch.zeros_like(moved)
    wanted = rows.weight * batch.share[rows.fact] * terms.nll + batch.config.kl_weight * terms.kl
    return rows, terms.detached, torch.autograd.grad(wanted.sum(), moved, materialize_grads=True)[0]
