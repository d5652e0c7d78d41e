"""How z is searched for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mechedit.data import check_template
from mechedit.errors import InputError, check_at_least, check_choice, check_positive
from mechedit.models import Module, Part, out_part

Convention = Literal["default", "memit-2022"]
Written = Literal["resid", "mlp_out"]


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """How z is searched for.

    `convention="memit-2022"` follows the published code of MEMIT: it makes steps − 1 updates, stops a fact
    when its whole loss falls below `threshold`, decays with weight_decay·‖δ‖/‖h‖², takes the KL term at the
    subject's last token, and searches facts about one subject apart. The default makes `steps` updates, stops when
    the likelihood term alone falls below `threshold`, decays with weight_decay·(‖δ‖/‖h‖)², and takes the KL term
    at the end of its prompt.
    """

    steps: int = 25
    lr: float | int = 0.5
    """Adam's step, in units of the residual stream."""
    clamp: float | int = 0.75
    """Largest ‖δ‖ in units of ‖h‖."""
    weight_decay: float | int = 0.5
    kl_weight: float | int = 0.0625
    kl_prompt: str = "{} is a"
    """Where the subject's other meaning is to be kept."""
    threshold: float | int = 0.05
    """Nats below which a fact has converged."""
    part: Written = "resid"
    """What z is a state of: the residual stream after the block, or what its MLP adds (ROME, PMET). On a model that
    writes into attention, `mlp_out` stands for what attention adds."""
    attention: bool = False
    """Move what the block's attention adds as well, and throw that away (PMET, §4.1); with part "mlp_out"."""
    joint: bool = True
    """Facts about one subject share one δ: their keys are equal, and one key holds one value (MEMIT-Merge, 2025)."""
    convention: Convention = "default"
    seed: int = 0
    """For prefixes that are generated."""
    batch_size: int = 64
    """Facts searched together (each takes a row a prefix and one for the KL term)."""
    pass_tokens: int = 4096
    """Tokens in one forward pass, padding included; halved while the device's memory does not hold them."""

    def __post_init__(self) -> None:
        check_choice("convention", self.convention, ("default", "memit-2022"))
        check_choice("part", self.part, ("resid", "mlp_out"))
        check_template(self.kl_prompt, "kl_prompt")
        for name in ("steps", "batch_size", "pass_tokens", "lr", "clamp"):
            check_positive(name, getattr(self, name))
        for name in ("weight_decay", "kl_weight"):
            check_at_least(name, getattr(self, name), 0)
        if self.attention and self.part != "mlp_out":
            raise InputError('attention is on with part "resid"; expected part "mlp_out", whose own change it leaves')

    @property
    def updates(self) -> int:
        """How often δ may move."""
        return self.steps - 1 if self.convention == "memit-2022" else self.steps

    @property
    def shares(self) -> bool:
        """Whether facts about one subject share one δ."""
        return self.joint and self.convention == "default"

    def parts(self, module: Module) -> tuple[Part, ...]:
        """Where a δ is added, in forward order; z is a state of the last: what `module` adds, or the residual.

        Raises:
            InputError: attention is to be moved besides what is written, but is what is written.
        """
        if self.attention and module == "attn":
            raise InputError(
                "the model writes into attention, but the search (PMET's) moves attention only to leave it as it is; "
                "expected a model that writes into its MLPs: use model.writing('mlp'), or another method"
            )
        written = "resid" if self.part == "resid" else out_part(module)
        return ("attn_out", written) if self.attention else (written,)
