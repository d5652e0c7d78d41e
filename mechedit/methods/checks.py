"""Checks before the long search: requests, layers, second moments, earlier keys, weights and targets.

All of them raise `InputError` with what was found, what was expected and what to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.data import EditRequest, check_requests
from mechedit.errors import InputError, brief, check_finite
from mechedit.methods.rules import EarlierKeys, Moments
from mechedit.methods.settings import MethodConfig
from mechedit.models import Model, layer_numbers, out_part
from mechedit.moments import SecondMoment, check_moments
from mechedit.prompt_tokens import one_spelling
from mechedit.provenance import ModelIdentity, check_provenance, value_hash
from mechedit.targets import TargetConfig, Targets


def check_input(
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    moments: Moments,
    previous: EarlierKeys,
    config: MethodConfig,
) -> list[int]:
    """Refuse all that can be refused before the long search; return the layers as a list.

    Args:
        model: to be edited; every weight is read once.
        requests: what it should say.
        layers: the range to edit.
        moments: E[k kᵀ] for each layer that will be written to; not looked at when the method preserves no old keys.
        previous: keys of earlier edits, [d_mlp, earlier facts] by layer.
        config: settings of the method.

    Raises:
        InputError: conflicting requests; layers not ascending or not in the model; moments that are absent or of
            another model; keys of earlier edits that do not fit; weights that are not finite.
    """
    check_requests(one_spelling(model.tokenizer, requests))
    layers = check_layers(layers, model)
    if config.preserves_keys:
        moment_matrices(moments, config.edited_layers(layers), model)
    for layer, keys in previous.items():
        shape = tuple(getattr(keys, "shape", ()))
        if len(shape) != 2 or shape[0] != model.d_key or not isinstance(keys, Tensor):
            raise InputError(
                f"the earlier keys of layer {layer} are {shape or brief(keys)}, expected ({model.d_key}, number of "
                f"earlier facts); take them from edit_keys"
            )
        check_finite(f"the earlier keys of layer {layer}", keys)
    for name, parameter in model.named_parameters():
        check_finite(f"the weights {name}", parameter)
    return layers


def check_layers(layers: Sequence[int], model: Model) -> list[int]:
    """The layers as a list.

    Raises:
        InputError: none, not ascending, repeated, or not in the model; a block without a matrix to write into, or
            with keys of another width.
    """
    numbers = layer_numbers(layers)
    if not numbers or numbers != sorted(set(numbers)) or not 0 <= numbers[0] <= numbers[-1] < model.n_layers:
        raise InputError(
            f"the layers are {numbers}, expected some of 0 … {model.n_layers - 1} of {model.name!r}, ascending "
            f"and each once; choose others"
        )
    for layer in numbers:
        width = len(model.projection(layer))
        if width != model.d_key:
            raise InputError(
                f"the matrix of layer {layer} takes keys of width {width}, expected {model.d_key} like the first layer "
                f"of {model.name!r} that can be written; leave the layer out"
            )
    return numbers


def by_layer(name: str, values: Any) -> dict[int, Any]:
    """What a caller gives by layer, nothing where it is None.

    Raises:
        InputError: it is no mapping of layers.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise InputError(f"{name} are {brief(values)}, expected one for each layer, such as {{3: …, 4: …}}")
    return dict(values)


def moment_matrices(
    moments: Mapping[int, SecondMoment | Tensor], layers: Sequence[int], model: Model
) -> dict[int, Float[Tensor, "d_mlp d_mlp"]]:
    """The matrix E[k kᵀ] of each layer, checked.

    Raises:
        InputError: one is absent, of the wrong shape, not finite, or of another model or layer.
    """
    matrices = {}
    for layer in layers:
        if layer not in moments:
            raise InputError(
                f"there is no second moment for layer {layer} (found: {sorted(moments)}); collect it with "
                f"collect_moments or mechedit moments"
            )
        moment = moments[layer]
        matrix = moment.matrix if isinstance(moment, SecondMoment) else moment
        try:
            matrices[layer] = matrix if isinstance(matrix, Tensor) else torch.as_tensor(matrix, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the second moment for layer {layer} is {brief(matrix)}, expected a SecondMoment or a matrix; collect "
                f"it with collect_moments"
            ) from error
        if tuple(matrices[layer].shape) != (model.d_key, model.d_key):
            raise InputError(
                f"the second moment for layer {layer} is {tuple(matrices[layer].shape)}, expected "
                f"{(model.d_key, model.d_key)}, that is [d_mlp, d_mlp]; collect it for this model"
            )
        check_finite(f"the second moment of layer {layer}: its values", matrices[layer])
    with_origin = {layer: moment for layer in layers if isinstance(moment := moments[layer], SecondMoment)}
    if with_origin:
        check_moments(with_origin, model)
    return matrices


def check_targets(targets: Targets, requests: Sequence[EditRequest], layer: int, model: Model) -> None:
    """Refuse targets that do not belong to these requests, this layer or this model.

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


def check_target_settings(
    targets: Targets, requests: Sequence[EditRequest], prefixes: Sequence[str] | None, config: TargetConfig
) -> None:
    """Refuse targets that `find_targets` would not have found for these arguments; `spread` checks the layer.

    Raises:
        InputError: other requests, settings or prefixes.
    """
    actual = {"requests": targets.provenance.get("requests"), **targets.provenance.get("settings", {})}
    expected = {"requests": value_hash(list(requests)), **dataclasses.asdict(config)}
    if prefixes is not None:
        actual["prefixes"], expected["prefixes"] = list(targets.prefixes), list(prefixes)
    check_provenance(actual, expected, "the search for z", remedy="find the targets again")


def check_target_weights(targets: Targets, model: Model) -> dict[str, Any]:
    """The model's provenance, once it is known that the targets were found on these weights.

    Raises:
        InputError: they were found on other weights.
    """
    provenance = model.provenance()
    searched_on = targets.provenance.get("model", provenance)
    identity = ModelIdentity.of(provenance)
    # A state of the residual stream is the same whichever module is written.
    identity.require(ModelIdentity.of(searched_on), "the targets", "find them again", ignoring=("module",))
    return provenance
