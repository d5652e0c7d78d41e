"""The search itself: Adam on every δ of a batch, facts × prefixes at once, each dropped when it has converged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mechedit.data import EditRequest, check_requests
from mechedit.errors import InputError
from mechedit.models import Model
from mechedit.prompts import check_prefixes, make_prefixes
from mechedit.provenance import value_hash
from mechedit.targets.batch import TERMS, Batch, gather, measure
from mechedit.targets.cache import Found, Store
from mechedit.targets.config import TargetConfig
from mechedit.targets.prompts import rows_of
from mechedit.targets.targets import Targets

Unit = Sequence[EditRequest]
"""Requests that share a δ."""
NOT_FINITE = "not finite"


def find_targets(
    model: Model,
    requests: Sequence[EditRequest],
    layer: int,
    prefixes: Sequence[str] | None = None,
    config: TargetConfig | None = None,
    *,
    cache: str | Path | None = None,
) -> Targets:
    """Search z for every request (MEMIT Eq. 16). The weights are not touched.

    Facts do not affect each other, but for those about one subject (`TargetConfig.joint`): their z − h is the same,
    found on the mean of their losses within the smallest of their balls.

    Args:
        model: to be edited.
        requests: what it should say.
        layer: 0-based; z is a state at this block, the last of the range to be edited.
        prefixes: templates with one {} for the whole prompt; the default is the bare prompt and those of
            `make_prefixes`.
        config: how to search.
        cache: a folder for what is found, under the hash of all that determines it. What is there is not searched
            for again, so an interrupted search goes on after its last finished batch.

    Raises:
        InputError: conflicting requests; a layer the model lacks; a prefix without its {}; a prompt too long; an
            object that gives no tokens.
    """
    config = config or TargetConfig()
    check_requests(requests)
    config.parts(model.module)
    if not 0 <= layer < model.n_layers:
        raise InputError(f"the layer is {layer}, expected one of 0 … {model.n_layers - 1} of {model.name!r}")
    prefixes = check_prefixes(prefixes or make_prefixes(model, seed=config.seed))
    # All that can be refused is refused before the long search.
    rows_of(model, requests, range(len(requests)), prefixes, config)
    provenance = model.provenance()
    store = Store.at(cache, provenance, layer, prefixes, config)
    units = _units(requests, config)
    found = store.read(units)
    with tqdm(total=len(requests), desc="targets z", unit="fact", leave=None) as bar:
        bar.update(sum(map(len, found.values())))
        for batch in _batches([unit for unit in units if store.key(unit) not in found], config.batch_size):
            results = _search(model, batch, layer, prefixes, config, bar)
            store.write(batch, results)
            found |= {store.key(unit): result for unit, result in zip(batch, results, strict=True)}
    by_id = {request.id: one for unit in units for request, one in zip(unit, found[store.key(unit)], strict=True)}
    provenance = {
        "model": provenance,
        "requests": value_hash([dataclasses.asdict(request) for request in requests]),
        "settings": dataclasses.asdict(config),
    }
    ordered = {request.id: by_id[request.id] for request in requests}
    return _targets(model, ordered, layer, prefixes, config, provenance)


def _units(requests: Sequence[EditRequest], config: TargetConfig) -> list[Unit]:
    """Requests that share a δ, in the order of their first."""
    units: dict[str, list[EditRequest]] = {}
    for request in requests:
        units.setdefault(request.subject.strip() if config.shares else request.id, []).append(request)
    return list(units.values())


def _batches(units: Sequence[Unit], size: int) -> Iterator[list[Unit]]:
    """Units of `size` facts together, or of one more unit where that is what it takes."""
    batch: list[Unit] = []
    for unit in units:
        batch.append(unit)
        if sum(map(len, batch)) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.enable_grad()
def _search(
    model: Model, units: Sequence[Unit], layer: int, prefixes: Sequence[str], config: TargetConfig, bar: tqdm
) -> list[list[Found]]:
    """Adam on every unit's δ, each dropped when it stops."""
    batch, running = gather(model, units, layer, prefixes, config)
    radius = batch.radius
    delta = torch.zeros(batch.n_units, *batch.initial.shape[1:], device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=config.lr)
    ends, history = [_End(delta=delta.detach()[unit]) for unit in range(batch.n_units)], []
    for step in range(config.updates + 1):
        last = step == config.updates
        measured, running = measure(batch, running, delta, slopes=not last)
        history.append(measured.terms)
        for unit, reason in enumerate(_reasons(batch, measured.terms, last=last)):
            if reason and not ends[unit].reason:
                # Without a finite loss z stays h.
                kept = torch.zeros_like(delta[unit]) if reason == NOT_FINITE else delta.detach()[unit].clone()
                ends[unit] = _End(delta=kept, reason=reason, step=step)
                bar.update(len(units[unit]))
        going = torch.tensor([not end.reason for end in ends], device=model.device)
        if not going.any():
            break
        running = [rows.kept(going[batch.unit[rows.fact]]) for rows in running if going[batch.unit[rows.fact]].any()]
        # Adam works number by number: a δ that has stopped does not disturb the others.
        delta.grad = measured.slope.where(going[:, None, None], 0)
        optimizer.step()
        with torch.no_grad():
            delta.mul_((radius / delta.norm(dim=2)).clamp(max=1)[..., None])
    return _found(batch, units, ends, torch.stack(history, 1).cpu())


@dataclass(frozen=True, kw_only=True, eq=False)
class _End:
    """How one unit's search ended."""

    delta: Float[Tensor, "part d_model"]
    reason: str = ""
    """Empty while it goes on."""
    step: int = 0


def _reasons(batch: Batch, terms: Float[Tensor, "fact term"], *, last: bool) -> list[str]:
    """Why each unit stops now; empty where it goes on."""
    loss, nll = terms[:, TERMS.index("loss")], terms[:, TERMS.index("nll")]
    judged = loss if batch.config.convention == "memit-2022" else nll
    finite, below = batch.where_all(loss.isfinite()), batch.where_all(judged < batch.config.threshold)
    return [
        NOT_FINITE if not fine else "converged" if low else "steps" if last else ""
        for fine, low in zip(finite, below, strict=True)
    ]


def _found(
    batch: Batch, units: Sequence[Unit], ends: Sequence[_End], history: Float[Tensor, "fact step term"]
) -> list[list[Found]]:
    """The outcome for every fact, by unit."""
    found: list[list[Found]] = [[] for _ in units]
    for initial, terms, unit in zip(batch.initial[:, -1].cpu(), history, batch.unit.tolist(), strict=True):
        end = ends[unit]
        z = initial + end.delta[-1].cpu()
        found[unit].append(Found(z=z, initial=initial, terms=terms[: end.step + 1], stopped=end.reason))
    return found


def _targets(
    model: Model,
    found: Mapping[str, Found],
    layer: int,
    prefixes: tuple[str, ...],
    config: TargetConfig,
    provenance: Mapping[str, Any],
) -> Targets:
    """The outcome for every request, in order."""
    losses = pd.concat([one.frame(name) for name, one in found.items()], ignore_index=True)
    # The last step measured is the state returned, since nothing moves after it.
    summary = losses.groupby("id", sort=False).last().reset_index().rename(columns={"step": "updates"})
    return Targets(
        z=torch.stack([one.z for one in found.values()]).to(model.device),
        initial=torch.stack([one.initial for one in found.values()]).to(model.device),
        ids=tuple(found),
        layer=layer,
        part=config.parts(model.module)[-1],
        prefixes=prefixes,
        losses=losses,
        summary=summary.assign(
            norm_ratio=[one.norm_ratio for one in found.values()], stopped=[one.stopped for one in found.values()]
        ),
        provenance=provenance,
    )
