"""The steps that methods share: what is refused at the door, the search for z, and the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mechedit.data import EditRequest, check_requests
from mechedit.edit import Edit
from mechedit.errors import InputError, check_finite
from mechedit.methods.rules import Moments, Previous
from mechedit.methods.settings import MethodConfig, SearchConfig
from mechedit.methods.spread import UpdateRule, check_layers, moment_matrices, spread
from mechedit.models import Model
from mechedit.provenance import check_provenance, value_hash
from mechedit.targets import TargetConfig, Targets, find_targets


def check_input(
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    moments: Moments | None,
    previous: Previous | None,
    config: MethodConfig,
) -> list[int]:
    """Refuse all that can be refused before the long search; the layers as a list.

    Raises:
        InputError: conflicting requests; layers not ascending or not in the model; moments that are absent or of
            another model; keys of earlier edits that do not fit; weights that are not finite.
    """
    check_requests(requests)
    layers = check_layers(layers, model)
    if config.preserves_keys:
        moment_matrices(moments or {}, config.edited_layers(layers), model)
    for layer, keys in (previous or {}).items():
        if keys.ndim != 2 or len(keys) != model.d_key:
            raise InputError(
                f"the earlier keys of layer {layer} are {tuple(keys.shape)}, expected ({model.d_key}, number of "
                f"earlier facts); take them from edit_keys"
            )
        check_finite(f"the earlier keys of layer {layer}", keys)
    for name, parameter in model.named_parameters():
        check_finite(f"the weights {name}", parameter)
    return layers


def write(
    method: str,
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    rule: UpdateRule,
    prefixes: Sequence[str] | None,
    config: SearchConfig,
    targets: Targets | None,
) -> Edit:
    """Search for z, unless it is given, and spread it over the layers by the method's rule.

    Raises:
        InputError: targets of other requests, layer, settings, prefixes or weights; and what the rule refuses.
    """
    if targets is None:
        targets = find_targets(model, requests, config.target_layer(layers), prefixes, config.targets)
    else:
        check_shared(targets, requests, prefixes, config.targets)
    edit = spread(model, requests, targets, layers, rule, config=config.spread).edit
    return named(edit, method, config, targets.unconverged)


def named(edit: Edit, method: str, config: MethodConfig, unconverged: Sequence[str]) -> Edit:
    """The edit with its method, the method's settings, and the facts whose search ended too early, in the manifest."""
    manifest = {
        "method": method,
        **edit.manifest,
        "settings": dataclasses.asdict(config),
        "unconverged": list(unconverged),
    }
    return dataclasses.replace(edit, manifest=manifest)


def check_shared(
    targets: Targets, requests: Sequence[EditRequest], prefixes: Sequence[str] | None, config: TargetConfig
) -> None:
    """Refuse targets that `find_targets` would not have found for these arguments; `spread` checks the layer.

    Raises:
        InputError: other requests, settings or prefixes.
    """
    made = {"requests": targets.provenance.get("requests"), **targets.provenance.get("settings", {})}
    wanted = {"requests": value_hash(list(requests)), **dataclasses.asdict(config)}
    if prefixes is not None:
        made["prefixes"], wanted["prefixes"] = list(targets.prefixes), list(prefixes)
    check_provenance(made, wanted, "the search for z", remedy="find the targets again")
