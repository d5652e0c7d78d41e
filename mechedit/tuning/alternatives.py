"""The values that are tried in place of a method's settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from mechedit.methods import MethodConfig

Changes = Mapping[str, Any]
"""Settings by name, in place of those of a config."""
WEIGHT = "relative_covariance_weight"
"""The setting that costs no search for z: λ."""
SEARCHED = ("relative_lr", "clamp", "kl_weight", "generated_prefixes")
"""Settings of the search for z, in the order in which they are tried."""
ABSOLUTE = {"relative_lr": "lr", WEIGHT: "covariance_weight"}
"""Names of the same settings in absolute units."""
VALUES: Mapping[str, tuple[float | int, ...]] = {
    WEIGHT: (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "relative_lr": (0.05, 0.1, 0.2, 0.4),
    "clamp": (0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
    "kl_weight": (0.015625, 0.0625, 0.25, 1.0),
    "generated_prefixes": (0, 5, 10),
}
"""Values that are tried."""
FACTORS = {WEIGHT: (0.01, 0.1, 10.0), "relative_lr": (0.5, 2.0)}
"""Under the published convention, which has absolute units: what the settings are multiplied by."""
SCREENING_WEIGHT = 0.03
"""λ with which windows are compared besides that of the config: a λ that writes little shows no window at its best."""


def settable(config: MethodConfig, name: str) -> bool:
    """Whether a method has a setting."""
    return name in {field.name for field in fields(config)}


def unit_of(config: MethodConfig, name: str) -> str:
    """The name of a setting in the unit that the config uses."""
    absolute = ABSOLUTE.get(name)
    return absolute if absolute and getattr(config, absolute) is not None else name


def changed(config: Any, changes: Changes) -> Any:
    """The config with other settings; one in relative units switches the absolute one off."""
    absolutes = {ABSOLUTE[name]: None for name in changes if name in ABSOLUTE}
    return replace(config, **{**absolutes, **changes})


def screening_weights(config: Any) -> list[Changes]:
    """The λ with which windows are compared: that of the config, and a small one."""
    if not settable(config, WEIGHT):
        return [{}]
    if config.in_published_units:
        return [{}, {ABSOLUTE[WEIGHT]: config.covariance_weight * FACTORS[WEIGHT][0]}]
    current = config.covariance_weight is None and config.relative_covariance_weight == SCREENING_WEIGHT
    return [{}] if current else [{}, {WEIGHT: SCREENING_WEIGHT}]


def weights(config: Any) -> list[Changes]:
    """All λ that are tried, ascending in either unit; that of the config is not among them."""
    if not settable(config, WEIGHT):
        return []
    return _tried(config, WEIGHT)


def wider_weight(config: Any, changes: Changes, *, larger: bool) -> Changes:
    """A λ three times beyond one that lies at the end of those tried."""
    name = next(iter(changes))
    return {name: float(f"{changes[name] * (3 if larger else 1 / 3):.2g}")}


def alternatives(config: Any, name: str) -> list[Changes]:
    """Two other values of a setting of the search: the next below and above, or the nearest two."""
    changes, current = _tried(config, name), getattr(config, unit_of(config, name))
    if unit_of(config, name) != name and not config.in_published_units:
        # In the unit of the config no grid is known: its default in relative units, and the next value below.
        return [change for change in changes if change[name] in VALUES[name][1:3]]

    def distance(change: Changes) -> float:
        (value,) = change.values()
        return abs(math.log((value + 1e-3) / (current + 1e-3)))

    below = [change for change in changes if next(iter(change.values())) < current]
    above = [change for change in changes if next(iter(change.values())) > current]
    nearest = [min(side, key=distance) for side in (below, above) if side]
    rest = sorted((change for change in changes if change not in nearest), key=distance)
    return [*nearest, *rest][:2]


def _tried(config: Any, name: str) -> list[Changes]:
    unit = unit_of(config, name)
    current = getattr(config, unit)
    if config.in_published_units and name in FACTORS:
        return [{unit: current * factor} for factor in FACTORS[name]]
    return [{name: value} for value in VALUES[name] if unit != name or value != current]
