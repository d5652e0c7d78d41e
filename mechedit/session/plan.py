"""What stays the same from batch to batch of a session: on what, with what and how edits are made and judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mechedit.data import EditRequest
from mechedit.edit import Edit, merge
from mechedit.edit.weights import digest
from mechedit.errors import InputError, check_choice
from mechedit.evaluation import EvaluationConfig, perplexity
from mechedit.files import plain_copy
from mechedit.methods import METHODS, MethodConfig, edit_keys, recommended
from mechedit.models import Model
from mechedit.provenance import value_hash
from mechedit.session.metrics import Judged, Measure, finite, judge, weight_norms
from mechedit.session.record import Record
from mechedit.session.stop_rule import StopRule


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The arguments of a session, checked; see `EditSession`."""

    model: Model
    layers: list[int]
    moments: Mapping[int, Float[Tensor, "d_mlp d_mlp"]]
    """Taken as matrices: those of the unedited model are wanted, and a method would refuse them on an edited one."""
    method: str
    config: MethodConfig
    prefixes: tuple[str, ...]
    texts: Sequence[str] | None
    rule: StopRule
    accumulate: bool
    judged: Judged
    evaluation: EvaluationConfig
    base: Mapping[str, Any]
    """Provenance of the unedited model."""

    @property
    def made_with(self) -> dict[str, Any]:
        """All that determines the results, but for the batches; flat, so that a difference can be named."""
        own = {name: self.base[name] for name in ("weights_hash", "tokenizer_hash", "dtype", "module")}
        groups = {"settings": self.config, "rule": self.rule, "evaluation": self.evaluation}
        flat = {
            f"{group}.{name}": value
            for group, config in groups.items()
            for name, value in dataclasses.asdict(config).items()
        }
        found = {
            **own,
            "layers": self.layers,
            "method": self.method,
            **{f"moments.{layer}": digest(matrix) for layer, matrix in self.moments.items()},
            "prefixes": self.prefixes,
            "texts": None if self.texts is None else value_hash(list(self.texts)),
            "accumulate": self.accumulate,
            "judged": self.judged,
            **flat,
        }
        return plain_copy(found)

    def make(
        self, batch: Sequence[EditRequest], previous: Mapping[int, Tensor], cache: Path | None
    ) -> tuple[Edit, dict[int, Float[Tensor, "d_mlp fact"]]]:
        """The batch's own edit of the model as it is now, and the keys it was fitted at."""
        own = METHODS[self.method](
            self.model,
            batch,
            self.layers,
            self.moments,
            prefixes=self.prefixes,
            config=self.config,
            previous=previous if self.config.preserves_keys else None,
            cache=cache,
        )
        keys = {layer: keys.cpu() for layer, keys in edit_keys(self.model, batch, own).items()}
        return dataclasses.replace(own, manifest=plain_copy(own.manifest)), keys

    def together(self, records: Sequence[Record]) -> Edit:
        """The edits of `records` as one edit of the unedited model.

        Raises:
            InputError: there are none.
        """
        if not records:
            raise InputError("no batch stands in this session, expected at least one; write one first")
        # Each was made on what the ones before it left, and says so; their sum is for the unedited weights.
        parts = [
            {**one.edit.manifest, "model": dict(self.base), "made_on": one.edit.manifest["model"]["weights_hash"]}
            for one in records
        ]
        merged = merge([dataclasses.replace(one.edit, manifest=part) for one, part in zip(records, parts, strict=True)])
        about = {
            "method": self.method,
            "settings": dataclasses.asdict(self.config),
            "prefixes": list(self.prefixes),
            "superseded": [name for record in records for name in record.superseded],
        }
        return dataclasses.replace(merged, manifest={**merged.manifest, **about})

    def measure(self) -> list[Measure]:
        """The perplexity of the model as it is now, and the norms of its weights."""
        norms = weight_norms(self.model, self.config.edited_layers(self.layers))
        if self.texts is None:
            return norms
        return [Measure("perplexity", "model", finite(perplexity(self.model, self.texts))), *norms]

    def judge(self, requests: Sequence[EditRequest]) -> pd.DataFrame:
        """See `judge`."""
        return judge(self.model, requests, self.evaluation, self.judged)

    def check_weights(self, expected: str) -> None:
        """Raise InputError when the model's weights do not have this hash."""
        found = self.model.weights_hash()
        if found != expected:
            raise InputError(
                f"the weights of {self.model.name!r} have the hash {found[:12]}, expected {expected[:12]}: they are "
                f"not as the session left them. Undo other edits; or, when the session was made on another machine or "
                f"number of threads, whose products differ in their last bits, go on with it there"
            )


def check_settings(config: MethodConfig | None, method: str, model: Model) -> MethodConfig:
    """The settings: by default those that ship with the model.

    Raises:
        InputError: an unknown method, or the settings of another.
    """
    check_choice("the method", method, METHODS)
    default = recommended(method, model)
    if config is not None and type(config) is not type(default):
        raise InputError(
            f"the settings are a {type(config).__name__}, expected a {type(default).__name__} for the method "
            f"{method!r}; pass that"
        )
    return config or default


def check_rule(rule: StopRule | None, texts: Sequence[str] | None) -> StopRule:
    """The rule; by default one that needs no texts when there are none.

    Raises:
        InputError: it limits perplexity, and there are no texts.
    """
    if rule is None:
        return StopRule() if texts is not None else StopRule(perplexity=None)
    if rule.perplexity is not None and texts is None:
        raise InputError(
            f"the rule limits perplexity (to {rule.perplexity:g} times), but there are no texts, expected held-out "
            f"documents; pass them as texts, or perplexity=None"
        )
    return rule
