"""ROME's protocol: each record is edited by itself, from the unedited model, and scored (ROME §3, Tables 1, 4, 5, 6).

The targets of many records are searched for in one go, as if each stood alone: facts about one subject share no δ. Then
each record's edit is made, scored on the record and taken back. Records are scored in parts that are kept in the
folder, so that an interrupted script goes on from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pandas as pd
from tqdm import tqdm

from analyses.common.batches import summarized
from analyses.common.experiment import Experiment
from analyses.common.variants import Variant
from mechedit.data import EditRequest
from mechedit.edit import Edit, edited
from mechedit.errors import InputError
from mechedit.evaluation import EvaluationConfig, References, evaluate, evaluate_zsre
from mechedit.methods import METHODS, MethodConfig, SearchConfig
from mechedit.targets import Targets, find_targets

PART = 25
"""Records that are scored before their part is kept."""
NEEDED = {"counterfact": ("target_true", "paraphrases", "neighbors"), "zsre": ("paraphrases", "neighbors")}
"""What a record must have for all of a protocol's measures."""


def scored_alone(
    experiment: Experiment,
    variant: Variant | None,
    requests: Sequence[EditRequest],
    protocol: str,
    *,
    evaluation: EvaluationConfig | None = None,
    references: References | None = None,
) -> pd.DataFrame:
    """The scores of all records, each edited alone: `SCORE_COLUMNS`.

    Args:
        experiment: model, second moments, and the folder of what is kept.
        variant: the edit; None scores the unedited model.
        requests: the records.
        protocol: `counterfact` or `zsre`.
        evaluation: how to measure; by default success and exact match alone.
        references: reference texts for RS.

    Raises:
        InputError: a record lacks what the protocol needs.
    """
    evaluation = evaluation or experiment.evaluation
    check_records(requests, protocol)
    frames = []
    starts = range(0, len(requests), PART)
    for start in tqdm(starts, desc="records alone", unit="part", disable=len(starts) < 2):
        part = requests[start : start + PART]
        key = {
            **experiment.score_key(variant, part, evaluation),
            "alone": protocol,
            "references": references.hash if references else None,
        }
        make_part = _part(experiment, variant, part, protocol, evaluation, references)
        frames.append(experiment.cached("alone", key, make_part))
    return summarized(pd.concat(frames, ignore_index=True), [request.id for request in requests], evaluation)


def check_records(requests: Sequence[EditRequest], protocol: str) -> None:
    """Refuse records that lack what a protocol's measures need.

    Raises:
        InputError: names the first of them, and what it lacks.
    """
    for request in requests:
        missing = [name for name in NEEDED[protocol] if not getattr(request, name)]
        if missing:
            raise InputError(
                f"the record {request.id!r} has no {', '.join(missing)}, expected them for the measures of {protocol}, "
                f"each record alone; leave it out, or edit all at once (--protocol batch), where a measure without "
                f"data is absent"
            )


def _part(
    experiment: Experiment,
    variant: Variant | None,
    requests: Sequence[EditRequest],
    protocol: str,
    evaluation: EvaluationConfig,
    references: References | None,
):
    """How the rows of some records are made: one per record, prompt and measure."""

    def make() -> pd.DataFrame:
        targets, config = (None, None) if variant is None else _targets(experiment, variant, requests)
        tables = []
        for index, request in enumerate(requests):
            edit = None
            if variant is not None:
                edit = _edit(experiment, variant, request, config, targets and targets.single(index, request))
            with edited(experiment.model, edit) if edit else nullcontext():
                tables.append(_table(experiment, request, protocol, evaluation, references))
        return pd.concat(tables, ignore_index=True)

    return make


def _targets(
    experiment: Experiment, variant: Variant, requests: Sequence[EditRequest]
) -> tuple[Targets | None, MethodConfig]:
    """The targets of all records in one search, each as if alone, and the settings that they were found with."""
    config: Any = experiment.config(variant)
    if not isinstance(config, SearchConfig):
        return None, config
    # Facts about one subject would share their δ, were they not alone.
    config = dataclasses.replace(config, joint=False)
    layer = config.target_layer(sorted(variant.layers))
    prefixes = config.default_prefixes(experiment.model)
    return find_targets(experiment.model, requests, layer, prefixes, config.targets), config


def _edit(
    experiment: Experiment, variant: Variant, request: EditRequest, config: MethodConfig | None, targets: Targets | None
) -> Edit:
    moments = experiment.moments(variant.layers) if config is not None and config.preserves_keys else {}
    return METHODS[variant.method](
        experiment.model, [request], list(variant.layers), moments, config=config, targets=targets
    )


def _table(
    experiment: Experiment,
    request: EditRequest,
    protocol: str,
    evaluation: EvaluationConfig,
    references: References | None,
) -> pd.DataFrame:
    if protocol == "zsre":
        return evaluate_zsre(experiment.model, [request], evaluation).table
    return evaluate(experiment.model, [request], evaluation, references=references).table
