"""Settings of a trace: what to restore, what to sever, how to corrupt, and what to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from mechedit.bounds import check_numbers, check_sequences
from mechedit.errors import InputError, brief, check_at_least, check_choice, check_positive
from mechedit.models import MOST_LAYERS, Part
from mechedit.provenance import ALGORITHMS
from mechedit.trace.approximation import Approximation
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
    """Restored components: one residual state (`state`), or a window of module outputs (`mlp`, `attn`)."""
    sever: Sequence[str | Sever] = ("nothing",)
    """Severings, each traced by itself: `nothing`, `mlp`, `attn`, or a label such as `mlp@3` or `attn:last`."""
    samples: int = 10
    """Noise samples per fact."""
    corruption: str | Corruption = field(default_factory=Corruption)
    """How the subject is corrupted: a `Corruption`, or the name of its distribution."""
    noise: float | int = 3.0
    """Standard deviation of the noise, in units of that of the subjects' embeddings."""
    noise_std: float | int | None = None
    """Standard deviation of the noise in absolute units; overrides `noise`."""
    metrics: Sequence[str | Metric] = ("probability",)
    """Names in `METRICS`, each also after `normalized_`, or functions of `MetricInputs`."""
    window: int | None = None
    """Layers in an `mlp` or `attn` window; None means 10, scaled to depth below 28 layers."""
    roles: Sequence[str] | None = None
    """Roles of the tokens to restore; None means every prompt token."""
    seed: int = 0
    """Seed of the noise."""
    batch_rows: int = 1024
    """Most rows in one forward pass; limits memory and changes nothing else."""
    memory: float | int | None = None
    """Most GiB that a trace may take beside the weights (an estimate); None means no limit but `batch_rows`."""
    approximation: Approximation | None = None
    """Estimate effects from gradients, and trace exactly only what this says; None means to trace all cells."""

    def __post_init__(self) -> None:
        check_sequences(self)
        severings = [sever if isinstance(sever, Sever) else Sever.parse(sever) for sever in self.sever]
        object.__setattr__(self, "sever", tuple(sever.label for sever in severings))
        if isinstance(self.corruption, str):
            object.__setattr__(self, "corruption", Corruption(distribution=self.corruption))
        if not isinstance(self.corruption, Corruption):
            raise InputError(
                f"corruption is {brief(self.corruption)}, expected a Corruption, or the name of its distribution"
            )
        if not (self.approximation is None or isinstance(self.approximation, Approximation)):
            raise InputError(f"approximation is {brief(self.approximation)}, expected an Approximation or None")
        check_numbers(self, samples=100_000, window=MOST_LAYERS)
        check_positive("noise", self.noise, "choose a number such as 3")
        check_positive("noise_std", self.noise_std, optional=True)
        for metric in self.metrics:
            find_metric(metric)
        metrics = [metric_name(metric) if isinstance(metric, str) else metric for metric in self.metrics]
        object.__setattr__(self, "metrics", tuple(metrics))
        names = [metric_name(metric) for metric in self.metrics]
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
        """The severings as values."""
        return tuple(Sever.parse(str(label)) for label in self.sever)

    @property
    def corrupted_by(self) -> Corruption:
        """The corruption as a value."""
        assert isinstance(self.corruption, Corruption)
        return self.corruption

    def plain(self) -> dict[str, Any]:
        """The settings as JSON holds them; a function is written as its name."""
        settings = {**asdict(self), "metrics": [metric_name(metric) for metric in self.metrics]}
        if self.approximation is None:
            del settings["approximation"]  # exact traces keep the settings that they had before there were others
        else:
            settings["estimates"] = ALGORITHMS["estimates"]
        return settings
