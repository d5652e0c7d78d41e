"""What the settings of all methods have in common, and those that ship with a checkpoint.

`editing.json` beside a checkpoint's weights holds a section for each method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mechedit.errors import InputError
from mechedit.files import read_json
from mechedit.methods.spread import SpreadConfig
from mechedit.models import Model
from mechedit.prompts import make_prefixes
from mechedit.targets import Convention, TargetConfig


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Settings of any method."""

    seed: int = 0
    """For all that is drawn."""
    batch_size: int = 64
    """Facts searched together, and prompts in one forward pass."""

    shares_targets: ClassVar[bool] = False
    """Whether z is searched for on the unedited model, so that edits whose range ends alike can share it."""
    preserves_keys: ClassVar[bool] = True
    """Whether the method preserves old keys: it then needs their second moments, and takes those of earlier edits."""

    def edited_layers(self, layers: Sequence[int]) -> list[int]:
        """Those of a range that are written to."""
        return list(layers)

    def default_prefixes(self, model: Model) -> tuple[str, ...]:
        """The contexts in which the method sees each prompt when none are given."""
        return make_prefixes(model, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class SearchConfig(MethodConfig):
    """Settings of a method that searches for z; see `TargetConfig` and `SpreadConfig` for their meaning."""

    steps: int = 25
    lr: float | int = 0.5
    clamp: float | int = 0.75
    weight_decay: float | int = 0.5
    kl_weight: float | int = 0.0625
    kl_prompt: str = "{} is a"
    threshold: float | int = 0.05
    joint: bool = True
    convention: Convention = "default"

    shares_targets: ClassVar[bool] = True
    search: ClassVar[dict[str, Any]] = {}
    """Settings of the search for z that the method is defined by."""

    def __post_init__(self) -> None:
        # Both check what they are given, so that a bad setting is refused at once.
        _ = self.targets, self.spread

    @property
    def targets(self) -> TargetConfig:
        """The settings that concern the search for z."""
        return TargetConfig(**_shared(self, TargetConfig), **self.search)

    @property
    def spread(self) -> SpreadConfig:
        """The settings that concern the writing."""
        return SpreadConfig(**_shared(self, SpreadConfig))

    def edited_layers(self, layers: Sequence[int]) -> list[int]:
        """Those of a range that are written to."""
        return self.spread.edited_layers(layers)

    def target_layer(self, layers: Sequence[int]) -> int:
        """Where in a range the method searches for z."""
        return self.spread.target_layer(layers)


Config = TypeVar("Config", bound=MethodConfig)


def configured(kind: type[Config], method: str, model: Model) -> Config:
    """The method's settings as the model's checkpoint recommends them; without a recommendation, the defaults.

    Raises:
        InputError: the file names a setting that the method lacks.
    """
    file = Path(model.checkpoint) / "editing.json"
    settings = read_json(file).get(method, {}) if file.is_file() else {}
    try:
        return kind(**settings)
    except TypeError as error:
        raise InputError(f"{str(file)!r} does not fit the method {method!r}: {error}; mend the file") from error


def _shared(config: SearchConfig, kind: type) -> dict[str, Any]:
    """The fields that `config` has in common with another settings class."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in dataclasses.asdict(config).items() if name in names}
