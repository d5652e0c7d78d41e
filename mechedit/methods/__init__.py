"""Editing methods: each composes targets, keys and an update rule into one function that returns an `Edit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mechedit.edit import Edit
from mechedit.methods.alphaedit import AlphaEditConfig, alphaedit
from mechedit.methods.emmet import EmmetConfig, emmet
from mechedit.methods.memit import MemitConfig, memit
from mechedit.methods.pmet import PmetConfig, pmet
from mechedit.methods.rome import RomeConfig, rome
from mechedit.methods.settings import MethodConfig, configured
from mechedit.methods.steps import check_input
from mechedit.models import Model

__all__ = [
    "METHODS",
    "AlphaEditConfig",
    "EmmetConfig",
    "MemitConfig",
    "MethodConfig",
    "PmetConfig",
    "RomeConfig",
    "alphaedit",
    "check_input",
    "emmet",
    "memit",
    "pmet",
    "recommended",
    "rome",
]

METHODS: Mapping[str, Callable[..., Edit]] = {
    "memit": memit,
    "rome": rome,
    "emmet": emmet,
    "alphaedit": alphaedit,
    "pmet": pmet,
}
"""Each is called as method(model, requests, layers, moments, prefixes=..., config=..., targets=..., previous=...); see
`memit` for the arguments. `config.targets` is how it searches for the targets, at `config.target_layer(layers)`."""

_CONFIGS: Mapping[str, type[MethodConfig]] = {
    "memit": MemitConfig,
    "rome": RomeConfig,
    "emmet": EmmetConfig,
    "alphaedit": AlphaEditConfig,
    "pmet": PmetConfig,
}


def recommended(method: str, model: Model) -> MethodConfig:
    """The settings that a named method uses for this model when it is given none (see `configured`)."""
    return configured(_CONFIGS[method], method, model)
