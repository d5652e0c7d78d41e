"""`StopRule`: the limits at which a session stops, before its edits ruin the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mechedit.bounds import check_numbers
from mechedit.errors import check_positive
from mechedit.session.metrics import HistoryEntry


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """Limits that no batch may pass; None switches a limit off.

    Sequential edits wear a model out, slowly and then all at once (Yang et al., 2024, "The Butterfly Effect of Model
    Editing"; Gupta et al., 2024, "Model Editing at Scale leads to Gradual and Catastrophic Forgetting").

    `earlier` limits ES over the requests with a `target_true`, or exact match over all requests if none has one.
    `norm` is off by default, since models differ in how much growth they bear: in the tiny model ‖W‖ grows sevenfold
    while 97 % of 100 edits and its text hold.
    """

    perplexity: float | int | None = 1.5
    """Highest perplexity of the held-out texts, in multiples of the unedited model's."""
    earlier: float | int | None = 50.0
    """Lowest success on the requests of earlier batches, in percent."""
    norm: float | int | None = None
    """Highest weight norm of any edited layer, in multiples of the unedited layer's."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name, value in dataclasses.asdict(self).items():
            check_positive(name, value, "choose a larger number, or None for no such limit", optional=True)

    def reason(self, entries: Sequence[HistoryEntry], unedited: Sequence[HistoryEntry]) -> str | None:
        """The reason to reject a batch; None if it passes no limit.

        A perplexity that is not finite is a reason whatever the limits are.

        Args:
            entries: numbers measured after the batch.
            unedited: numbers measured on the unedited model.
        """
        values, base_values = _by_name(entries), _by_name(unedited)
        return (
            self._perplexity_reason(values, base_values)
            or self._earlier_reason(values)
            or self._norm_reason(values, base_values)
        )

    def _perplexity_reason(self, values: _Values, base_values: _Values) -> str | None:
        name = ("perplexity", "model", None)
        if name not in values:
            return None
        value, base = values[name], base_values[name]
        if value is None or base is None:
            return "the perplexity of the held-out texts is no longer finite"
        if self.perplexity is None or value <= self.perplexity * base:
            return None
        return (
            f"the perplexity of the held-out texts is {value:.4g}, {value / base:.3g} times the unedited model's "
            f"{base:.4g}; allowed are {self.perplexity:g} times"
        )

    def _earlier_reason(self, values: _Values) -> str | None:
        measure = next((name for name in ("ES", "exact_match") if (name, "earlier", None) in values), None)
        value = values[measure, "earlier", None] if measure else None
        if self.earlier is None or value is None or value >= self.earlier:
            return None
        return f"{measure} on the requests of earlier batches is {value:.4g} %, expected at least {self.earlier:g} %"

    def _norm_reason(self, values: _Values, base_values: _Values) -> str | None:
        growth = {
            layer: value / base
            for (measure, scope, layer), value in values.items()
            if measure == "weight_norm" and value is not None and (base := base_values[measure, scope, layer])
        }
        worst = max(growth, key=lambda layer: growth[layer], default=None)
        if self.norm is None or worst is None or growth[worst] <= self.norm:
            return None
        return (
            f"the weights of layer {worst} have {growth[worst]:.4g} times their norm; allowed are {self.norm:g} times"
        )


_Values = Mapping[tuple[str, str, int | None], float | None]
"""Values by measure, scope and layer."""


def _by_name(entries: Sequence[HistoryEntry]) -> _Values:
    return {(entry.measure, entry.scope, entry.layer): entry.value for entry in entries}
