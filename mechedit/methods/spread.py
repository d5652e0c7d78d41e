"""Algorithm 1 of MEMIT: the way from h to z is shared out over the layers, and each share becomes a ΔW.

For each layer l, ascending: keys are collected from the model as edited so far (Eq. 19), the layer is given its part
of what is missing at the goals (`Strategy`), and an `UpdateRule` turns both into ΔW (Eq. 14, or a rival's). The model
ends as it began; what comes out is an `Edit`, and the keys it was fitted at.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mechedit.data import EditRequest
from mechedit.edit import Edit, Factors, add_, edited, preserved
from mechedit.errors import InputError, check_choice, check_finite, check_positive
from mechedit.methods.keys import Recollection, prefix_mean
from mechedit.models import Model, Site, out_part
from mechedit.moments import SecondMoment, check_moments
from mechedit.prompts import check_prefixes
from mechedit.provenance import VERSION, check_provenance
from mechedit.solve import Update
from mechedit.targets import Convention, Targets

Strategy = Literal["uniform", "sqrt", "forward-replay", "last"]
STRATEGIES = ("uniform", "sqrt", "forward-replay", "last")


@runtime_checkable
class UpdateRule(Protocol):
    """How a method turns keys and wanted changes into ΔW; see `mechedit.methods.rules`."""

    def update(self, layer: int, keys: Float[Tensor, "d_mlp fact"], residuals: Float[Tensor, "d_model fact"]) -> Update:
        """The update of one layer's down-projection that changes its output at `keys` by `residuals`."""
        ...


@dataclass(frozen=True, kw_only=True)
class SpreadConfig:
    """How the way from h to z is shared out over the layers.

    - `uniform` (MEMIT Eq. 20): layer l is given 1/(L − l + 1) of what is missing at the last layer L.
    - `sqrt` (PMET; Li et al., 2024): 1/√(L − l + 1) of it.
    - `forward-replay` (MEMIT-FE; Liu et al., 2026): z is searched for at the *first* layer; a run with z in its place
      tells each later layer its own goal, and each layer is given all that is missing at its own.
    - `last`: only the last layer is edited, and given all of it.

    `convention="memit-2022"` follows the published code of MEMIT where the paper says otherwise: a key is the
    mean of the first prefix's key and the mean over the other prefixes (default: plain mean, Eq. 19), and
    shares count the listed layers still to come (default: the distance L − l + 1, Eq. 20; the two differ
    only when the list has gaps).
    """

    strategy: Strategy = "uniform"
    convention: Convention = "default"
    batch_size: int = 64
    """Prompts in one forward pass."""

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("convention", self.convention, ("default", "memit-2022"))
        check_positive("batch_size", self.batch_size)

    def edited_layers(self, layers: Sequence[int]) -> list[int]:
        """Those of a range that are written to."""
        return list(layers[-1:] if self.strategy == "last" else layers)

    def target_layer(self, layers: Sequence[int]) -> int:
        """Where in a range z is searched for."""
        return layers[0] if self.strategy == "forward-replay" else layers[-1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """An edit with the keys it was fitted at."""

    edit: Edit
    keys: Mapping[int, Float[Tensor, "d_mlp fact"]]
    """For each edited layer, the mean over prefixes, in float64. They are also those of the model after the edit,
    since a layer's keys do not depend on its own down-projection: what a later edit has to preserve (`previous`)."""


def spread(
    model: Model,
    requests: Sequence[EditRequest],
    targets: Targets,
    layers: Sequence[int],
    rule: UpdateRule,
    *,
    prefixes: Sequence[str] | None = None,
    config: SpreadConfig | None = None,
) -> Spread:
    """Write `targets` into `layers` (MEMIT Algorithm 1); the model is left as it was, bit for bit.

    Args:
        model: the one the targets were found on.
        requests: those of the targets, in the same order.
        targets: z at the last of `layers`; at the first with the strategy `forward-replay`.
        layers: 0-based, ascending; gaps are allowed.
        rule: makes each layer's update.
        prefixes: over which keys are averaged; the default is those of the targets.
        config: how to share out the residual.

    Returns:
        The edit and its keys. The edit's manifest holds, under `residuals`, one record a layer: `before` and `after`
        (what is left at the last layer of ‖goal − state‖, relative to the start), `own` (what the update left of the
        gap at the layer's own goal, relative to just before; with `forward-replay` each layer has a goal, else
        all have the last one's), `error` and `condition` of the linear system; under `left`, for each request, what
        is left of its own ‖goal − state‖ at the last layer; under `facts`, what was asked for.

    Raises:
        InputError: layers that are not ascending or not in the model; targets of other requests, weights or
            another layer; and what the rule refuses.
    """
    config = config or SpreadConfig()
    layers = check_layers(layers, model)
    check_targets(targets, requests, config.target_layer(layers), model)
    layers = config.edited_layers(layers)
    prefixes = check_prefixes(prefixes or targets.prefixes)
    provenance = check_made_on(targets, model)
    prompts = Recollection(model, requests, prefixes, batch_size=config.batch_size)
    prompts.move_(layers[0])
    goals = find_goals(prompts, targets, layers, config)
    last = max(goals, key=lambda site: site.order)
    factors, keys, records = {}, {}, []
    with preserved(model, layers):
        gaps = start = _gaps(prompts, goals)
        for place, layer in enumerate(tqdm(layers, desc="spread", unit="layer", leave=None)):
            # Keys come from the partly edited model: earlier layers have already moved them.
            found, own = prompts.keys(layer), _own(goals, layer)
            keys[layer] = prefix_mean(found, config.convention)
            share = raw_change(model, layer, found, gaps[own] / shares_left(layers, place, config))
            update = rule.update(layer, keys[layer], share.T.to(keys[layer]))
            factors[layer] = Factors(left=update.left, right=update.right)
            add_(model, layer, update.delta)
            before, gaps = gaps, _gaps(prompts, goals)
            sizes = {"before": relative(before[last], start[last]), "after": relative(gaps[last], start[last])}
            records.append(record(layer, [update], **sizes, own=relative(gaps[own], before[own])))
    manifest = {
        **described(provenance, layers, requests, targets, prefixes),
        "settings": dataclasses.asdict(config),
        "residuals": records,
        "left": left_of(gaps[last], start[last]),
    }
    return Spread(edit=Edit(factors=factors, manifest=manifest), keys=keys)


def edit_keys(model: Model, requests: Sequence[EditRequest], edit: Edit) -> dict[int, Float[Tensor, "d_mlp fact"]]:
    """The keys that `edit` was fitted at, [d_mlp, fact] for each of its layers, found again with one walk.

    A later edit preserves what this one wrote when it is given them as `previous`.

    Args:
        model: as it was before the edit.
        requests: those of the edit, in the same order.
        edit: made for this model, perhaps saved and loaded.

    Raises:
        InputError: the edit was made for other weights or other requests.
    """
    ids = [request.id for request in requests]
    if ids != list(edit.manifest.get("requests", ())):
        raise InputError(
            f"the {len(ids)} requests are not those of the edit ({len(edit.manifest.get('requests', ()))}), expected "
            f"the same ids in the same order; pass the requests it was made from"
        )
    with edited(model, edit):
        prompts = Recollection(model, requests, edit.manifest["prefixes"])
        convention = edit.manifest.get("settings", {}).get("convention", "default")
        return {layer: prefix_mean(prompts.keys(layer), convention) for layer in edit.layers}


def find_goals(
    prompts: Recollection, targets: Targets, layers: Sequence[int], config: SpreadConfig
) -> dict[Site, Float[Tensor, "fact d_model"]]:
    """Where states are to be moved to: z at its layer, and with `forward-replay` what follows from it later on."""
    first = Site(targets.layer, targets.part)
    goals = {first: targets.z}
    if config.strategy == "forward-replay" and len(layers) > 1:
        goals |= prompts.replay(first, targets.z, [Site(layer, targets.part) for layer in layers[1:]])
    return goals


def shares_left(layers: Sequence[int], place: int, config: SpreadConfig) -> float:
    """By how much the gap at its goal is divided for layers[place]."""
    if config.strategy in ("forward-replay", "last"):
        return 1.0
    published = config.convention == "memit-2022"
    count = len(layers) - place if published else layers[-1] - layers[place] + 1
    return math.sqrt(count) if config.strategy == "sqrt" else float(count)


def raw_change(
    model: Model, layer: int, keys: Float[Tensor, "fact prefix d_mlp"], change: Float[Tensor, "fact d_model"]
) -> Float[Tensor, "fact d_model"]:
    """The change of the projection's output that moves what the written module adds by `change`.

    The same, unless a norm lies between: y = g∘x/rms(x) becomes parallel to y + r when x moves by r·rms(x)/g (the
    length of y/g is fixed by the norm). rms(x)/g is taken as the mean over the prefixes' keys.
    """
    gain = model.output_gain(layer, keys).mean(1)
    return torch.where(gain == 0, 0, change.to(gain) / gain)


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


def check_targets(targets: Targets, requests: Sequence[EditRequest], layer: int, model: Model) -> None:
    """Refuse targets that were found for something else.

    Raises:
        InputError: other requests, another layer or width, states of what another module adds, or not finite.
    """
    written = out_part(model.module)
    if targets.part not in ("resid", written):
        raise InputError(
            f"the targets are states of {targets.part}, expected resid or {written}, since the model writes into "
            f"{model.module!r}; find them again"
        )
    ids = tuple(request.id for request in requests)
    if targets.ids != ids or targets.layer != layer or targets.z.shape[1] != model.d_model:
        raise InputError(
            f"the targets are {len(targets.ids)} states of width {targets.z.shape[1]} after layer "
            f"{targets.layer}, expected those of these {len(ids)} requests, of width {model.d_model}, after "
            f"layer {layer}; find them again"
        )
    check_finite("the targets z", targets.z)


def check_made_on(targets: Targets, model: Model) -> dict[str, Any]:
    """The model's provenance, once it is known that the targets were found on these weights.

    Raises:
        InputError: they were found on others.
    """
    provenance = model.provenance()
    made_on = targets.provenance.get("model", provenance)
    check_provenance(made_on, {"weights_hash": provenance["weights_hash"]}, "the targets", remedy="find them again")
    return provenance


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
        if tuple(found[layer].shape) != (model.d_key, model.d_key):
            raise InputError(
                f"the second moment for layer {layer} is {tuple(found[layer].shape)}, expected "
                f"{(model.d_key, model.d_key)}, that is [d_mlp, d_mlp]; collect it for this model"
            )
        check_finite(f"the second moment of layer {layer}: its values", found[layer])
    named = {layer: given for layer in layers if isinstance(given := moments[layer], SecondMoment)}
    if named:
        check_moments(named, model)
    return found


def described(
    provenance: Mapping[str, Any],
    layers: Sequence[int],
    requests: Sequence[EditRequest],
    targets: Targets | None,
    prefixes: Sequence[str],
) -> dict[str, Any]:
    """What a manifest says of the unedited model, the facts, and how they were looked for."""
    found = {} if targets is None else {"targets": dict(targets.provenance)}
    return {
        "mechedit": VERSION,
        "layers": list(layers),
        "model": dict(provenance),
        "requests": [request.id for request in requests],
        "facts": [f"{request.text} → {request.target_new}" for request in requests],
        "prefixes": list(prefixes),
        **found,
    }


def record(layer: int, updates: Sequence[Update], **sizes: float) -> dict[str, Any]:
    """One layer's line in a manifest: what was left when, and how well its systems were solved at worst."""
    worst = {name: max(getattr(update, name) for update in updates) for name in ("error", "condition")}
    return {"layer": layer, **sizes, **worst}


def left_of(gap: Float[Tensor, "fact d_model"], start: Float[Tensor, "fact d_model"]) -> list[float]:
    """Each request's ‖gap‖ relative to its start."""
    return [relative(now, before) for now, before in zip(gap, start, strict=True)]


def relative(gap: Tensor, start: Tensor) -> float:
    """‖gap‖ / ‖start‖; 0 where there was nothing to do."""
    size = float(start.norm())
    return float(gap.norm()) / size if size else 0.0


def _gaps(
    prompts: Recollection, goals: Mapping[Site, Float[Tensor, "fact d_model"]]
) -> dict[Site, Float[Tensor, "fact d_model"]]:
    """What is missing at each goal that the edit is not past."""
    ahead = [site for site in goals if site.layer >= prompts.layer]
    return {site: goals[site].to(state) - state for site, state in prompts.states(ahead).items()}


def _own(goals: Mapping[Site, Tensor], layer: int) -> Site:
    """The goal that a layer works towards: the nearest at or above it."""
    return min((site for site in goals if site.layer >= layer), key=lambda site: site.order)
