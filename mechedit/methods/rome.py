"""ROME (Meng et al., 2022): facts written into one MLP layer, one after another, each exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.edit import Edit, Factors, add_, copy_weights, restore_, restoring
from mechedit.errors import InputError, check_choice
from mechedit.methods.checks import check_target_settings, check_target_weights, check_targets
from mechedit.methods.keys import KeyExtractor, prefix_mean
from mechedit.methods.manifest import edit_manifest, layer_record, relative_norm, relative_residuals, search_record
from mechedit.methods.method import EditTask, edit_method
from mechedit.methods.post_norm import change_before_norm
from mechedit.methods.rules import damped_moment, moment_factor
from mechedit.methods.settings import DampedConfig
from mechedit.models import Model
from mechedit.prefixes import BARE, check_prefixes, make_prefixes
from mechedit.progress import progress_bar
from mechedit.solve import Factor, Update, equality_update
from mechedit.split_tensors import whole
from mechedit.targets import Targets, find_targets


@dataclass(frozen=True, kw_only=True)
class RomeConfig(DampedConfig):
    """Settings of ROME; the defaults are the published code's for GPT-J, but for the learning rate.

    `convention="paper"` takes the weights of Appendix E.5, which are not those of the code, and k behind prefix and
    subject alone (Eq. 3).
    """

    steps: int = 20
    """Most steps of the search for z."""
    relative_lr: float | int = 0.5
    """Adam's learning rate in units of the typical |hᵢ|, where h is the MLP's output; not used where `lr` is set."""
    clamp: float | int = 4.0
    """Largest ‖δ‖, in units of ‖h‖, where h is the MLP's output."""
    keys: Literal["prefixes", "published"] = "prefixes"
    """`prefixes`: k is the mean over prefixes (r-ROME). `published`: only in M⁻¹ k, and the bare prompt's elsewhere."""

    generated_prefixes: int = 20
    """Texts that the model generates, half of 5 tokens and half of 10, beside the bare prompt (Appendix E.5)."""

    shares_targets: ClassVar[bool] = False
    by_text: ClassVar[dict[str, Any]] = {"kl_weight": 100.0, "weight_decay": 1.5e-3}
    search: ClassVar[dict[str, Any]] = {"part": "mlp_out"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("keys", self.keys, ("prefixes", "published"))

    def default_prefixes(self, model: Model) -> tuple[str, ...]:
        """The bare prompt, and `generated_prefixes` texts of 5 and of 10 tokens, from the beginning of a text on."""
        return make_prefixes(model, seed=self.seed, starts=("",), lengths=(5, 10), count=self.generated_prefixes)


@edit_method(RomeConfig)
def rome(task: EditTask[RomeConfig]) -> Edit:
    """Write facts one after another into one MLP layer, each exactly (ROME; Meng et al., 2022).

    For each request, on the model as edited so far: z is searched for as the MLP's output (Eq. 4), and the rank-one ΔW
    of Eq. 2 makes the layer return it at the key k, with the least change on old keys,

        ΔW = (z − W k) (M⁻¹ k)ᵀ / kᵀ M⁻¹ k,        M = E[k kᵀ].

    The published code takes k as the mean over prefixes in M⁻¹ k, but from the bare prompt elsewhere, which makes some
    edits so large that they disable the model; r-ROME (Gupta et al., 2024, "Rebuilding ROME") takes the mean
    everywhere, as the default here does.

    Targets that are passed are taken as they are: those of later requests then do not see the edits before them. The
    manifest's `residuals` holds the layer's record, and `left` the relative residual of each request after all edits.
    More than one layer is refused.
    """
    model, config, layer = task.model, task.config, _single_layer(task.layers)
    prefixes, provenance = _prefixes_and_provenance(task, layer)
    # One layer's keys do not depend on its own down-projection: they stay as they are while it is edited.
    keys = _keys(task, prefixes, layer)
    factor = moment_factor(damped_moment(task.moments[layer], config.damping), keys.device)
    earlier = task.previous.get(layer)
    targets, starts, updates = [], [], []
    total = torch.zeros(model.d_key, model.d_model, dtype=torch.float64, device="cpu")
    originals = copy_weights(model, [layer])
    with restoring(model, [layer]):
        for index, request in enumerate(progress_bar(task.requests, desc=task.method, unit="fact", leave=None)):
            if task.targets is None:
                targets.append(find_targets(model, [request], layer, prefixes, config.targets))
            else:
                targets.append(task.targets.single(index, request))
            starts.append(_residual(model, layer, keys[index], targets[-1], config))
            updates.append(_rank_one_update(model, layer, keys[index], starts[-1], factor, earlier, config))
            # All so far at once, so that half-precision weights are rounded once, as they will be by the whole edit.
            total += updates[-1].delta.to(total)
            restore_(model, originals)
            add_(model, layer, total)
        ends = [
            _residual(model, layer, fact_keys, target, config) for fact_keys, target in zip(keys, targets, strict=True)
        ]
    start, end = torch.stack(starts), torch.stack(ends)
    after = relative_norm(end, start)
    manifest = {
        **edit_manifest(provenance, [layer], task.requests, targets[0], prefixes),
        "residuals": [layer_record(layer, updates, before=1.0, after=after, own=after)],
        "left": relative_residuals(end, start),
        **search_record(*targets),
    }
    return Edit(factors={layer: _sum_of_updates(updates)}, manifest=manifest)


def _keys(task: EditTask[RomeConfig], prefixes: Sequence[str], layer: int) -> Float[Tensor, "fact prefix d_mlp"]:
    """The keys of every fact behind all prefixes, and last that of the bare prompt; whole in every process."""
    config = task.config
    read = partial(KeyExtractor, task.model, task.requests, token=config.token, batch_size=config.batch_size)
    if config.convention == "paper":
        parts = read(prefixes, subject_alone=True).keys(layer), read([BARE]).keys(layer)
        return torch.cat([whole(part) for part in parts], 1)
    return whole(read([*prefixes, BARE]).keys(layer))


def _single_layer(layers: Sequence[int]) -> int:
    """The only layer.

    Raises:
        InputError: there are more.
    """
    if len(layers) > 1:
        raise InputError(f"the layers are {layers}, expected one: ROME edits a single layer; choose one of them")
    return layers[0]


def _prefixes_and_provenance(task: EditTask[RomeConfig], layer: int) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The prefixes, those of the targets where these are passed, and the unedited model's provenance.

    Raises:
        InputError: targets of other requests, layer, settings, prefixes or weights.
    """
    if task.targets is None:
        prefixes = check_prefixes(task.prefixes or task.config.default_prefixes(task.model))
        return prefixes, task.model.provenance()
    check_target_settings(task.targets, task.requests, task.prefixes, task.config.targets)
    check_targets(task.targets, task.requests, layer, task.model)
    return check_prefixes(task.targets.prefixes), check_target_weights(task.targets, task.model)


def _rank_one_update(
    model: Model,
    layer: int,
    keys: Float[Tensor, "prefix d_mlp"],
    residual: Float[Tensor, " d_model"],
    factor: Factor,
    earlier: Float[Tensor, "d_mlp earlier"] | None,
    config: RomeConfig,
) -> Update:
    """The rank-one ΔW that closes the residual of one fact (ROME Eq. 2); the last key is the bare prompt's."""
    mean = prefix_mean(keys[None, :-1])
    change = change_before_norm(model, layer, _value_keys(keys, config)[None], residual[None])
    update = equality_update(mean, change.T.to(mean), factor, previous=earlier)
    if config.keys == "prefixes":
        return update
    bare = keys[-1:].to(mean) @ update.left
    return replace(update, left=update.left * (mean.T @ update.left) / bare)


def _residual(
    model: Model, layer: int, keys: Float[Tensor, "prefix d_mlp"], target: Targets, config: RomeConfig
) -> Float[Tensor, " d_model"]:
    """Z − W k of one fact, on the model as it is now."""
    value = model.module_output(layer, _value_keys(keys, config)).mean(0)
    return target.z[0].to(value) - value


def _value_keys(keys: Float[Tensor, "prefix d_mlp"], config: RomeConfig) -> Float[Tensor, "value_prefix d_mlp"]:
    """The keys at which the layer is to return z: those behind all prefixes, or the bare prompt's, which comes last."""
    return keys[:-1] if config.keys == "prefixes" else keys[-1:]


def _sum_of_updates(updates: Sequence[Update]) -> Factors:
    """The sum of rank-one updates, one column of `left` and one row of `right` each."""
    left, right = [update.left for update in updates], [update.right for update in updates]
    return Factors(left=torch.cat(left, 1), right=torch.cat(right))
