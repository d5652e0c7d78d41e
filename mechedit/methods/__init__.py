"""Editing methods: each composes targets, keys and an update rule into one function that returns an `Edit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mechedit.edit import Edit
from mechedit.methods.alphaedit import AlphaEditConfig, alphaedit
from mechedit.methods.emmet import EmmetConfig, emmet
from mechedit.methods.finetune import FineTuneBallConfig, FineTuneConfig, FineTuneDecayConfig, ft, ft_l, ft_w
from mechedit.methods.memit import MemitConfig, memit
from mechedit.methods.pmet import PmetConfig, pmet
from mechedit.methods.rome import RomeConfig, rome
from mechedit.methods.settings import MethodConfig, SearchConfig, configured
from mechedit.methods.steps import check_input
from mechedit.models import Model

__all__ = [
    "METHODS",
    "AlphaEditConfig",
    "EmmetConfig",
    "FineTuneBallConfig",
    "FineTuneConfig",
    "FineTuneDecayConfig",
    "MemitConfig",
    "MethodConfig",
    "PmetConfig",
    "RomeConfig",
    "SearchConfig",
    "alphaedit",
    "check_input",
    "emmet",
    "ft",
    "ft_l",
    "ft_w",
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
    "ft": ft,
    "ft_l": ft_l,
    "ft_w": ft_w,
}
"""Each is called as method(model, requests, layers, moments, prefixes=..., config=..., targets=..., previous=...); see
`memit` for the arguments. A `SearchConfig` says how a method searches for the targets (`targets`), and where
(`target_layer`); fine-tuning (`ft`, `ft_l`, `ft_w`) searches for none, and preserves no keys."""

_CONFIGS: Mapping[str, type[MethodConfig]] = {
    "memit": MemitConfig,
    "rome": RomeConfig,
    "emmet": EmmetConfig,
    "alphaedit": AlphaEditConfig,
    "pmet": PmetConfig,
    "ft": FineTuneConfig,
    "ft_l": FineTuneBallConfig,
    "ft_w": FineTuneDecayConfig,
}


def recommended(method: str, model: Model) -> MethodConfig:
    """The settings that a named method uses for this model when it is given none (see `configured`)."""
    return configured(_CONFIGS[method], method, model)
