"""`Tuned`: what a search for settings chose, with all that it tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechedit.methods import MethodConfig, TunedSettings, write_tuned
from mechedit.models import Model


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Layers and settings of a method that were chosen for a model by editing."""

    method: str
    """Name of the method."""
    layers: tuple[int, ...]
    """The layers to edit, 0-based, ascending."""
    config: MethodConfig
    """All settings."""
    record: Mapping[str, Any]
    """What `tuned.json` holds of the method: layers, settings that were chosen, seed, budget, plan, requests, the
    unedited model's scores, trials, warnings, and what all of it took."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should know before the settings are used."""
        return tuple(self.record["warnings"])

    @property
    def trials(self) -> pd.DataFrame:
        """Everything that was tried, a row per window and choice of settings, in percent."""
        frame = pd.DataFrame(self.record["trials"])
        return frame.assign(settings=[dict(settings) for settings in frame["settings"]])

    def save(self, path: str | Path, model: Model) -> TunedSettings:
        """Write the settings into a `tuned.json`, atomically.

        Args:
            path: the file; settings of this model's other methods that it holds stay there.
            model: the one that was tuned, unedited.
        """
        return write_tuned(path, model, self.method, self.record)
