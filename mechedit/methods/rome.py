"""ROME (Meng et al., 2022): facts written into one MLP layer, one after another, each exactly.

For each request, on the model as edited so far: z is searched for as the MLP's output (Eq. 4), and the rank-one ΔW of
Eq. 2 makes the layer give it at the key, with the least change on old keys,

    ΔW = (z − W k) (M⁻¹ k)ᵀ / kᵀ M⁻¹ k,        M = E[k kᵀ].

The published code takes k as the mean over prefixes in M⁻¹ k, but from the bare prompt elsewhere, which makes some
edits so large that they disable the model; r-ROME (Gupta et al., 2024, "Rebuilding ROME") takes the mean everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mechedit.data import EditRequest
from mechedit.edit import Edit, Factors, add_, copies, preserved, restore_
from mechedit.errors import InputError, check_choice
from mechedit.methods.keys import Recollection, prefix_mean
from mechedit.methods.rules import Moments, Previous, factor_of
from mechedit.methods.settings import SearchConfig, configured
from mechedit.methods.spread import check_made_on, check_targets, described, left_of, raw_change, record, relative
from mechedit.methods.steps import check_input, check_shared, named
from mechedit.models import Model
from mechedit.prompts import BARE, check_prefixes, make_prefixes
from mechedit.solve import Factor, Update, equality_update
from mechedit.targets import Targets, find_targets


@dataclass(frozen=True, kw_only=True)
class RomeConfig(SearchConfig):
    """Settings of ROME; the defaults are those of the published code for GPT-J."""

    steps: int = 20
    clamp: float | int = 4.0
    keys: Literal["prefixes", "published"] = "prefixes"
    """`prefixes`: k is the mean over prefixes (r-ROME). `published`: only in M⁻¹ k, and the bare prompt's elsewhere."""

    shares_targets: ClassVar[bool] = False
    search: ClassVar[dict[str, Any]] = {"part": "mlp_out"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("keys", self.keys, ("prefixes", "published"))


def rome(
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    moments: Moments,
    prefixes: Sequence[str] | None = None,
    config: RomeConfig | None = None,
    targets: Targets | None = None,
    previous: Previous | None = None,
) -> Edit:
    """Write `requests` one after another into the one layer of `layers`; arguments and errors are those of `memit`.

    Given `targets` are taken as they are: those of later requests then know nothing of the edits before them, while
    `rome` alone searches for each on the model edited so far. The manifest's `residuals` has the layer's record, and
    `left` what is missing of each request's z after all of them.

    Raises:
        InputError: besides, more than one layer.
    """
    config = config or configured(RomeConfig, "rome", model)
    layers = check_input(model, requests, layers, moments, previous, config)
    if len(layers) > 1:
        raise InputError(f"the layers are {layers}, expected one: ROME edits a single layer; choose one of them")
    if targets is not None:
        check_shared(targets, requests, prefixes, config.targets)
        check_targets(targets, requests, layers[0], model)
        prefixes = targets.prefixes
    prefixes = check_prefixes(prefixes or make_prefixes(model, seed=config.seed))
    (layer,), provenance = layers, model.provenance() if targets is None else check_made_on(targets, model)
    # One layer's keys do not depend on its own down-projection: they stay as they are while it is edited.
    keys = Recollection(model, requests, [*prefixes, BARE], batch_size=config.batch_size).keys(layer)
    factor, earlier = factor_of(moments[layer], keys.device), (previous or {}).get(layer)
    found, starts, updates = [], [], []
    total = torch.zeros(model.d_key, model.d_model, dtype=torch.float64)
    originals = copies(model, layers)
    with preserved(model, layers):
        for place, request in enumerate(tqdm(requests, desc="rome", unit="fact", leave=None)):
            own = find_targets(model, [request], layer, prefixes, config.targets) if targets is None else targets
            found.append(own if targets is None else _only(own, place))
            starts.append(_gap(model, layer, keys[place], found[-1], config))
            updates.append(_update(model, layer, keys[place], starts[-1], factor, earlier, config))
            # All so far at once, so that half-precision weights are rounded once, as they will be by the whole edit.
            total += updates[-1].delta.to(total)
            restore_(model, originals)
            add_(model, layer, total)
        ends = [_gap(model, layer, own, target, config) for own, target in zip(keys, found, strict=True)]
    start, end = torch.stack(starts), torch.stack(ends)
    after = relative(end, start)
    manifest = {
        **described(provenance, layers, requests, found[0], prefixes),
        "residuals": [record(layer, updates, before=1.0, after=after, own=after)],
        "left": left_of(end, start),
    }
    unconverged = [name for target in found for name in target.unconverged]
    return named(Edit(factors={layer: _joined(updates)}, manifest=manifest), "rome", config, unconverged)


def _update(
    model: Model,
    layer: int,
    keys: Float[Tensor, "prefix d_mlp"],
    gap: Float[Tensor, " d_model"],
    factor: Factor,
    earlier: Float[Tensor, "d_mlp earlier"] | None,
    config: RomeConfig,
) -> Update:
    """The rank-one ΔW that closes the gap of one fact (ROME Eq. 2)."""
    mean = prefix_mean(keys[None, :-1])
    raw = raw_change(model, layer, _divided_by(keys, config)[None], gap[None])
    update = equality_update(mean, raw.T.to(mean), factor, previous=earlier)
    if config.keys == "prefixes":
        return update
    bare = keys[-1:].to(mean) @ update.left
    return replace(update, left=update.left * (mean.T @ update.left) / bare)


def _gap(
    model: Model, layer: int, keys: Float[Tensor, "prefix d_mlp"], target: Targets, config: RomeConfig
) -> Float[Tensor, " d_model"]:
    """What is missing of one fact on the model as it is now, z − W k."""
    now = model.module_output(layer, _divided_by(keys, config)).mean(0)
    return target.z[0].to(now) - now


def _divided_by(keys: Float[Tensor, "prefix d_mlp"], config: RomeConfig) -> Float[Tensor, "some d_mlp"]:
    """The keys at which the value is wanted, and by which ΔW is scaled; the bare prompt's comes last."""
    return keys[:-1] if config.keys == "prefixes" else keys[-1:]


def _joined(updates: Sequence[Update]) -> Factors:
    """The sum of the updates, a column and a row each."""
    left, right = [update.left for update in updates], [update.right for update in updates]
    return Factors(left=torch.cat(left, 1), right=torch.cat(right))


def _only(targets: Targets, place: int) -> Targets:
    """Those of one fact."""
    at = slice(place, place + 1)
    ids = targets.ids[at]
    return replace(
        targets, z=targets.z[at], initial=targets.initial[at], ids=ids,
        summary=targets.summary[targets.summary.id.isin(ids)], losses=targets.losses[targets.losses.id.isin(ids)],
    )  # fmt: skip
