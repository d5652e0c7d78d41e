"""The factors of a loss's gradient at a projection: keys, and gradients at its output (Mitchell et al., 2022).

With x = W u + b at every token, the gradient of a loss L of one prompt is

    ∂L/∂W = Σ_t u_t δ_tᵀ,        δ_t = ∂L/∂x_t,

in the orientation [d_key, d_model]: as many terms as the prompt has tokens, which is far less than W has rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.batching import batches_of
from mechedit.methods.block_inputs import resume_from
from mechedit.methods.post_norm import gradient_before_norm
from mechedit.methods.training import TrainingRow, run_rows
from mechedit.models import Model, Patch, Resume, Site, out_part


@dataclass(frozen=True, kw_only=True, eq=False)
class GradientFactors:
    """u and δ of one prompt at one layer, at the tokens where δ is not zero."""

    keys: Float[Tensor, "token d_key"]
    gradients: Float[Tensor, "token d_model"]


def gradient_factors(
    model: Model,
    rows: Sequence[TrainingRow],
    layers: Sequence[int],
    batch_size: int,
    streams: Sequence[Float[Tensor, "_ d_model"]] | None = None,
) -> list[Mapping[int, GradientFactors]]:
    """Each row's u and δ at each layer, of its own loss: −1/T Σ_t log P(o_t | prompt, o_1 … o_{t−1}).

    Args:
        model: as it is before the edit.
        rows: prompts with their objects.
        layers: 0-based, ascending.
        batch_size: rows per pass.
        streams: each row's residual stream at the input of the lowest of the layers, without its last token, where
            that is known.
    """
    factors: list[Mapping[int, GradientFactors]] = []
    for chosen in batches_of(range(len(rows)), batch_size):
        of_batch = None if streams is None else [streams[index] for index in chosen]
        resume = resume_from(of_batch, layers[0], model)
        factors += _of_batch(model, [rows[index] for index in chosen], layers, resume)
    return factors


def _of_batch(
    model: Model, rows: Sequence[TrainingRow], layers: Sequence[int], resume: Resume | None
) -> list[Mapping[int, GradientFactors]]:
    lengths = torch.tensor([len(row.ids) - 1 for row in rows], device=model.device)
    positions = torch.arange(int(lengths.max()), device=model.device).expand(len(rows), -1)
    # A position of −1 is not written to.
    positions = torch.where(positions < lengths[:, None], positions, -1)
    # Nothing is added; the gradient of what would be is δ.
    added = {
        layer: torch.zeros(*positions.shape, model.d_model, device=model.device, dtype=model.dtype).requires_grad_()
        for layer in layers
    }
    patches = [Patch(Site(layer, out_part(model.module)), positions, value, add=True) for layer, value in added.items()]
    with torch.enable_grad():
        read = [model.key_site(layer) for layer in layers]
        losses, _, run = run_rows(model, rows, patches=patches, read=read, resume=resume)
        gradients = torch.autograd.grad(losses.sum(), list(added.values()))
    outputs = dict(zip(layers, gradients, strict=True))
    factors = []
    for index, length in enumerate(lengths.tolist()):
        of_row = {}
        for layer in layers:
            keys = run[model.key_site(layer)][index, :length].detach()
            gradient = gradient_before_norm(model, layer, keys, outputs[layer][index, :length])
            present = (gradient != 0).any(1)
            of_row[layer] = GradientFactors(keys=keys[present].float(), gradients=gradient[present].float())
        factors.append(of_row)
    return factors
