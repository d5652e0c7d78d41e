"""The descent to z: Adam on the δ of all facts of a batch at once, each dropped when its search ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.models import Model
from mechedit.targets.cache import NOT_FINITE, TargetResult
from mechedit.targets.config import TargetConfig
from mechedit.targets.objective import LossTerms, Objective, prepare_objective
from mechedit.targets.subject_groups import SubjectGroup


@torch.enable_grad()
def search_groups(
    model: Model,
    groups: Sequence[SubjectGroup],
    layer: int,
    prefixes: Sequence[str],
    config: TargetConfig,
    bar: Any,
) -> list[list[TargetResult]]:
    """Minimize the loss of every group by Adam, within its ball; a group is dropped when it stops.

    Adam moves δ in units of `Objective.unit`: with the typical |hᵢ| the whole course scales with the activations.

    Returns:
        The result of every fact, by group.
    """
    objective = prepare_objective(model, groups, layer, prefixes, config)
    radius, unit = objective.radius, objective.unit[..., None]
    scaled_delta = objective.initial.new_zeros(objective.n_groups, *objective.initial.shape[1:]).requires_grad_()
    optimizer = torch.optim.Adam([scaled_delta], lr=config.learning_rate)
    states, history = [_GroupState(delta=scaled_delta.detach()[group]) for group in range(objective.n_groups)], []
    for step in range(config.updates + 1):
        last = step == config.updates
        delta = scaled_delta.detach() * unit
        loss = objective.loss_terms(delta, gradient=not last)
        history.append(loss.values)
        for group, reason in enumerate(_stop_reasons(objective, loss, last=last)):
            if reason and not states[group].stopped:
                # Without a finite loss z stays h.
                final = torch.zeros_like(delta[group]) if reason == NOT_FINITE else delta[group]
                states[group] = _GroupState(delta=final, stopped=reason, step=step)
                bar.update(len(groups[group]))
        stopped = torch.tensor([bool(state.stopped) for state in states], device=model.device)
        if stopped.all():
            break
        objective.drop_groups(stopped)
        # Adam works number by number: a δ that has stopped does not disturb the others.
        scaled_delta.grad = loss.gradient.where(~stopped[:, None, None], 0) * unit
        optimizer.step()
        with torch.no_grad():
            norm = (scaled_delta * unit).norm(dim=2)
            scaled_delta.mul_((radius / norm).clamp(max=1)[..., None])
    return _results(objective, groups, states, torch.stack(history, 1).cpu())


@dataclass(frozen=True, kw_only=True, eq=False)
class _GroupState:
    """State of one group's search."""

    delta: Float[Tensor, "part d_model"]
    """The final δ; 0 while the search goes on."""
    stopped: str = ""
    """Why the search stopped; empty while it goes on."""
    step: int = 0
    """The step at which it stopped."""


def _stop_reasons(objective: Objective, terms: LossTerms, *, last: bool) -> list[str]:
    """Why each group stops at this step; empty where it goes on."""
    config = objective.config
    criterion = terms["loss" if config.convention == "memit-2022" else "nll"]
    finite = objective.groups_where_all(terms["loss"].isfinite())
    below = objective.groups_where_all(criterion < config.threshold)
    ahead = [False] * objective.n_groups
    if config.margin is not None:
        ahead = objective.groups_where_all(terms["margin"] > config.margin)
    return [
        NOT_FINITE if not flags[0] else "threshold" if flags[1] else "margin" if flags[2] else "steps" if last else ""
        for flags in zip(finite, below, ahead, strict=True)
    ]


def _results(
    objective: Objective,
    groups: Sequence[SubjectGroup],
    states: Sequence[_GroupState],
    history: Float[Tensor, "fact step term"],
) -> list[list[TargetResult]]:
    """The result of every fact, by group."""
    results: list[list[TargetResult]] = [[] for _ in groups]
    for initial, terms, group in zip(objective.initial[:, -1].cpu(), history, objective.group.tolist(), strict=True):
        state = states[group]
        z = initial + state.delta[-1].cpu()
        results[group].append(TargetResult(z=z, initial=initial, terms=terms[: state.step + 1], stopped=state.stopped))
    return results
