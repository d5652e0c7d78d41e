"""The targets as a value: the states z to be written, with the course of their search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mechedit.data import EditRequest
from mechedit.models import Part
from mechedit.provenance import value_hash


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """The states z to be written, with the course of their search."""

    z: Float[Tensor, "fact d_model"]
    """h + δ at the token of the settings, the subject's last one by default."""
    initial: Float[Tensor, "fact d_model"]
    """h, the clean state there in the bare prompt."""
    ids: tuple[str, ...]
    """Ids of the requests, in order."""
    layer: int
    """0-based block of z."""
    part: Part = "resid"
    """The activation at `layer` that z is a state of."""
    prefixes: tuple[str, ...]
    """Context templates with one {} for the whole prompt."""
    losses: pd.DataFrame
    """One row per fact and step: `id, step, loss, nll, kl, decay, probability, margin`. At step 0, δ is 0."""
    summary: pd.DataFrame
    """One row per fact, evaluated at the z that is returned: `id, loss, nll, kl, decay, probability` (of the
    whole object, mean over prefixes), `margin` (nats by which every token of the object is likelier than any other,
    behind all prefixes), `updates, norm_ratio` (‖δ‖/‖h‖), `stopped` (`threshold`, `margin`, `steps`, or `not finite`:
    such a fact keeps z = h), `converged` (whether `margin` is above 0: the object is what the model says)."""
    provenance: Mapping[str, Any]
    """Model, settings and a hash of the requests."""

    def single(self, index: int, request: EditRequest) -> Targets:
        """The targets of one fact, as if they had been searched for by themselves.

        Args:
            index: of the fact.
            request: that fact.
        """
        ids = self.ids[index : index + 1]
        return replace(
            self, z=self.z[[index]], initial=self.initial[[index]], ids=ids,
            summary=self.summary[self.summary.id.isin(ids)], losses=self.losses[self.losses.id.isin(ids)],
            provenance={**self.provenance, "requests": value_hash([request.plain()])},
        )  # fmt: skip

    @property
    def unconverged(self) -> tuple[str, ...]:
        """Ids of the facts whose object is not the likeliest answer with z written, behind some prefix."""
        return tuple(self.summary.id[~self.summary.converged])
