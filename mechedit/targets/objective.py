"""The loss of MEMIT's Eq. 16 as a function of δ, term by term, and its gradient.

For a fact with object o, prompts x₁ … x_N behind the context templates and the KL prompt x',

    L(δ) = 1/N Σ_j −log P_δ(o | x_j)  +  λ_KL · KL(P_δ(· | x') ‖ P(· | x'))  +  weight decay of δ,

where P_δ is the model with δ added in one layer at one token, the subject's last one by default. All that does not
depend on δ is computed once, in the clean run (`mechedit.targets.prompt_batch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechedit.batching import batches_of, pad
from mechedit.data import EditRequest
from mechedit.models import Model, Site
from mechedit.prefixes import BARE, prefixed_prompts
from mechedit.targets.config import TargetConfig
from mechedit.targets.prompt_batch import PromptBatch, edited_scores, run_clean
from mechedit.targets.search_prompts import search_batches, search_prompts
from mechedit.workers import n_workers, run_batches

TERMS = ("loss", "nll", "kl", "decay", "probability", "margin")
"""Columns of `LossTerms.values`: the loss, its three terms as weighted in it, P(object), mean over templates, and the
margin: nats by which the object's tokens are likelier than any other token, the least of all prompts and tokens."""
_NORMAL_MEDIAN = 0.6745
"""Median of |x| for a standard normal x."""


@dataclass(kw_only=True, eq=False)
class Objective:
    """The loss of some facts, some of which may share a δ."""

    model: Model
    layer: int
    config: TargetConfig
    group: Int[Tensor, " fact"]
    """Index of each fact's subject group, and so of its δ."""
    fact_weight: Float[Tensor, " fact"]
    """Weight of each fact in the mean loss of its group."""
    initial: Float[Tensor, "fact part d_model"]
    """h: clean states of the bare prompts, at the token where δ is added."""
    batches: list[PromptBatch]
    """Prompts of the facts that are still searched for. A batch that does not fit the device's memory is halved, and
    stays so."""

    @property
    def n_groups(self) -> int:
        """Number of subject groups, and so of δ."""
        return int(self.group.max()) + 1

    @property
    def state_norm(self) -> Float[Tensor, "group part"]:
        """‖h‖ of each group, the smallest among its facts."""
        norms = self.initial.norm(dim=2)
        return torch.stack([norms[self.group == group].amin(0) for group in range(self.n_groups)])

    @property
    def radius(self) -> Float[Tensor, "group part"]:
        """Radius clamp·‖h‖ of each group's ball."""
        return self.config.clamp * self.state_norm

    @property
    def unit(self) -> Float[Tensor, "group part"]:
        """The unit of each group's learning rate: 1 for `lr`, the typical |hᵢ| for `relative_lr`.

        That is the median over coordinates over that of a standard normal variable: ‖h‖/√d_model, were h normal. In
        pretrained models a few coordinates can be a hundred times larger than the rest (massive activations; Sun et
        al., 2024) and make up most of ‖h‖, which says nothing of how far the others may move.
        """
        if self.config.lr is not None:
            return torch.ones_like(self.state_norm)
        typical = self.initial.abs().median(dim=2).values / _NORMAL_MEDIAN
        # A state with more zeros than not has a length all the same.
        typical = torch.where(typical > 0, typical, self.initial.norm(dim=2) / self.model.d_model**0.5)
        return torch.stack([typical[self.group == group].amin(0) for group in range(self.n_groups)])

    def loss_terms(self, delta: Float[Tensor, "group part d_model"], *, gradient: bool) -> LossTerms:
        """Evaluate Eq. 16 for every fact at its group's δ.

        Args:
            delta: δ of each group.
            gradient: whether to compute the gradient, too.

        Raises:
            torch.OutOfMemoryError: the device's memory does not hold even one prompt.
        """
        point = delta.detach().requires_grad_(gradient)
        nll, probability = point.new_zeros(2, len(self.group))
        margin = torch.full_like(nll, torch.inf)
        kl, total_gradient, batches = point.new_zeros(self.n_groups), torch.zeros_like(delta), []
        evaluated = run_batches(self.model, self.batches, lambda batch: self._of_batch(batch, point))
        for batch, terms, batch_gradient in evaluated:
            batches.append(batch)
            nll.index_add_(0, batch.fact, batch.weight * terms.nll)
            probability.index_add_(0, batch.fact, batch.weight * terms.probability)
            margin.scatter_reduce_(0, batch.fact, terms.margin, "amin")
            kl.index_add_(0, self.group[batch.fact], terms.kl)
            total_gradient += batch_gradient
        self.batches = batches
        decay = self._weight_decay(point)
        if gradient:
            total_gradient += torch.autograd.grad((self.fact_weight * decay).sum(), point)[0]
        weighted_kl = self.config.kl_weight * kl[self.group]
        decay = decay.detach()
        values = torch.stack([nll + weighted_kl + decay, nll, weighted_kl, decay, probability, margin], 1)
        return LossTerms(values=values, gradient=total_gradient.detach())

    def drop_groups(self, stopped: Bool[Tensor, " group"]) -> None:
        """Run the prompts of these groups no more."""
        running = [~stopped[self.group[batch.fact]] for batch in self.batches]
        self.batches = [batch.where(rows) for batch, rows in zip(self.batches, running, strict=True) if rows.any()]

    def groups_where_all(self, facts: Bool[Tensor, " fact"]) -> list[bool]:
        """Whether something holds for all facts of a group, for each group."""
        lacking = set(self.group[~facts].tolist())
        return [group not in lacking for group in range(self.n_groups)]

    def _weight_decay(self, delta: Float[Tensor, "group part d_model"]) -> Float[Tensor, " fact"]:
        """Weight decay of each fact's δ, by the convention of the settings."""
        delta_norm, state_norm = delta[self.group].norm(dim=2), self.initial.norm(dim=2)
        memit_2022 = self.config.convention == "memit-2022"
        ratio = delta_norm / state_norm**2 if memit_2022 else (delta_norm / state_norm) ** 2
        return self.config.weight_decay * ratio.sum(1)

    def _of_batch(
        self, batch: PromptBatch, point: Float[Tensor, "group part d_model"]
    ) -> tuple[PromptBatch, PromptTerms, Float[Tensor, "group part d_model"]]:
        """The terms of one batch's prompts, and their part of the gradient where `point` requires one."""
        with torch.set_grad_enabled(point.requires_grad):
            terms = prompt_terms(self.model, batch, self.layer, point[self.group[batch.fact]], self.config)
        if not point.requires_grad:
            return batch, terms, torch.zeros_like(point)
        losses = batch.weight * self.fact_weight[batch.fact] * terms.nll + self.config.kl_weight * terms.kl
        return batch, terms.detached, torch.autograd.grad(losses.sum(), point, materialize_grads=True)[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class LossTerms:
    """The loss at one δ, term by term, and its gradient."""

    values: Float[Tensor, "fact term"]
    """`TERMS` of each fact; without meaning for facts that were dropped."""
    gradient: Float[Tensor, "group part d_model"]
    """Gradient of the sum of the groups' mean losses with respect to δ; zero where it was not asked for."""

    def __getitem__(self, term: str) -> Float[Tensor, " fact"]:
        """A column of `values`, by its name in `TERMS`."""
        return self.values[:, TERMS.index(term)]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptTerms:
    """The terms of the loss for each prompt of a batch."""

    nll: Float[Tensor, " row"]
    """−log P of the object in nats, mean over its tokens, or by the convention `paper` their sum; 0 for KL prompts."""
    kl: Float[Tensor, " row"]
    """KL(edited ‖ clean) in nats; 0 for all but KL prompts."""
    probability: Float[Tensor, " row"]
    """Probability of the whole object; 0 for KL prompts."""
    margin: Float[Tensor, " row"]
    """Least log P of a token of the object minus that of the likeliest other token; ∞ for KL prompts."""

    @property
    def detached(self) -> PromptTerms:
        """The terms without their autograd graph."""
        nll, kl, probability = self.nll.detach(), self.kl.detach(), self.probability.detach()
        return PromptTerms(nll=nll, kl=kl, probability=probability, margin=self.margin)


def prepare_objective(
    model: Model, groups: Sequence[Sequence[EditRequest]], layer: int, prefixes: Sequence[str], config: TargetConfig
) -> Objective:
    """Tokenize the facts of some subject groups and run the clean model on them."""
    requests = [request for group in groups for request in group]
    group_index = [index for index, group in enumerate(groups) for _ in group]
    prompts = search_prompts(model, requests, group_index, prefixes, config)
    shape = (len(requests), len(config.parts(model.module)), model.d_model)
    initial = torch.zeros(shape, device=model.device, dtype=torch.float32)
    batches = []
    blocks = max(1, model.n_layers - layer - 1)
    batched_prompts = search_batches(model, prompts, config.pass_tokens, blocks, n_workers(model))
    # The largest first: see `run_batches`.
    batched_prompts = sorted(batched_prompts, key=lambda rows: -sum(row.width for row in rows))
    for batch, bare, states in run_batches(model, batched_prompts, lambda rows: run_clean(model, rows, layer, config)):
        batches.append(batch)
        initial[batch.fact[bare]] = states
    if BARE not in prefixes:
        initial = bare_states(model, requests, layer, config)
    return Objective(
        model=model,
        layer=layer,
        config=config,
        group=torch.tensor(group_index, device=model.device),
        fact_weight=torch.tensor(
            [1 / len(group) for group in groups for _ in group], dtype=torch.float32, device=model.device
        ),
        initial=initial,
        batches=batches,
    )


@torch.no_grad()
def bare_states(
    model: Model, requests: Sequence[EditRequest], layer: int, config: TargetConfig
) -> Float[Tensor, "fact part d_model"]:
    """The clean states h of the bare prompts, for context templates that are not bare: residuals are the bare ones'."""
    sites = [Site(layer, part) for part in config.parts(model.module)]
    prompts = [prefixed_prompts(model, request, [BARE])[0] for request in requests]
    states = []
    for batch in batches_of(prompts, config.batch_size):
        tokens = pad([prompt.ids for prompt in batch], model.tokenizer, model.device)
        run = model.run(tokens, read=sites, stop_after=layer)
        at = torch.tensor([prompt.position(config.token) for prompt in batch], device="cpu")
        rows = torch.arange(len(batch), device="cpu")
        states.append(torch.stack([run[site].cpu()[rows, at] for site in sites], 1))
    return torch.cat(states).float().to(model.device)


def prompt_terms(
    model: Model, batch: PromptBatch, layer: int, delta: Float[Tensor, "row part d_model"], config: TargetConfig
) -> PromptTerms:
    """The terms of every prompt with its δ added at the token of the settings (Eq. 16)."""
    scores, rows = edited_scores(model, batch, layer, delta, config)
    zero = scores.log_prob.new_zeros(len(batch)).to(batch.weight)
    log_prob, counts = scores.log_prob.to(zero), zero.index_add(0, rows, torch.ones_like(rows).to(zero))
    total = zero.index_add(0, rows, log_prob)
    # KL(edited ‖ clean), the direction of ROME's Eq. 4 and of both published codes.
    kl = zero.index_put((batch.is_kl.nonzero()[:, 0],), scores.kl.to(zero))
    margin = torch.full_like(zero, torch.inf)
    margin = margin.scatter_reduce(0, rows, (scores.log_prob.detach() - scores.runner_up).to(zero), "amin")
    length = torch.ones_like(counts) if config.convention == "paper" else counts.clamp(min=1)
    return PromptTerms(nll=-total / length, kl=kl, probability=total.exp().where(counts > 0, zero), margin=margin)
