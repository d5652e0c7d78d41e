"""Editing methods: each composes targets, keys and an update rule into one call that returns an `Edit`.

`METHODS` holds them by name. How to add one is said in `mechedit.methods.method`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mechedit.arguments import checked
from mechedit.methods.alphaedit import AlphaEditConfig, alphaedit
from mechedit.methods.checks import by_layer, check_layers, moment_matrices
from mechedit.methods.emmet import EmmetConfig, emmet
from mechedit.methods.finetune import FineTuneBallConfig, FineTuneConfig, FineTuneDecayConfig, ft, ft_l, ft_w
from mechedit.methods.keys import KeyExtractor, prefix_mean
from mechedit.methods.kn import KnConfig, kn
from mechedit.methods.memit import MemitConfig, memit
from mechedit.methods.mend import MendConfig, mend
from mechedit.methods.mend_editor import MEND_FILE, MendEditor
from mechedit.methods.mend_training import MendTrainingConfig, train_mend
from mechedit.methods.method import EditTask, Method, edit_method, spread_over_layers, targets_for
from mechedit.methods.pmet import PmetConfig, pmet
from mechedit.methods.recommendation import (
    SETTINGS_FROM,
    Recommendation,
    SettingsSource,
    published_for,
    with_published_layers,
    with_sources,
)
from mechedit.methods.rome import RomeConfig, rome
from mechedit.methods.rules import Ridge
from mechedit.methods.settings import MethodConfig, RidgeConfig, SearchConfig, SpreadConfig, SpreadMethodConfig
from mechedit.methods.spread import SpreadResult, UpdateRule, edit_keys
from mechedit.methods.tuned_settings import TUNED_FILE, TunedSettings, tuned_folder, tuned_folder_of, write_tuned
from mechedit.models import Model

__all__ = [
    "MEND_FILE",
    "METHODS",
    "SETTINGS_FROM",
    "TUNED_FILE",
    "AlphaEditConfig",
    "EditTask",
    "EmmetConfig",
    "FineTuneBallConfig",
    "FineTuneConfig",
    "FineTuneDecayConfig",
    "KeyExtractor",
    "KnConfig",
    "MemitConfig",
    "MendConfig",
    "MendEditor",
    "MendTrainingConfig",
    "Method",
    "MethodConfig",
    "PmetConfig",
    "Recommendation",
    "Ridge",
    "RidgeConfig",
    "RomeConfig",
    "SearchConfig",
    "SettingsSource",
    "SpreadConfig",
    "SpreadMethodConfig",
    "SpreadResult",
    "TunedSettings",
    "UpdateRule",
    "alphaedit",
    "by_layer",
    "check_layers",
    "edit_keys",
    "edit_method",
    "emmet",
    "ft",
    "ft_l",
    "ft_w",
    "kn",
    "memit",
    "mend",
    "moment_matrices",
    "pmet",
    "prefix_mean",
    "published_for",
    "recommended",
    "rome",
    "spread_over_layers",
    "targets_for",
    "train_mend",
    "tuned_folder",
    "tuned_folder_of",
    "with_published_layers",
    "with_sources",
    "write_tuned",
]

METHODS: Mapping[str, Method[Any]] = {
    method.name: method for method in (memit, rome, emmet, alphaedit, pmet, ft, ft_l, ft_w, kn, mend)
}
"""The editing methods by name, as the command line, sweeps, sessions and analyses know them."""


@checked
def recommended(method: str, model: Model) -> MethodConfig:
    """The settings that a method, given by name, uses for this model when it is passed none.

    Raises:
        InputError: the checkpoint's `editing.json` or its tuned settings name a setting that the method lacks.
    """
    return METHODS[method].recommended(model)
