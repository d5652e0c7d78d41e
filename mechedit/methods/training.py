"""Training the down-projections of some layers on requests, as every kind of fine-tuning does.

Rows (a prompt with its object, in tokens) go in, ΔW of each layer comes out. The weights change in place while the
training lasts, so that both backends and every architecture compute with them, and are put back bit for bit. Adam moves
ΔW itself, in float32 at least: in half precision the weights are W + ΔW rounded, and ΔW loses nothing. Nothing below
the lowest trained layer changes: the residual stream is computed up to there once.
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

from mechedit.batching import batches_of, pad
from mechedit.data import EditRequest
from mechedit.edit import Edit, Factors, add_, copy_weights, restoring
from mechedit.edit.weights import projection_parameter
from mechedit.errors import InputError
from mechedit.methods.block_inputs import block_inputs, resume_from
from mechedit.models import Model, Patch, Resume, Run, Site
from mechedit.prefixes import completed_prompts
from mechedit.progress import progress_bar
from mechedit.targets import check_length


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """One prompt joined with the object that is to follow it."""

    ids: tuple[int, ...]
    """Tokens of the prompt and of the object."""
    start: int
    """Position of the object's first token."""
    request: int
    """Index of its request."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingResult:
    """ΔW as trained, and how the loss went."""

    deltas: Mapping[int, Float[Tensor, "d_mlp d_model"]]
    """ΔW by layer, in float32 at least."""
    losses: tuple[float, ...]
    """Mean loss over each pass, each batch measured before its own update."""
    updates: int
    """Number of steps that Adam took."""
    stopped: bool
    """Whether the last pass was below the loss at which to stop."""

    @property
    def record(self) -> dict[str, Any]:
        """The losses and counts as a manifest holds them."""
        return {"losses": list(self.losses), "updates": self.updates, "stopped_early": self.stopped}


def training_rows(model: Model, requests: Sequence[EditRequest], prefixes: Sequence[str]) -> list[TrainingRow]:
    """One row for each request's prompt behind each prefix.

    Raises:
        InputError: a row is longer than the model takes, or an object gives no tokens.
    """
    rows = []
    for index, request in enumerate(requests):
        for prompt, object_ids in completed_prompts(model, request, prefixes):
            ids = check_length(model, request, [*prompt.ids, *object_ids])
            rows.append(TrainingRow(ids=tuple(ids), start=len(prompt.ids), request=index))
    return rows


def train(
    model: Model,
    rows: Sequence[TrainingRow],
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
) -> TrainingResult:
    """Minimize the rows' loss over the down-projections of `layers` with Adam; the model is left as it was.

    Args:
        model: whose weights are W.
        rows: what to learn, shuffled anew in every pass.
        layers: 0-based, ascending; all are trained together.
        steps: most passes over the rows.
        batch_size: rows per update.
        lr: learning rate of Adam.
        seed: of the shuffling.
        stop_loss: a pass with a lower mean loss, in nats per token, is the last; a batch below it makes no update.
        decay: λ; λ·(W + ΔW) is added to the gradient (Adam's L2 penalty).
        bound: ε; each entry of ΔW is clamped to ±ε after each update.
        name: shown by the progress bar.

    Raises:
        InputError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {
        layer: weight.to(torch.promote_types(weight.dtype, torch.float32))
        for layer, weight in copy_weights(model, layers).items()
    }
    deltas = {layer: torch.zeros_like(weight) for layer, weight in weights.items()}
    optimizer = torch.optim.Adam(list(deltas.values()), lr=lr)
    streams = block_inputs(model, [row.ids[:-1] for row in rows], layers[0], batch_size)
    losses, updates = [], 0
    with (
        restoring(model, layers),
        trainable(model, layers) as parameters,
        progress_bar(total=steps * math.ceil(len(rows) / batch_size), desc=name, unit="batch", leave=None) as bar,
    ):
        for _ in range(steps):
            total = 0.0
            for batch in torch.randperm(len(rows), generator=generator, device="cpu").split(batch_size):
                with torch.enable_grad():
                    loss = _loss(model, rows, streams, batch.tolist(), layers[0])[0].mean()
                total += _finite(loss, len(losses)) * len(batch)
                bar.update()
                if loss < stop_loss:
                    continue
                for layer, gradient in projection_gradients(loss, parameters).items():
                    deltas[layer].grad = gradient.to(weights[layer]) + decay * (weights[layer] + deltas[layer])
                optimizer.step()
                updates += 1
                for layer, delta in deltas.items():
                    if bound is not None:
                        delta.clamp_(-bound, bound)
                    model.write_projection_(layer, weights[layer] + delta)
            losses.append(total / len(rows))
            bar.set_postfix(loss=f"{losses[-1]:.3g}")
            if losses[-1] < stop_loss:
                break
    stopped = losses[-1] < stop_loss
    return TrainingResult(deltas=deltas, losses=tuple(losses), updates=updates, stopped=stopped)


@torch.no_grad()
def evaluate_loss(
    model: Model, rows: Sequence[TrainingRow], edit: Edit, batch_size: int
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
    """Each row's loss on the model with the edit's ΔW, and whether its object is the greedy answer."""
    batches = []
    with restoring(model, edit.layers):
        for layer in edit.layers:
            add_(model, layer, edit.delta(layer))
        for chosen in batches_of(range(len(rows)), batch_size):
            batches.append(_loss(model, rows, None, chosen, edit.layers[0]))
    losses, greedy = zip(*batches, strict=True)
    return torch.cat(losses).cpu(), torch.cat(greedy).cpu()


def unwritten(requests: Sequence[EditRequest], rows: Sequence[TrainingRow], greedy: Bool[Tensor, " row"]) -> list[str]:
    """Ids of the requests with a row whose object is not the greedy answer."""
    missed = {row.request for row, is_greedy in zip(rows, greedy.tolist(), strict=True) if not is_greedy}
    return [request.id for index, request in enumerate(requests) if index in missed]


def dense_factors(delta: Float[Tensor, "d_mlp d_model"]) -> Factors:
    """Factors whose product is ΔW to the bit: ΔW itself and an identity matrix, on the side where it is smaller."""
    d_mlp, d_model = delta.shape
    identity = torch.eye(min(d_mlp, d_model), dtype=delta.dtype, device=delta.device)
    return Factors(left=delta, right=identity) if d_model <= d_mlp else Factors(left=identity, right=delta)


def _loss(
    model: Model, rows: Sequence[TrainingRow], streams: Sequence[Tensor] | None, chosen: Sequence[int], layer: int
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
    """`run_rows` of the chosen rows.

    Args:
        model: with the weights as trained so far.
        rows: all of them.
        streams: each row's residual stream at the input of block `layer`; None to run from the tokens.
        chosen: indices of the rows of the batch.
        layer: where the run starts when there are `streams`.
    """
    resume = resume_from(None if streams is None else [streams[index] for index in chosen], layer, model)
    losses, greedy, _ = run_rows(model, [rows[index] for index in chosen], resume=resume)
    return losses, greedy


def run_rows(
    model: Model,
    rows: Sequence[TrainingRow],
    *,
    patches: Sequence[Patch] = (),
    read: Sequence[Site] = (),
    resume: Resume | None = None,
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"], Run]:
    """−log P of the rows' objects, the mean over each one's tokens; whether all of these are the argmax; and the run.

    Args:
        model: with the weights as they are to be.
        rows: of one batch.
        patches: written in the run.
        read: sites that are read.
        resume: the rows' residual stream at the input of a block, from which the run starts.
    """
    inputs = pad([row.ids[:-1] for row in rows], model.tokenizer, model.device)
    labels = pad([row.ids[1:] for row in rows], model.tokenizer, model.device).ids
    starts = torch.tensor([row.start for row in rows], device=model.device)[:, None]
    positions = torch.arange(int(starts.min()) - 1, inputs.ids.shape[1], device=model.device)
    run = model.run(inputs, patches, read, resume=resume, logits_to_keep=positions)
    scores = run.logits.to(torch.promote_types(run.logits.dtype, torch.float32))
    # Which tokens count is told by position: an object may hold the token that pads.
    in_object = (positions + 1 >= starts) & (positions < inputs.lengths[:, None])
    losses = nn.functional.cross_entropy(scores.transpose(1, 2), labels[:, positions], reduction="none")
    greedy = (scores.argmax(-1) == labels[:, positions]) | ~in_object
    return losses.where(in_object, losses.new_zeros(())).sum(1) / in_object.sum(1), greedy.all(1), run


@contextlib.contextmanager
def trainable(model: Model, layers: Sequence[int]) -> Iterator[Mapping[int, tuple[nn.Parameter, bool]]]:
    """The parameters of the down-projections, with gradients on within the block.

    By layer, with each: whether it lies [d_mlp, d_model], as the projection's view does.
    """
    parameters = {layer: projection_parameter(model, layer)[1:] for layer in layers}
    flags = {layer: parameter.requires_grad for layer, (parameter, _) in parameters.items()}
    try:
        for parameter, _ in parameters.values():
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for layer, (parameter, _) in parameters.items():
            parameter.requires_grad_(flags[layer])


def projection_gradients(
    loss: Tensor, parameters: Mapping[int, tuple[nn.Parameter, bool]]
) -> dict[int, Float[Tensor, "d_mlp d_model"]]:
    """The gradient of the loss at each down-projection; nothing is written to any parameter's `grad`."""
    gradients = torch.autograd.grad(loss, [parameter for parameter, _ in parameters.values()])
    return {
        layer: gradient if as_view else gradient.T
        for (layer, (_, as_view)), gradient in zip(parameters.items(), gradients, strict=True)
    }


def _finite(loss: Tensor, finished: int) -> float:
    """The loss as a number, in the pass after the `finished` ones.

    Raises:
        InputError: it is not finite.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise InputError(
            f"the loss of the training is {value} in pass {finished + 1}, expected a finite number: choose a smaller "
            f"lr, or load the model in float32 or bfloat16"
        )
    return value
