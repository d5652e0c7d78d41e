"""`BatchEditor`: edits, measures and scores the model in the same way for every batch of a session."""

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
from mechedit.errors import InputError, brief, check_choice
from mechedit.evaluation import EvaluationConfig, perplexity
from mechedit.files import plain_copy
from mechedit.methods import METHODS, SETTINGS_FROM, MethodConfig, edit_keys
from mechedit.models import Model
from mechedit.provenance import ALGORITHMS, ModelIdentity, value_hash
from mechedit.session.edited_batch import EditedBatch
from mechedit.session.metrics import HistoryEntry, ScoredPrompts, finite_or_none, score_requests, weight_norms
from mechedit.session.stop_rule import StopRule
from mechedit.split_tensors import whole


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchEditor:
    """The arguments of a session, checked, which stay the same from batch to batch; see `EditSession`."""

    model: Model
    layers: list[int]
    moments: Mapping[int, Float[Tensor, "d_mlp d_mlp"]]
    """Second moments of the unedited model, as matrices: methods refuse a `SecondMoment` of other weights."""
    method: str
    config: MethodConfig
    settings_from: list[dict[str, Any]] | None
    """The files that `config` comes from, as a manifest holds them; None where the caller chose it."""
    prefixes: tuple[str, ...]
    texts: Sequence[str] | None
    rule: StopRule
    accumulate: bool
    scored_prompts: ScoredPrompts
    evaluation: EvaluationConfig
    base: Mapping[str, Any]
    """Provenance of the unedited model."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that determines the results, except the batches; flat, so that a message can name what differs."""
        groups = {
            "settings": dataclasses.asdict(self.config),
            "rule": dataclasses.asdict(self.rule),
            "evaluation": self.evaluation.plain(),
        }
        flat = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
        settings = {
            "algorithm": ALGORITHMS["session"],
            **ModelIdentity.of(self.base).record,
            "layers": self.layers,
            "method": self.method,
            **{f"moments.{layer}": digest(matrix) for layer, matrix in self.moments.items()},
            "prefixes": self.prefixes,
            "texts": None if self.texts is None else value_hash(list(self.texts)),
            "accumulate": self.accumulate,
            "judged": self.scored_prompts,
            **flat,
        }
        return plain_copy(settings)

    def edit_batch(
        self, requests: Sequence[EditRequest], previous_keys: Mapping[int, Tensor], cache: Path | None
    ) -> tuple[Edit, dict[int, Float[Tensor, "d_mlp fact"]]]:
        """Make the edit of one batch for the model as it is now.

        Args:
            requests: the batch.
            previous_keys: keys of earlier batches that the edit preserves, if the method can.
            cache: folder in which the search for z caches its results; None for no cache.

        Returns:
            The edit, and the keys that it was fitted at, per edited layer.
        """
        edit = METHODS[self.method](
            self.model,
            requests,
            self.layers,
            self.moments,
            prefixes=self.prefixes,
            config=self.config,
            previous=previous_keys if self.config.preserves_keys else None,
            cache=cache,
        )
        keys = {layer: whole(keys).cpu() for layer, keys in edit_keys(self.model, requests, edit).items()}
        return dataclasses.replace(edit, manifest=plain_copy(edit.manifest), remake=None), keys

    def merge(self, batches: Sequence[EditedBatch]) -> Edit:
        """The edits of some batches, summed to one edit of the unedited model.

        Raises:
            InputError: there are none.
        """
        if not batches:
            raise InputError("no batch stands in this session, expected at least one; write one first")
        # Each edit was made on what the ones before it left, and says so; their sum is for the unedited weights.
        manifests = [
            {**batch.edit.manifest, "model": dict(self.base), "made_on": batch.edit.manifest["model"]["weights_hash"]}
            for batch in batches
        ]
        merged = merge(
            [
                dataclasses.replace(batch.edit, manifest=manifest)
                for batch, manifest in zip(batches, manifests, strict=True)
            ]
        )
        fields = {
            "method": self.method,
            "settings": dataclasses.asdict(self.config),
            "prefixes": list(self.prefixes),
            "superseded": [request_id for batch in batches for request_id in batch.overridden],
        }
        if self.settings_from is not None:
            fields[SETTINGS_FROM] = self.settings_from
        return dataclasses.replace(merged, manifest={**merged.manifest, **fields})

    def model_entries(self) -> list[HistoryEntry]:
        """The perplexity of the model as it is now, and the norms of its weights."""
        norms = weight_norms(self.model, self.config.edited_layers(self.layers))
        if self.texts is None:
            return norms
        return [HistoryEntry("perplexity", "model", finite_or_none(perplexity(self.model, self.texts))), *norms]

    def score(self, requests: Sequence[EditRequest]) -> pd.DataFrame:
        """Scores of the model as it is now, per request; see `score_requests`."""
        return score_requests(self.model, requests, self.evaluation, self.scored_prompts)

    def check_weights(self, expected: str) -> None:
        """Raise InputError when the model's weights do not have this hash."""
        weights_hash = self.model.weights_hash()
        if weights_hash != expected:
            raise InputError(
                f"the weights of {brief(self.model.name)} have the hash {weights_hash[:12]}, expected "
                f"{expected[:12]}: they "
                f"are not as the session left them. Undo other edits; or, when the session was made on another machine "
                f"or number of threads, whose products differ in their last bits, go on with it there"
            )


def check_settings(
    config: MethodConfig | None, method: str, model: Model
) -> tuple[MethodConfig, list[dict[str, Any]] | None]:
    """The method's settings, by default the recommended ones for the model; and then the files that they come from.

    Raises:
        InputError: an unknown method, or the settings of another.
    """
    check_choice("the method", method, METHODS)
    recommended = METHODS[method].recommendation(model)
    default = recommended.config
    if config is not None and type(config) is not type(default):
        raise InputError(
            f"the settings are a {type(config).__name__}, expected a {type(default).__name__} for the method "
            f"{brief(method)}; pass that"
        )
    return (default, recommended.record) if config is None else (config, None)


def check_rule(rule: StopRule | None, texts: Sequence[str] | None) -> StopRule:
    """The rule; by default `StopRule()`, without its limit on perplexity if there are no texts.

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
