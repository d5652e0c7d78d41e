"""PMET (Li et al., 2024, "Precise Model Editing in a Transformer"): as MEMIT, but what is written is the MLP's own.

z is the MLP's output and not the residual stream, so that ΔW need not also do what attention did to reach it: the
search moves attention's output as well, and throws that part away. Layers are given 1/√(L − l + 1) of what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mechedit.data import EditRequest
from mechedit.edit import Edit
from mechedit.errors import check_positive
from mechedit.methods.rules import Moments, Previous, Ridge
from mechedit.methods.settings import SearchConfig, configured
from mechedit.methods.spread import Strategy
from mechedit.methods.steps import check_input, write
from mechedit.models import Model
from mechedit.targets import Targets


@dataclass(frozen=True, kw_only=True)
class PmetConfig(SearchConfig):
    """Settings of PMET; the defaults are those of the published code for GPT-J."""

    steps: int = 30
    lr: float | int = 0.2
    kl_weight: float | int = 1.0
    covariance_weight: float | int = 6_000.0
    """λ: how much the old keys count, in units of one new fact."""
    strategy: Strategy = "sqrt"
    """How the residual is shared out over the layers; see `SpreadConfig`."""

    search: ClassVar[dict[str, Any]] = {"part": "mlp_out", "attention": True}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("covariance_weight", self.covariance_weight)


def pmet(
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    moments: Moments,
    prefixes: Sequence[str] | None = None,
    config: PmetConfig | None = None,
    targets: Targets | None = None,
    previous: Previous | None = None,
) -> Edit:
    """Make one edit that writes all `requests` into `layers`; arguments and errors are those of `memit`."""
    config = config or configured(PmetConfig, "pmet", model)
    layers = check_input(model, requests, layers, moments, previous, config)
    rule = Ridge(moments=moments, weight=config.covariance_weight, previous=previous or {})
    return write("pmet", model, requests, layers, rule, prefixes, config, targets)
