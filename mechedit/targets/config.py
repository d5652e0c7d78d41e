"""Settings of the search for z (MEMIT Eq. 16)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from mechedit.bounds import check_numbers
from mechedit.data import check_template
from mechedit.errors import InputError, brief, check_at_least, check_choice, check_positive
from mechedit.models import Module, Part, out_part
from mechedit.prompt_tokens import check_token

Convention = Literal["default", "memit-2022", "paper"]
CONVENTIONS = get_args(Convention)
TargetPart = Literal["resid", "mlp_out"]


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """Settings of the search for z that every method leaves to its user; `TargetConfig` has the rest.

    `convention="memit-2022"` follows the published code of MEMIT: it makes steps − 1 updates, stops a fact
    when its whole loss falls below `threshold`, decays with weight_decay·‖δ‖/‖h‖², takes the KL term at the
    subject's last token, and gives every fact a δ of its own. The default makes `steps` updates, stops when
    the likelihood term alone falls below `threshold`, decays with weight_decay·(‖δ‖/‖h‖)², and takes the KL term
    at the end of its prompt. `convention="paper"` is Eq. 16 alone: the likelihood term is −log P of the whole object, a
    sum over its tokens where the other two take the mean, and there is neither a KL term nor decay, of which MEMIT's
    text says nothing; every fact has a δ of its own. With either of them Adam's learning rate is the published one,
    `lr`, where none is set.

    By default Adam's learning rate is `relative_lr` times the typical |hᵢ| (`Objective.unit`): a step moves every
    coordinate by about that part of it, whatever the scale of the residual stream, which differs a thousandfold between
    models and grows with depth.
    """

    steps: int = 25
    """Most steps of the search for z."""
    relative_lr: float | int = 0.2
    """Adam's learning rate in units of the typical |hᵢ|, the median over coordinates over 0.6745 (‖h‖/√d_model where h
    is normal), which a few massive coordinates do not change; not used where `lr` is set."""
    lr: float | int | None = None
    """Adam's learning rate in units of the activation, in place of `relative_lr`; None for the latter. `memit-2022`
    and `paper` set the published one."""
    clamp: float | int = 0.75
    """Largest ‖δ‖, in units of ‖h‖."""
    weight_decay: float | int = 0.5
    """Weight of the term that pulls δ to 0."""
    kl_weight: float | int = 0.0625
    """Weight of the KL term, which keeps the subject's other meaning."""
    kl_prompt: str = "{} is a"
    """Prompt of the KL term, with one {} for the subject."""
    threshold: float | int = 0.05
    """Nats of the likelihood term below which the search for a fact ends."""
    margin: float | int | None = None
    """Nats by which every token of the object must be likelier than any other token, behind all prefixes, for the
    search to stop as well; None to go on until `threshold`."""
    joint: bool = True
    """Whether facts about one subject share one δ: their keys are equal, and one key holds one value (MEMIT-Merge,
    2025)."""
    convention: Convention = "default"
    """`memit-2022` follows the published code of MEMIT to the letter, `paper` its text; `default` departs from both
    where it must."""
    token: str = "subject_last"
    """The token at which z is searched for and keys are taken: `subject_last`, `subject_first`, `after` (the first
    after the subject), `last` (of the prompt), or a negative number that counts from the prompt's end (ROME Fig. 5)."""
    generated_prefixes: int = 5
    """Short texts that the model generates, behind each of which a prompt is seen, besides the bare prompt."""
    seed: int = 0
    """Seed of generated prefixes."""
    batch_size: int = 64
    """Facts searched together (each takes one row per prefix and one for the KL term)."""

    published_lr: ClassVar[float] = 0.5
    """`lr` of the published code."""
    by_text: ClassVar[dict[str, Any]] = {"kl_weight": 0.0, "weight_decay": 0.0}
    """Settings that the convention `paper` fixes."""

    @property
    def in_published_units(self) -> bool:
        """Whether the convention is a published one, in whose units settings are then."""
        return self.convention != "default"

    def __post_init__(self) -> None:
        check_numbers(self, generated_prefixes=1000)
        check_choice("convention", self.convention, CONVENTIONS)
        check_token(self.token)
        check_template(self.kl_prompt, "kl_prompt")
        if self.convention == "paper":
            self._fix_by_text()
        if self.in_published_units and self.lr is None:
            object.__setattr__(self, "lr", self.published_lr)
        for name in ("steps", "batch_size", "relative_lr", "clamp"):
            check_positive(name, getattr(self, name))
        check_positive("lr", self.lr, optional=True)
        check_one_unit(self, absolute="lr", relative="relative_lr")
        for name in ("weight_decay", "kl_weight"):
            check_at_least(name, getattr(self, name), 0)
        if self.margin is not None:
            check_at_least("margin", self.margin, 0)

    def _fix_by_text(self) -> None:
        """Give the settings that the convention `paper` fixes their values.

        Raises:
            InputError: one was given another value.
        """
        for name, value in self.by_text.items():
            if getattr(self, name) not in (value, getattr(type(self), name)):
                raise InputError(
                    f"{name} is {getattr(self, name)!r}, expected {value!r} with the convention 'paper', whose text "
                    f"has that; leave it out, or take another convention"
                )
            object.__setattr__(self, name, value)


def check_one_unit(config: TargetSettings, *, absolute: str, relative: str) -> None:
    """Refuse a number that is given both in absolute and in relative units: only one of them would be used.

    Args:
        config: settings, in which the absolute one may be None.
        absolute: name of the setting that takes the other's place where it is set.
        relative: name of the other, which must then have its default.

    Raises:
        InputError: both are set.
    """
    value, relative_value = getattr(config, absolute), getattr(config, relative)
    if value is not None and relative_value != getattr(type(config), relative):
        raise InputError(
            f"{absolute} is {brief(value)} and {relative} is {brief(relative_value)}, expected one of the two; leave "
            f"{relative} "
            f"out, or set {absolute} to None (the conventions memit-2022 and paper set it)"
        )


@dataclass(frozen=True, kw_only=True)
class TargetConfig(TargetSettings):
    """Settings of the search for z (MEMIT Eq. 16); see also `TargetSettings`."""

    part: TargetPart = "resid"
    """What z is a state of: the residual stream after the block, or the MLP's output (ROME, PMET). On a model that
    writes into attention, `mlp_out` stands for attention's output."""
    attention: bool = False
    """Whether the block's attention output is moved as well, and that part discarded (PMET, §4.1); with part
    "mlp_out"."""
    pass_tokens: int = 4096
    """Tokens in the forward passes that run at once, padding included; halved while the device's memory does not hold
    them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("part", self.part, ("resid", "mlp_out"))
        check_positive("pass_tokens", self.pass_tokens)
        if self.attention and self.part != "mlp_out":
            raise InputError(
                'attention is on with part "resid", expected part "mlp_out"; set part or turn attention off'
            )

    @property
    def learning_rate(self) -> float:
        """Adam's learning rate: `lr` where it is set, else `relative_lr`, which is in units of the typical |hᵢ|."""
        return self.relative_lr if self.lr is None else self.lr

    @property
    def updates(self) -> int:
        """Most updates of δ."""
        return self.steps - 1 if self.convention == "memit-2022" else self.steps

    @property
    def joins_subjects(self) -> bool:
        """Whether facts about one subject share one δ: `joint`, except by the paper and its code.

        At tokens after the subject, keys differ with the prompt.
        """
        return self.joint and not self.in_published_units and self.token.startswith("subject")

    def parts(self, module: Module) -> tuple[Part, ...]:
        """The activations to which δ is added, in forward order; z is a state of the last one.

        Args:
            module: the edited module of the model, whose output stands for part "mlp_out".

        Raises:
            InputError: `attention` is on, but attention is itself the edited module.
        """
        if self.attention and module == "attn":
            raise InputError(
                "the model writes into attention, but PMET's search moves attention's output only to discard that "
                "change; expected a model that writes into its MLPs: use model.writing('mlp'), or another method"
            )
        written = "resid" if self.part == "resid" else out_part(module)
        return ("attn_out", written) if self.attention else (written,)
