"""AlphaEdit (Fang et al., 2025): as MEMIT, but within the null space of the old keys.

ΔW = R Kᵀ P (K Kᵀ P + Kₚ Kₚᵀ P + L2·I)⁻¹, where P projects onto the directions that old keys hardly use and Kₚ are the
keys of earlier edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mechedit.data import EditRequest
from mechedit.edit import Edit
from mechedit.errors import check_fraction, check_positive
from mechedit.methods.rules import InNullSpace, Moments, Previous
from mechedit.methods.settings import SearchConfig, configured
from mechedit.methods.spread import Strategy
from mechedit.methods.steps import check_input, write
from mechedit.models import Model
from mechedit.targets import Targets


@dataclass(frozen=True, kw_only=True)
class AlphaEditConfig(SearchConfig):
    """Settings of AlphaEdit; the defaults are those of the published code for GPT-J, save for the threshold."""

    null_threshold: float | int = 0.02
    """Directions belong to the null space up to this share of the largest eigenvalue of E[k kᵀ]. (The published 0.02
    is absolute, and so depends on the scale of the keys.)"""
    ridge: float | int = 10.0
    """L2: the weight of ‖ΔW‖², in units of squared keys."""
    strategy: Strategy = "uniform"
    """How the residual is shared out over the layers; see `SpreadConfig`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("ridge", self.ridge)
        check_fraction("null_threshold", self.null_threshold, "choose a fraction of the largest eigenvalue")


def alphaedit(
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    moments: Moments,
    prefixes: Sequence[str] | None = None,
    config: AlphaEditConfig | None = None,
    targets: Targets | None = None,
    previous: Previous | None = None,
) -> Edit:
    """Make one edit that leaves old keys' directions alone; arguments and errors are those of `memit`.

    It is made to be repeated: pass the keys of earlier edits as `previous`.
    """
    config = config or configured(AlphaEditConfig, "alphaedit", model)
    layers = check_input(model, requests, layers, moments, previous, config)
    rule = InNullSpace(moments=moments, threshold=config.null_threshold, weight=config.ridge, previous=previous or {})
    return write("alphaedit", model, requests, layers, rule, prefixes, config, targets)
