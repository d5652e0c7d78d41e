"""What to restore, what to sever, how to corrupt, and what to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from mechedit.errors import InputError, check_at_least, check_choice, check_positive
from mechedit.models import Part
from mechedit.trace.corruption import Corruption
from mechedit.trace.labels import ROLES
from mechedit.trace.metrics import Metric, find_metric, metric_name
from mechedit.trace.severing import Sever

Kind = Literal["state", "mlp", "attn"]
PART_OF_KIND: dict[str, Part] = {"state": "resid", "mlp": "mlp_out", "attn": "attn_out"}
"""The site that a kind restores, and that severing holds."""


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """What to restore, what to sever, how to corrupt, and what to measure."""

    kinds: Sequence[str] = ("state", "mlp", "attn")
    """`state` restores one residual state; `mlp` and `attn` a window of module outputs."""
    sever: Sequence[str | Sever] = ("nothing",)
    """What is cut, each traced in its own rows: `nothing`, `mlp`, `attn`, or a `Sever` (or its label, `mlp@3`)."""
    samples: int = 10
    """Noise draws a fact."""
    corruption: str | Corruption = field(default_factory=Corruption)
    """How the subject is corrupted: a `Corruption`, or the name of its distribution."""
    noise: float | int = 3.0
    """Noise in units of σ, the standard deviation of subject embeddings."""
    noise_std: float | int | None = None
    """Noise in absolute units; overrides `noise`."""
    metrics: Sequence[str | Metric] = ("probability",)
    """Names in `METRICS`, such a name after `normalized_`, or functions of `Answers`."""
    window: int | None = None
    """Layers in an `mlp` or `attn` window; None means 10 scaled to depth below 28 layers."""
    roles: Sequence[str] | None = None
    """Roles of the tokens to restore; None means every prompt token."""
    seed: int = 0
    batch_rows: int = 1024
    """Most rows in one forward pass: bounds memory, changes nothing else."""
    memory: float | int | None = None
    """Most GiB that a trace may take beside the weights (an estimate); bounds the rows further."""

    def __post_init__(self) -> None:
        severed = [Sever.parse(one) if isinstance(one, str) else one for one in self.sever]
        object.__setattr__(self, "sever", tuple(one.label for one in severed))
        if isinstance(self.corruption, str):
            object.__setattr__(self, "corruption", Corruption(distribution=self.corruption))
        names = [metric_name(metric) for metric in self.metrics]
        for metric in self.metrics:
            find_metric(metric)
        for name, values, legal in (("kinds", self.kinds, get_args(Kind)), ("roles", self.roles or (), ROLES)):
            for value in values:
                check_choice(f"an entry of {name}", value, legal)
        for name, values in (("kinds", self.kinds), ("sever", self.sever), ("metrics", names)):
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name} is {list(values)}, expected at least one choice, each once")
        check_at_least("samples", self.samples, 1)
        check_at_least("window", self.window, 1, optional=True)
        check_at_least("batch_rows", self.batch_rows, 1, optional=True)
        check_positive("memory", self.memory, "choose a number of GiB", optional=True)

    @property
    def severed(self) -> tuple[Sever, ...]:
        """What is cut, as values."""
        return tuple(Sever.parse(str(label)) for label in self.sever)

    @property
    def corrupted_by(self) -> Corruption:
        """How the subject is corrupted, as a value."""
        assert isinstance(self.corruption, Corruption)
        return self.corruption

    def plain(self) -> dict[str, Any]:
        """The settings as JSON holds them; a function stands by its name."""
        settings = asdict(self)
        return {**settings, "metrics": [metric_name(metric) for metric in self.metrics]}
