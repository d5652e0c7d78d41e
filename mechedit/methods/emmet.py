"""EMMET (Gupta et al., 2024, "A Unified Framework for Model Editing"): ROME's equality, for many facts at once.

As MEMIT, except that the new keys are given their values exactly, ΔW = R (Kᵀ M⁻¹ K + α I)⁻¹ Kᵀ M⁻¹ with M = E[k kᵀ],
or as nearly as a slack α > 0 allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mechedit.data import EditRequest
from mechedit.edit import Edit
from mechedit.errors import check_at_least
from mechedit.methods.rules import Equality, Moments, Previous
from mechedit.methods.settings import SearchConfig, configured
from mechedit.methods.spread import Strategy
from mechedit.methods.steps import check_input, write
from mechedit.models import Model
from mechedit.targets import Targets


@dataclass(frozen=True, kw_only=True)
class EmmetConfig(SearchConfig):
    """Settings of EMMET; the defaults are those of the published code for GPT-J."""

    slack: float | int = 0.1
    """α; 0 asks for equality. Facts about one subject have keys so alike that equality may need a huge ΔW."""
    strategy: Strategy = "uniform"
    """How the residual is shared out over the layers; the published settings name one layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("slack", self.slack, 0, "choose 0 (equality) or more")


def emmet(
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    moments: Moments,
    prefixes: Sequence[str] | None = None,
    config: EmmetConfig | None = None,
    targets: Targets | None = None,
    previous: Previous | None = None,
) -> Edit:
    """Make one edit that gives all `requests` their values; arguments and errors are those of `memit`."""
    config = config or configured(EmmetConfig, "emmet", model)
    layers = check_input(model, requests, layers, moments, previous, config)
    rule = Equality(moments=moments, slack=config.slack, previous=previous or {})
    return write("emmet", model, requests, layers, rule, prefixes, config, targets)
