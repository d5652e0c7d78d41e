"""Training some down-projections on requests: what fine-tuning of every kind goes through.

Rows (a prompt joined with its object, as ids) go in, ΔW of each layer comes out. The weights change in place while it
lasts, so that both backends and every architecture compute with them, and are put back bit for bit. ΔW itself is
what Adam moves, in float32 at least: in half precision the weights are W + ΔW rounded, and ΔW loses nothing. Nothing
below the lowest trained layer changes: the residual stream is computed up to there once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from mechedit.batching import pad
from mechedit.data import EditRequest
from mechedit.edit import Edit, Factors, add_, copies, preserved
from mechedit.edit.weights import parameter_of
from mechedit.errors import InputError
from mechedit.models import Model, Resume, Site
from mechedit.prompts import continuation_ids, prefixed_prompts
from mechedit.targets import check_length


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt with the object that is to follow it."""

    ids: tuple[int, ...]
    """The prompt's tokens and the object's."""
    start: int
    """Position of the object's first token."""
    request: int
    """Whose it is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """What came of it."""

    deltas: Mapping[int, Float[Tensor, "d_mlp d_model"]]
    """ΔW by layer, in float32 at least."""
    losses: tuple[float, ...]
    """The mean loss over each pass, every batch's before its own update."""
    updates: int
    """Steps of Adam that were taken."""
    stopped: bool
    """Whether the last pass was below the loss at which to stop."""

    @property
    def record(self) -> dict[str, Any]:
        """As a manifest holds it."""
        return {"losses": list(self.losses), "updates": self.updates, "stopped_early": self.stopped}


def rows_of(model: Model, requests: Sequence[EditRequest], prefixes: Sequence[str]) -> list[Row]:
    """Each request's prompt behind each prefix.

    Raises:
        InputError: one is longer than the model takes, or an object gives no tokens.
    """
    rows = []
    for place, request in enumerate(requests):
        wanted = continuation_ids(model.tokenizer, request.target_new)
        for prompt in prefixed_prompts(model, request, prefixes):
            # Ids are joined, never text: the tokens that are learnt are those that are scored.
            ids = check_length(model, request, [*prompt.ids, *wanted])
            rows.append(Row(ids=tuple(ids), start=len(prompt.ids), request=place))
    return rows


def train(
    model: Model,
    rows: Sequence[Row],
    layers: Sequence[int],
    *,
    steps: int,
    batch_size: int,
    lr: float | int,
    seed: int = 0,
    stop_loss: float | int = 0.0,
    decay: float | int = 0.0,
    bound: float | int | None = None,
    name: str = "training",
) -> Training:
    """Minimize the rows' loss over the down-projections of `layers` with Adam; the model is left as it was.

    Args:
        model: whose weights are W.
        rows: what to learn, shuffled anew in every pass.
        layers: trained together.
        steps: passes over the rows at most.
        batch_size: rows of one update.
        lr: Adam's.
        seed: of the shuffling.
        stop_loss: a pass below it is the last, and a batch below it is left alone.
        decay: λ, by which λ·(W + ΔW) is added to the gradient (Adam's L2 penalty).
        bound: ε, where each entry of ΔW is brought back to ±ε after each update.
        name: for the progress bar.

    Raises:
        InputError: the loss is not finite.
    """
    originals, shuffled = copies(model, layers), torch.Generator().manual_seed(seed)
    wide = {layer: weight.to(torch.promote_types(weight.dtype, torch.float32)) for layer, weight in originals.items()}
    deltas = {layer: torch.zeros_like(weight) for layer, weight in wide.items()}
    optimizer = torch.optim.Adam(list(deltas.values()), lr=lr)
    entries = _entries(model, rows, layers[0], batch_size)
    losses, updates = [], 0
    with (
        preserved(model, layers),
        _trainable(model, layers) as parameters,
        tqdm(total=steps * math.ceil(len(rows) / batch_size), desc=name, unit="batch", leave=None) as bar,
    ):
        for _ in range(steps):
            total = 0.0
            for batch in torch.randperm(len(rows), generator=shuffled).split(batch_size):
                with torch.enable_grad():
                    loss = _loss(model, rows, entries, batch.tolist(), layers[0])[0].mean()
                total += _finite(loss, len(losses)) * len(batch)
                bar.update()
                if loss < stop_loss:
                    continue
                for layer, gradient in _gradients(loss, parameters).items():
                    deltas[layer].grad = gradient.to(wide[layer]) + decay * (wide[layer] + deltas[layer])
                optimizer.step()
                updates += 1
                for layer, delta in deltas.items():
                    if bound is not None:
                        delta.clamp_(-bound, bound)
                    model.projection(layer).copy_(wide[layer] + delta)
            losses.append(total / len(rows))
            bar.set_postfix(loss=f"{losses[-1]:.3g}")
            if losses[-1] < stop_loss:
                break
    stopped = losses[-1] < stop_loss
    return Training(deltas=deltas, losses=tuple(losses), updates=updates, stopped=stopped)


@torch.no_grad()
def judge(
    model: Model, rows: Sequence[Row], edit: Edit, batch_size: int
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
    """Each row's loss on the model with the edit's ΔW, and whether its object is the greedy answer."""
    first = edit.layers[0]
    found = []
    with preserved(model, edit.layers):
        for layer in edit.layers:
            add_(model, layer, edit.delta(layer))
        for start in range(0, len(rows), batch_size):
            chosen = range(start, min(start + batch_size, len(rows)))
            found.append(_loss(model, rows, None, chosen, first))
    losses, greedy = zip(*found, strict=True)
    return torch.cat(losses).cpu(), torch.cat(greedy).cpu()


def dense_factors(delta: Float[Tensor, "d_mlp d_model"]) -> Factors:
    """ΔW as factors whose product is ΔW to the bit: itself and an identity, on the side where it is smaller."""
    d_mlp, d_model = delta.shape
    unit = torch.eye(min(d_mlp, d_model), dtype=delta.dtype, device=delta.device)
    return Factors(left=delta, right=unit) if d_model <= d_mlp else Factors(left=unit, right=delta)


def _loss(
    model: Model, rows: Sequence[Row], entries: Sequence[Tensor] | None, chosen: Sequence[int], first: int
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
    """−log P of the chosen rows' objects, the mean over each one's tokens, and whether all of these are the argmax.

    Which tokens count is told by position: an object may hold the token that pads.
    """
    some = [rows[place] for place in chosen]
    given = pad([row.ids[:-1] for row in some], model.tokenizer, model.device)
    wanted = pad([row.ids[1:] for row in some], model.tokenizer, model.device).ids
    starts = torch.tensor([row.start for row in some], device=model.device)[:, None]
    keep = torch.arange(int(starts.min()) - 1, given.ids.shape[1], device=model.device)
    resume = None
    if entries is not None:
        resume = Resume(first, pad_sequence([entries[place] for place in chosen], batch_first=True).to(model.device))
    logits = model.run(given, resume=resume, logits_to_keep=keep).logits
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    inside = (keep + 1 >= starts) & (keep < given.lengths[:, None])
    losses = nn.functional.cross_entropy(scores.transpose(1, 2), wanted[:, keep], reduction="none")
    said = (scores.argmax(-1) == wanted[:, keep]) | ~inside
    return losses.where(inside, losses.new_zeros(())).sum(1) / inside.sum(1), said.all(1)


@torch.no_grad()
def _entries(
    model: Model, rows: Sequence[Row], layer: int, batch_size: int
) -> list[Float[Tensor, "pos d_model"]] | None:
    """Each row's residual stream at the input of block `layer`, on the CPU; None where that is the model's input."""
    if layer == 0:
        return None
    site, found = Site(layer - 1, "resid"), []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        given = pad([row.ids[:-1] for row in some], model.tokenizer, model.device)
        states = model.run(given, read=[site], stop_after=layer - 1)[site].cpu()
        found += [state[: len(row.ids) - 1].clone() for row, state in zip(some, states, strict=True)]
    return found


@contextlib.contextmanager
def _trainable(model: Model, layers: Sequence[int]) -> Iterator[Mapping[int, tuple[nn.Parameter, bool]]]:
    """The parameters of down-projections, asking for gradients within the block, and whether they lie as the views."""
    found = {layer: parameter_of(model, layer)[1:] for layer in layers}
    flags = {layer: parameter.requires_grad for layer, (parameter, _) in found.items()}
    try:
        for parameter, _ in found.values():
            parameter.requires_grad_(True)
        yield found
    finally:
        for layer, (parameter, _) in found.items():
            parameter.requires_grad_(flags[layer])


def _gradients(
    loss: Tensor, parameters: Mapping[int, tuple[nn.Parameter, bool]]
) -> dict[int, Float[Tensor, "d_mlp d_model"]]:
    """The slope of the loss at each down-projection; nothing is left in any parameter's `grad`."""
    slopes = torch.autograd.grad(loss, [parameter for parameter, _ in parameters.values()])
    return {
        layer: slope if alike else slope.T
        for (layer, (_, alike)), slope in zip(parameters.items(), slopes, strict=True)
    }


def _finite(loss: Tensor, step: int) -> float:
    """The loss as a number.

    Raises:
        InputError: it is not finite.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise InputError(
            f"the loss of the training is {value} in pass {step + 1}, expected a finite number: choose a smaller lr, "
            f"or load the model in float32 or bfloat16"
        )
    return value
