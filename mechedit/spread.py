"""Algorithm 1 of MEMIT: the way from h to z is shared out over the layers, and each share becomes a ΔW.

For each layer l, ascending: keys are collected from the model as edited so far (Eq. 19), the residual
z − h at the last layer is divided by the layers still to come (Eq. 20), and the ridge system of `solve` gives
the update (Eq. 14). The model ends as it began; what comes out is an `Edit`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mechedit.artifacts import VERSION, check_provenance
from mechedit.edit import Edit, Factors, add_, preserved
from mechedit.errors import InputError
from mechedit.facts import EditRequest
from mechedit.models import Model, Site
from mechedit.moments import SecondMoment, check_moments
from mechedit.prompts import BARE, check_choice, check_prefixes, column, pad, prefixed_prompts
from mechedit.solve import check_finite, ridge_update
from mechedit.targets import Convention, Targets

Strategy = Literal["uniform"]


@dataclass(frozen=True, kw_only=True)
class SpreadConfig:
    """How the residual is written into the layers.

    `convention="memit-2022"` follows the published code of MEMIT where the paper says otherwise: a key is the
    mean of the first prefix's key and the mean over the other prefixes (default: plain mean, Eq. 19), and
    the residual is divided by the number of listed layers still to come (default: by the distance L − l + 1,
    Eq. 20; the two differ only when the list has gaps).
    """

    covariance_weight: float | int = 15_000.0
    """λ: how much the old keys count, in units of one new fact."""
    strategy: Strategy = "uniform"
    convention: Convention = "default"
    batch_size: int = 64
    """Prompts in one forward pass."""

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, ("uniform",))
        check_choice("convention", self.convention, ("default", "memit-2022"))
        for name in ("covariance_weight", "batch_size"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected more than 0; choose a larger number")


def spread(
    model: Model,
    requests: Sequence[EditRequest],
    targets: Targets,
    layers: Sequence[int],
    moments: Mapping[int, SecondMoment | Tensor],
    *,
    prefixes: Sequence[str] | None = None,
    config: SpreadConfig | None = None,
) -> Edit:
    """Write `targets` into `layers` (MEMIT Algorithm 1); the model is left as it was, bit for bit.

    Args:
        model: the one the targets were found on.
        requests: those of the targets, in the same order.
        targets: z at the last of `layers`.
        layers: 0-based, ascending; gaps are allowed.
        moments: for each layer E[k kᵀ], [d_mlp, d_mlp].
        prefixes: over which keys are averaged; the default is those of the targets.
        config: how to write.

    Returns:
        The edit. Its manifest holds, under `residuals`, one record a layer: `before` and `after` (what is
        left of ‖Z − H‖, relative to the start), `error` and `condition` of the linear system; under `left`,
        for each request, what is left of its own ‖z − h‖ at the end; and under `facts`, what it writes, in words.

    Raises:
        InputError: layers that are not ascending or not in the model; targets of other requests, weights or
            another layer; moments that are absent, of another model, or singular.
    """
    config = config or SpreadConfig()
    layers = check_layers(layers, model)
    check_targets(targets, requests, layers, model)
    matrices = moment_matrices(moments, layers, model)
    prefixes = check_prefixes(prefixes or targets.prefixes)
    provenance = model.provenance()
    made_on = targets.provenance.get("model", provenance)
    check_provenance(made_on, {"weights_hash": provenance["weights_hash"]}, "the targets", remedy="find them again")
    factors, records = {}, []
    with preserved(model, layers):
        start = residual = targets.z - states(model, requests, layers[-1], config.batch_size)
        for place, layer in enumerate(tqdm(layers, desc="spread", unit="layer", leave=None)):
            # Keys come from the partly edited model: earlier layers have already moved them.
            keys = mean_keys(model, requests, layer, prefixes, config)
            share = residual / shares_left(layers, place, config)
            update = ridge_update(keys, share.T.to(keys), matrices[layer].to(keys), config.covariance_weight)
            factors[layer] = Factors(left=update.left, right=update.right)
            add_(model, layer, update.delta)
            before, residual = residual, targets.z - states(model, requests, layers[-1], config.batch_size)
            records.append(
                {
                    "layer": layer,
                    "before": _relative(before, start),
                    "after": _relative(residual, start),
                    "error": update.error,
                    "condition": update.condition,
                }
            )
    return Edit(
        factors=factors,
        manifest={
            "mechedit": VERSION,
            "layers": layers,
            "model": provenance,
            "requests": [request.id for request in requests],
            "facts": [f"{request.text} → {request.target_new}" for request in requests],
            "prefixes": list(prefixes),
            "targets": dict(targets.provenance),
            "settings": dataclasses.asdict(config),
            "residuals": records,
            "left": [_relative(r, s) for r, s in zip(residual, start, strict=True)],
        },
    )


def check_layers(layers: Sequence[int], model: Model) -> list[int]:
    """The layers as a list.

    Raises:
        InputError: none, not ascending, repeated, or not in the model.
    """
    found = [int(layer) for layer in layers]
    if not found or found != sorted(set(found)) or not 0 <= found[0] <= found[-1] < model.n_layers:
        raise InputError(
            f"the layers are {found}, expected some of 0 … {model.n_layers - 1} of {model.name!r}, ascending "
            f"and each once; choose others"
        )
    return found


def check_targets(targets: Targets, requests: Sequence[EditRequest], layers: Sequence[int], model: Model) -> None:
    """Refuse targets that were found for something else.

    Raises:
        InputError: other requests, another layer or width, or states that are not finite.
    """
    ids = tuple(request.id for request in requests)
    if targets.ids != ids or targets.layer != layers[-1] or targets.z.shape[1] != model.d_model:
        raise InputError(
            f"the targets are {len(targets.ids)} states of width {targets.z.shape[1]} after layer "
            f"{targets.layer}, expected those of these {len(ids)} requests, of width {model.d_model}, after "
            f"layer {layers[-1]}; find them again"
        )
    check_finite(targets.z, "the targets z")


def moment_matrices(
    moments: Mapping[int, SecondMoment | Tensor], layers: Sequence[int], model: Model
) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:
    """The matrix for each layer.

    Raises:
        InputError: one is absent, of the wrong shape, not finite, or of another model or layer.
    """
    found = {}
    for layer in layers:
        if layer not in moments:
            raise InputError(
                f"there is no second moment for layer {layer} (found: {sorted(moments)}); collect it with "
                f"collect_moments or mechedit moments"
            )
        moment = moments[layer]
        found[layer] = moment.matrix if isinstance(moment, SecondMoment) else torch.as_tensor(moment)
        if tuple(found[layer].shape) != (model.d_mlp, model.d_mlp):
            raise InputError(
                f"the second moment for layer {layer} is {tuple(found[layer].shape)}, expected "
                f"{(model.d_mlp, model.d_mlp)}, that is [d_mlp, d_mlp]; collect it for this model"
            )
        check_finite(found[layer], f"the second moment of layer {layer}: its values")
    named = {layer: given for layer in layers if isinstance(given := moments[layer], SecondMoment)}
    if named:
        check_moments(named, model)
    return found


def states(model: Model, requests: Sequence[EditRequest], layer: int, batch_size: int) -> Float[Tensor, "fact d_model"]:
    """h: `resid` after `layer` at the subject's last token of each request's bare prompt."""
    return at_subjects(model, requests, Site(layer, "resid"), [BARE], batch_size)[:, 0]


def mean_keys(
    model: Model, requests: Sequence[EditRequest], layer: int, prefixes: Sequence[str], config: SpreadConfig
) -> Float[Tensor, "d_mlp fact"]:
    """Each fact's key: `mlp_key` at the subject's last token, averaged over prefixes (Eq. 19), in float64."""
    keys = at_subjects(model, requests, Site(layer, "mlp_key"), prefixes, config.batch_size).double()
    weights = keys.new_full((len(prefixes),), 1 / len(prefixes))
    if config.convention == "memit-2022" and len(prefixes) > 1:
        weights[0], weights[1:] = 1 / 2, 1 / (2 * (len(prefixes) - 1))
    return torch.einsum("fpk,p->kf", keys, weights)


@torch.no_grad()
def at_subjects(
    model: Model, requests: Sequence[EditRequest], site: Site, prefixes: Sequence[str], batch_size: int
) -> Float[Tensor, "fact prefix width"]:
    """What `site` holds at the subject's last token of each request behind each prefix."""
    prompts = [prompt for request in requests for prompt in prefixed_prompts(model, request, prefixes)]
    found = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        tokens = pad([prompt.ids for prompt in chunk], model.tokenizer, model.device)
        read = model.run(tokens, read=[site], stop_after=site.layer)[site]
        at = column([prompt.last_subject for prompt in chunk], read.device)
        found.append(read.take_along_dim(at[..., None], 1)[:, 0].float())
    return torch.cat(found).unflatten(0, (len(requests), len(prefixes)))


def shares_left(layers: Sequence[int], place: int, config: SpreadConfig) -> int:
    """By how much the residual is divided at layers[place]: uniform over what is left of the range."""
    if config.convention == "memit-2022":
        return len(layers) - place
    return layers[-1] - layers[place] + 1


def _relative(residual: Tensor, start: Tensor) -> float:
    """‖residual‖ / ‖start‖; 0 where there was nothing to do."""
    size = float(start.norm())
    return float(residual.norm()) / size if size else 0.0
