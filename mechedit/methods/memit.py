"""MEMIT (Meng et al., 2023): many facts in one batch, written into a range of MLP layers.

Requests, layers and second moments go in, an `Edit` comes out: z is searched for at the last layer (Eq. 16)
and spread over the range (Algorithm 1), each share by least squares over old and new keys (Eq. 14).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
class MemitConfig(SearchConfig):
    """Settings of MEMIT; the defaults are those of the published code for GPT-J."""

    covariance_weight: float | int = 15_000.0
    """λ: how much the old keys count, in units of one new fact."""
    strategy: Strategy = "uniform"
    """How the residual is shared out over the layers; see `SpreadConfig`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("covariance_weight", self.covariance_weight)


def memit(
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    moments: Moments,
    prefixes: Sequence[str] | None = None,
    config: MemitConfig | None = None,
    targets: Targets | None = None,
    previous: Previous | None = None,
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
        targets: z already found for these requests at the layer `config.target_layer(layers)`, with the settings
            `config.targets` and with `prefixes` where they are given; ranges that end alike share them.
        previous: for each layer the keys of earlier edits of this model, [d_mlp, earlier], which are preserved
            besides (`edit_keys`).

    Raises:
        InputError: conflicting requests; layers not ascending or not in the model; moments that are absent,
            of another model, or singular; weights that are not finite; targets of other requests, layer,
            settings, prefixes or weights.
    """
    config = config or configured(MemitConfig, "memit", model)
    layers = check_input(model, requests, layers, moments, previous, config)
    rule = Ridge(moments=moments, weight=config.covariance_weight, previous=previous or {})
    return write("memit", model, requests, layers, rule, prefixes, config, targets)
