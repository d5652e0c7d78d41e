"""When a session stops: what a batch must not have done to the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mechedit.errors import check_positive
from mechedit.session.metrics import Measure


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """Limits that no batch may pass; None switches one off.

    Edits in a row wear a model out, slowly and then at once (Yang et al., 2024, "The Butterfly Effect of Model
    Editing"; Gupta et al., 2024, "Model Editing at Scale leads to Gradual and Catastrophic Forgetting").
    """

    perplexity: float | int | None = 1.5
    """Of the held-out texts, in units of the unedited model's."""
    earlier: float | int | None = 50.0
    """The least success on the requests of earlier batches that is enough, in percent: ES over those with a
    `target_true`, exact match over all when none has one."""
    norm: float | int | None = None
    """‖W‖ of any edited layer, in units of the unedited layer's. Off by default, since how much a model bears differs:
    in the tiny one ‖W‖ grows sevenfold while 97 % of 100 edits and its text hold."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            check_positive(name, value, "choose a larger number, or None for no such limit", optional=True)

    def reason(self, measures: Sequence[Measure], unedited: Sequence[Measure]) -> str | None:
        """What these measures say against the batch they were taken after; None when nothing does.

        Args:
            measures: of the model after the batch.
            unedited: of the unedited model.
        """
        now, start = _table(measures), _table(unedited)
        return self._perplexity(now, start) or self._earlier(now) or self._norm(now, start)

    def _perplexity(self, now: _Table, start: _Table) -> str | None:
        key = ("perplexity", "model", None)
        if key not in now:
            return None
        found, base = now[key], start[key]
        # Nothing can be judged any more, whatever the limits are.
        if found is None or base is None:
            return "the perplexity of the held-out texts is no longer finite"
        if self.perplexity is None or found <= self.perplexity * base:
            return None
        return (
            f"the perplexity of the held-out texts is {found:.4g}, {found / base:.3g} times the unedited model's "
            f"{base:.4g}; allowed are {self.perplexity:g} times"
        )

    def _earlier(self, now: _Table) -> str | None:
        measure = next((name for name in ("ES", "exact_match") if (name, "earlier", None) in now), None)
        found = now[measure, "earlier", None] if measure else None
        if self.earlier is None or found is None or found >= self.earlier:
            return None
        return f"{measure} on the requests of earlier batches is {found:.4g} %, expected at least {self.earlier:g} %"

    def _norm(self, now: _Table, start: _Table) -> str | None:
        grown = {
            layer: value / base
            for (measure, scope, layer), value in now.items()
            if measure == "weight_norm" and value is not None and (base := start[measure, scope, layer])
        }
        worst = max(grown, key=lambda layer: grown[layer], default=None)
        if self.norm is None or worst is None or grown[worst] <= self.norm:
            return None
        return f"the weights of layer {worst} have {grown[worst]:.4g} times their norm; allowed are {self.norm:g} times"


_Table = Mapping[tuple[str, str, int | None], float | None]


def _table(measures: Sequence[Measure]) -> _Table:
    return {(one.measure, one.scope, one.layer): one.value for one in measures}
