"""Algorithm 1 of MEMIT: the residual z − h is spread over the layers, and each layer's share becomes a ΔW.

For each layer l, ascending: keys are collected from the model as edited so far (Eq. 19), the layer is given its share
of the residual at its target states (`SpreadConfig`), and an `UpdateRule` turns both into ΔW (Eq. 14, or another
method's). The model ends as it began; the result is an `Edit` and the keys it was fitted at.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from mechedit.data import EditRequest
from mechedit.edit import Edit, Factors, add_, edited, restoring
from mechedit.errors import InputError
from mechedit.methods.checks import check_layers, check_target_weights, check_targets
from mechedit.methods.keys import KeyExtractor, prefix_mean
from mechedit.methods.manifest import edit_manifest, layer_record, relative_norm, relative_residuals
from mechedit.methods.post_norm import change_before_norm
from mechedit.methods.settings import SpreadConfig
from mechedit.models import Model, Site, exclusive
from mechedit.prefixes import check_prefixes
from mechedit.progress import progress_bar
from mechedit.solve import Update
from mechedit.split_tensors import whole
from mechedit.targets import Targets


@runtime_checkable
class UpdateRule(Protocol):
    """How a method turns a layer's keys and residuals into ΔW; see `mechedit.methods.rules`."""

    def update(self, layer: int, keys: Float[Tensor, "d_mlp fact"], residuals: Float[Tensor, "d_model fact"]) -> Update:
        """The update of one layer's down-projection that changes its output at `keys` by `residuals`."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class SpreadResult:
    """An edit with the keys it was fitted at."""

    edit: Edit
    keys: Mapping[int, Float[Tensor, "d_mlp fact"]]
    """For each edited layer, the mean over prefixes, in float64. They are also the keys of the model after the edit,
    since a layer's keys do not depend on its own down-projection: a later edit has to preserve them (`previous`). Where
    the model is split over processes, so are they, in rows."""


@exclusive
def spread(
    model: Model,
    requests: Sequence[EditRequest],
    targets: Targets,
    layers: Sequence[int],
    rule: UpdateRule,
    *,
    prefixes: Sequence[str] | None = None,
    config: SpreadConfig | None = None,
) -> SpreadResult:
    """Write `targets` into `layers` (MEMIT Algorithm 1); the model is left as it was, bit for bit.

    Args:
        model: the one the targets were found on.
        requests: those of the targets, in the same order.
        targets: z at the last of `layers`; at the first with the strategy `forward-replay`.
        layers: 0-based, ascending; gaps are allowed.
        rule: makes each layer's update.
        prefixes: over which keys are averaged; the default is those of the targets.
        config: how to spread the residual.

    Returns:
        The edit and its keys. The edit's manifest holds, under `residuals`, one record per layer: `before` and `after`
        (‖residual‖ at the last target states, relative to the start), `own` (‖residual‖ after the update at the
        layer's own target states, relative to just before it; with `forward-replay` each layer has its own, else all
        have those of the last), `error` and `condition` of the linear system; under `left`, for each request, its own
        ‖residual‖ at the last target states, relative to the start; under `facts`, what was asked for.

    Raises:
        InputError: layers that are not ascending or not in the model; targets of other requests, weights or
            another layer; and what the rule refuses.
    """
    config = config or SpreadConfig()
    layers = check_layers(layers, model)
    check_targets(targets, requests, config.target_layer(layers), model)
    layers = config.edited_layers(layers)
    prefixes = check_prefixes(prefixes or targets.prefixes)
    provenance = check_target_weights(targets, model)
    extractor = KeyExtractor(
        model, requests, prefixes, token=config.token, subject_alone=config.convention == "paper",
        batch_size=config.batch_size,
    )  # fmt: skip
    extractor.advance_(layers[0])
    target_states = find_target_states(extractor, targets, layers, config)
    last = max(target_states, key=lambda site: site.order)
    updates, keys, records = {}, {}, []
    with restoring(model, layers):
        residuals = start = _residuals(extractor, target_states)
        for index, layer in enumerate(progress_bar(layers, desc="spread", unit="layer", leave=None)):
            # Keys come from the partly edited model: earlier layers have already moved them.
            site = _next_site(target_states, layer)
            layer_share = residuals[site] / share_divisor(layers, index, config)
            keys[layer], change = _keys_and_change(extractor, layer, layer_share, config)
            updates[layer] = update = rule.update(layer, keys[layer], change.T)
            add_(model, layer, update.delta)
            before, residuals = residuals, _residuals(extractor, target_states)
            records.append(
                layer_record(
                    layer,
                    [update],
                    before=relative_norm(before[last], start[last]),
                    after=relative_norm(residuals[last], start[last]),
                    own=relative_norm(residuals[site], before[site]),
                )
            )
    manifest = {
        **edit_manifest(provenance, layers, requests, targets, prefixes),
        "settings": dataclasses.asdict(config),
        "residuals": records,
        "left": relative_residuals(residuals[last], start[last]),
    }
    # An edit is whole; the parts of its factors are gathered once no linear system is in memory any more.
    factors = {layer: Factors(left=whole(update.left), right=update.right) for layer, update in updates.items()}
    return SpreadResult(edit=Edit(factors=factors, manifest=manifest), keys=keys)


@exclusive
def edit_keys(model: Model, requests: Sequence[EditRequest], edit: Edit) -> dict[int, Float[Tensor, "d_mlp fact"]]:
    """The keys that `edit` was fitted at, [d_mlp, fact] for each of its layers, computed again.

    A later edit preserves what this one wrote when it is given them as `previous`. Where the model is split over
    processes, so are they, in rows: `mechedit.split_tensors.whole` gathers them.

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
    settings = edit.manifest.get("settings", {})
    convention, token = settings.get("convention", "default"), settings.get("token", "subject_last")
    with edited(model, edit):
        extractor = KeyExtractor(
            model, requests, edit.manifest["prefixes"], token=token, subject_alone=convention == "paper"
        )
        return {layer: prefix_mean(extractor.keys(layer), convention) for layer in edit.layers}


def _keys_and_change(
    extractor: KeyExtractor, layer: int, change: Float[Tensor, "fact d_model"], config: SpreadConfig
) -> tuple[Float[Tensor, "d_mlp fact"], Float[Tensor, "fact d_model"]]:
    """The facts' keys at a layer, and the change of its projection's output that moves the module's by `change`.

    Both in float64 on the device of the keys; the keys behind all prefixes are in memory no longer than this takes.
    """
    prefix_keys = extractor.keys(layer)
    keys = prefix_mean(prefix_keys, config.convention)
    return keys, change_before_norm(extractor.model, layer, prefix_keys, change).to(keys.device, keys.dtype)


def find_target_states(
    extractor: KeyExtractor, targets: Targets, layers: Sequence[int], config: SpreadConfig
) -> dict[Site, Float[Tensor, "fact d_model"]]:
    """The states to reach, by site: z at its layer, and with `forward-replay` what follows from it at later layers."""
    first = Site(targets.layer, targets.part)
    states = {first: targets.z}
    if config.strategy == "forward-replay" and len(layers) > 1:
        states |= extractor.replay(first, targets.z, [Site(layer, targets.part) for layer in layers[1:]])
    return states


def share_divisor(layers: Sequence[int], index: int, config: SpreadConfig) -> float:
    """The number by which the residual is divided to give the share of layers[index]."""
    if config.strategy in ("forward-replay", "last"):
        return 1.0
    counted = config.convention == "memit-2022" or config.strategy == "boundary"
    count = len(layers) - index if counted else layers[-1] - layers[index] + 1
    return math.sqrt(count) if config.strategy == "sqrt" else float(count)


def _residuals(
    extractor: KeyExtractor, target_states: Mapping[Site, Float[Tensor, "fact d_model"]]
) -> dict[Site, Float[Tensor, "fact d_model"]]:
    """Target state − state at each site that the edit has not passed."""
    ahead = [site for site in target_states if site.layer >= extractor.layer]
    return {site: target_states[site].to(state) - state for site, state in extractor.states(ahead).items()}


def _next_site(target_states: Mapping[Site, Tensor], layer: int) -> Site:
    """The site whose target states a layer works towards: the nearest at or above it."""
    return min((site for site in target_states if site.layer >= layer), key=lambda site: site.order)
