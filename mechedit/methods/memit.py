"""MEMIT (Meng et al., 2023): many facts in one batch, written into a range of MLP layers.

Requests, layers and second moments go in, an `Edit` comes out: z is searched for at the last layer (Eq. 16)
and spread over the range (Algorithm 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mechedit.artifacts import check_provenance, value_hash
from mechedit.edit import Edit
from mechedit.facts import EditRequest, check_requests
from mechedit.methods.settings import configured
from mechedit.models import Model
from mechedit.moments import SecondMoment
from mechedit.solve import check_finite
from mechedit.spread import SpreadConfig, Strategy, check_layers, moment_matrices, spread
from mechedit.targets import Convention, TargetConfig, Targets, find_targets


@dataclass(frozen=True, kw_only=True)
class MemitConfig:
    """Settings of MEMIT; see `TargetConfig` and `SpreadConfig` for their meaning and conventions."""

    covariance_weight: float | int = 15_000.0
    """λ: how much the old keys count, in units of one new fact."""
    steps: int = 25
    lr: float | int = 0.5
    clamp: float | int = 0.75
    weight_decay: float | int = 0.5
    kl_weight: float | int = 0.0625
    kl_prompt: str = "{} is a"
    threshold: float | int = 0.05
    strategy: Strategy = "uniform"
    convention: Convention = "default"
    joint: bool = True
    seed: int = 0
    """For prefixes that are generated."""
    batch_size: int = 64
    """Facts searched together, and prompts in one forward pass of the writing."""

    @property
    def targets(self) -> TargetConfig:
        """The settings that concern the search for z."""
        return TargetConfig(**_shared(self, TargetConfig))

    @property
    def spread(self) -> SpreadConfig:
        """The settings that concern the writing."""
        return SpreadConfig(**_shared(self, SpreadConfig))


def memit(
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    moments: Mapping[int, SecondMoment | Tensor],
    prefixes: Sequence[str] | None = None,
    config: MemitConfig | None = None,
    targets: Targets | None = None,
) -> Edit:
    """Make one edit that writes all `requests` into `layers`. The model is left as it was, bit for bit.

    Args:
        model: to be edited (apply the result with `edited` or `apply_`).
        requests: what it should say; they must not conflict (Eq. 5).
        layers: the critical range, 0-based, ascending.
        moments: for each layer E[k kᵀ] over running text, [d_mlp, d_mlp].
        prefixes: templates with one {} for the whole prompt; the default is the bare prompt and five short
            texts that the model makes up (`make_prefixes`).
        config: settings; the default is what ships with the checkpoint (`configured`), else `MemitConfig()`.
        targets: z already found for these requests at the last of `layers`, with the settings
            `config.targets` and with `prefixes` where they are given; ranges that end alike share them.

    Raises:
        InputError: conflicting requests; layers not ascending or not in the model; moments that are absent,
            of another model, or singular; weights that are not finite; targets of other requests, layer,
            settings, prefixes or weights.
    """
    config = config or configured(MemitConfig, "memit", model)
    # All that can be refused is refused before the long search.
    settings, writing = config.targets, config.spread
    check_requests(requests)
    layers = check_layers(layers, model)
    moment_matrices(moments, layers, model)
    for name, parameter in model.hf.named_parameters():
        check_finite(parameter, f"the weights {name}")
    if targets is None:
        targets = find_targets(model, requests, layers[-1], prefixes, settings)
    else:
        check_shared(targets, requests, prefixes, settings)
    edit = spread(model, requests, targets, layers, moments, config=writing)
    return Edit(
        factors=edit.factors,
        manifest={
            "method": "memit",
            **edit.manifest,
            "settings": dataclasses.asdict(config),
            "unconverged": list(targets.unconverged),
        },
    )


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


def _shared(config: MemitConfig, kind: type) -> dict[str, Any]:
    """The fields that `config` has in common with another settings class."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in dataclasses.asdict(config).items() if name in names}
