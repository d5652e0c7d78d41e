"""Settings that all methods have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from mechedit.bounds import check_numbers
from mechedit.errors import check_choice, check_positive
from mechedit.methods.rules import EarlierKeys, Moments, Ridge
from mechedit.models import Model
from mechedit.prefixes import make_prefixes
from mechedit.prompt_tokens import check_token
from mechedit.targets import CONVENTIONS, Convention, TargetConfig, TargetSettings, check_one_unit

Strategy = Literal["uniform", "sqrt", "forward-replay", "last", "boundary"]
STRATEGIES = get_args(Strategy)


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Settings of any method."""

    seed: int = 0
    """Seed of everything that is drawn."""
    batch_size: int = 64
    """Facts searched together, and prompts per forward pass."""

    shares_targets: ClassVar[bool] = False
    """Whether z is searched for on the unedited model, so that ranges with the same last layer can share it."""
    milder: ClassVar[str] = "choose fewer steps or a smaller lr"
    """What makes an update smaller, where the method preserves no old keys."""
    preserves_keys: ClassVar[bool] = True
    """Whether the method preserves old keys: it then needs their second moments, and takes those of earlier edits."""

    @property
    def record(self) -> dict[str, Any]:
        """The settings as an edit's manifest holds them."""
        return dataclasses.asdict(self)

    def suited(self, model: Model) -> tuple[MethodConfig, tuple[int, ...] | None]:
        """The settings with what only the model's files can tell, and the layers that these files are for, if any."""
        return self, None

    def require_files(self, model: Model) -> None:
        """Refuse a model for which the method lacks a file that it cannot do without."""

    def edited_layers(self, layers: Sequence[int]) -> list[int]:
        """The layers of a range that are written to."""
        return list(layers)

    def default_prefixes(self, model: Model) -> tuple[str, ...]:
        """The contexts in which the method sees each prompt when none are given."""
        return make_prefixes(model, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class SearchConfig(MethodConfig, TargetSettings):
    """Settings of a method that searches for z: those of the search are `TargetSettings`."""

    shares_targets: ClassVar[bool] = True
    search: ClassVar[dict[str, Any]] = {}
    """Settings of the search by which the method is defined, and which its user does not choose."""

    @property
    def targets(self) -> TargetConfig:
        """The settings of the search for z."""
        chosen = {field.name: getattr(self, field.name) for field in dataclasses.fields(TargetSettings)}
        if self.lr is not None:
            del chosen["relative_lr"]
        return TargetConfig(**chosen, **self.search)

    def target_layer(self, layers: Sequence[int]) -> int:
        """The layer of a range at which the method searches for z."""
        return layers[-1]

    def default_prefixes(self, model: Model) -> tuple[str, ...]:
        """The bare prompt, and `generated_prefixes` texts that the model generates."""
        return make_prefixes(model, seed=self.seed, count=self.generated_prefixes)


@dataclass(frozen=True, kw_only=True)
class DampedConfig(SearchConfig):
    """Settings of a method that solves with M = E[k kᵀ], which may be singular."""

    damping: float | int = 0.0
    """δ: M + δ · (tr M / d_mlp) · I stands in place of M = E[k kᵀ], δ in units of M's mean eigenvalue; 0, the default,
    leaves M as it is. Helps where M is singular, which no weight does; 1e-4 is a first choice."""


@dataclass(frozen=True, kw_only=True)
class SpreadConfig:
    """How the residual z − h is spread over the layers.

    - `uniform` (MEMIT Eq. 20): layer l is given 1/(L − l + 1) of the residual at the last layer L.
    - `sqrt` (PMET; Li et al., 2024): 1/√(L − l + 1) of it.
    - `forward-replay` (MEMIT-FE; Liu et al., 2026): z is searched for at the *first* layer; a run with z written there
      gives each later layer a target state of its own, and each layer is given the whole residual at its own.
    - `last`: only the last layer is edited, and given all of it.
    - `boundary` (BLUE): the first and the last layer are edited; the first is given half, the last what is left.

    `convention="memit-2022"` follows the published code of MEMIT where the paper says otherwise: a key is the
    mean of the first prefix's key and the mean over the other prefixes (default: plain mean, Eq. 19), and
    shares count the listed layers still to come (default: the distance L − l + 1, Eq. 20; the two differ
    only when the list has gaps). `convention="paper"` takes keys of prefix and subject alone, without the words of the
    prompt before the subject (Eq. 19).
    """

    strategy: Strategy = "uniform"
    """How the residual is spread: `uniform`, `sqrt`, `forward-replay`, `last` or `boundary`."""
    convention: Convention = "default"
    """`memit-2022` follows the published code of MEMIT to the letter, `paper` its text."""
    token: str = "subject_last"
    """The token of keys and states, that of the search for z."""
    batch_size: int = 64
    """Prompts per forward pass."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("convention", self.convention, CONVENTIONS)
        check_token(self.token)
        check_positive("batch_size", self.batch_size)

    def edited_layers(self, layers: Sequence[int]) -> list[int]:
        """The layers of a range that are written to."""
        if self.strategy == "boundary":
            return sorted({layers[0], layers[-1]})
        return list(layers[-1:] if self.strategy == "last" else layers)

    def target_layer(self, layers: Sequence[int]) -> int:
        """The layer of a range at which z is searched for."""
        return layers[0] if self.strategy == "forward-replay" else layers[-1]


@dataclass(frozen=True, kw_only=True)
class SpreadMethodConfig(SearchConfig):
    """Settings of a method that searches for z and spreads the residual over its layers."""

    strategy: Strategy = "uniform"
    """How the residual is spread over the layers: `uniform`, `sqrt`, `forward-replay`, `last` or `boundary`; see
    `SpreadConfig`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.spread  # refuses a bad setting at once

    @property
    def spread(self) -> SpreadConfig:
        """The settings of the spreading."""
        return SpreadConfig(
            strategy=self.strategy, convention=self.convention, token=self.token, batch_size=self.batch_size
        )

    def edited_layers(self, layers: Sequence[int]) -> list[int]:
        """The layers of a range that are written to."""
        return self.spread.edited_layers(layers)

    def target_layer(self, layers: Sequence[int]) -> int:
        """The layer of a range at which the method searches for z."""
        return self.spread.target_layer(layers)


@dataclass(frozen=True, kw_only=True)
class RidgeConfig(DampedConfig, SpreadMethodConfig):
    """Settings of a method that solves MEMIT's Eq. 14, ΔW = R Kᵀ (λ E[k kᵀ] + K Kᵀ)⁻¹.

    By default λ is `relative_covariance_weight` times the batch's median kᵀM⁻¹k at each layer, with M = E[k kᵀ]. A fact
    whose key is orthogonal in M⁻¹ to the others is written to kᵀM⁻¹k / (λ + kᵀM⁻¹k), which is then about
    1 / (1 + `relative_covariance_weight`) for any model, layer, scale of the keys and number of facts.
    """

    relative_covariance_weight: float | int = 0.1
    """λ, how much the old keys count, in units of the batch's median kᵀM⁻¹k; not used where `covariance_weight` is
    set."""
    covariance_weight: float | int | None = None
    """λ in units of one new fact, in place of `relative_covariance_weight`; None for the latter. `memit-2022`
    and `paper` set the published one."""

    published_covariance_weight: ClassVar[float] = 15_000.0
    """`covariance_weight` of the published code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_published_units and self.covariance_weight is None:
            object.__setattr__(self, "covariance_weight", self.published_covariance_weight)
        check_positive("relative_covariance_weight", self.relative_covariance_weight)
        check_positive("covariance_weight", self.covariance_weight, optional=True)
        check_one_unit(self, absolute="covariance_weight", relative="relative_covariance_weight")

    def rule(self, moments: Moments, previous: EarlierKeys) -> Ridge:
        """The update rule with this λ.

        Args:
            moments: E[k kᵀ] by layer.
            previous: keys of earlier edits by layer.
        """
        relative = self.covariance_weight is None
        weight = self.relative_covariance_weight if self.covariance_weight is None else self.covariance_weight
        return Ridge(moments=moments, weight=weight, relative=relative, damping=self.damping, previous=previous)
