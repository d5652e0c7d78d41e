"""The targets as a value: the states to write, with how the search went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mechedit.models import Part


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """The states to write, with how the search went."""

    z: Float[Tensor, "fact d_model"]
    """h + δ at the subject's last token."""
    initial: Float[Tensor, "fact d_model"]
    """h, the state before, with the first prefix."""
    ids: tuple[str, ...]
    """Of the requests, in order."""
    layer: int
    part: Part = "resid"
    """What z is a state of, at `layer`."""
    prefixes: tuple[str, ...]
    """Templates with one {} for the whole prompt."""
    losses: pd.DataFrame
    """One row a fact and step: `id, step, loss, nll, kl, decay, probability`. Step 0 has δ = 0."""
    summary: pd.DataFrame
    """One row a fact, measured at the z that is returned: `id, loss, nll, kl, decay, probability` (of the
    whole object, mean over prefixes), `updates, norm_ratio` (‖δ‖/‖h‖), `stopped` (`converged`, `steps` or
    `not finite`: such a fact keeps z = h)."""
    provenance: Mapping[str, Any]
    """Model, settings and a hash of the requests."""

    @property
    def unconverged(self) -> tuple[str, ...]:
        """Ids of the facts whose search ran out of steps or of numbers."""
        return tuple(self.summary.id[self.summary.stopped != "converged"])
