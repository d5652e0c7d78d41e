"""SERAC beside the tables of edits: a memory in place of ΔW, scored by the same measures on the same records.

    python -m analyses.papers.serac [--model tiny] [--requests tiny] [--layer 4] [--passes 10] [--quick]

None of the two papers has numbers of it; MEMIT names it among related work. Classifier and counterfactual model
(`common/serac.py`) are trained on requests about other subjects: on the tiny model those that MEND's editor is trained
with, else the requests of the file beyond `--count`. The records are scored with a memory of each alone (ROME's
protocol), and of all of them (MEMIT's); KL, GE and RS are not measured. Writes, with 95 % intervals over records:

- `serac.parquet`: method (serac; or serac, untrained h, with the model as it is for h), memory (one, all), measure,
  mean, low, high, n;
- `serac.csv`: one row per method and memory, with the share of prompts of each kind that went to h.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import pandas as pd
from tqdm import tqdm

from analyses.common.batches import summarized
from analyses.common.command import open_experiment, options, run_script
from analyses.common.experiment import Experiment
from analyses.common.frames import groups_of, means_by
from analyses.common.printing import format_scores
from analyses.common.serac import Scope, Serac, SeracConfig, train_counterfactual, train_scope
from analyses.tiny_model.mend import training_requests
from mechedit import pipeline
from mechedit.batching import batches_of
from mechedit.data import EditRequest, load_requests
from mechedit.edit import Edit
from mechedit.errors import InputError
from mechedit.evaluation import EvaluationConfig
from mechedit.evaluation.probe_prompts import probe_prompts
from mechedit.models import Model
from mechedit.provenance import numbered, value_hash
from mechedit.tables import where

MEASURES = ("S", "ES", "EM", "PS", "PM", "NS", "NM", "exact_match")
TRAINED, UNTRAINED = "serac", "serac, untrained h"
ROUTED = "routed"
"""What stands in place of a measure where a row tells whether a prompt went to h."""
PART = 25
"""Records that are scored before their part is kept."""
KINDS = ("rewrite", "paraphrase", "neighborhood")
QUICK_STEPS = 60
"""Steps of the classifier with `--quick`."""
TRAINING = 400
"""Requests that are trained with."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train classifier and counterfactual model, score, write."""
    parser = options(__doc__, count=100, quick_count=4)
    parser.set_defaults(requests="tiny")
    parser.add_argument("--layer", type=int, help="whose states the classifier reads (default the middle one)")
    parser.add_argument("--passes", type=int, help="over the requests that h is trained with (default 10)")
    parser.add_argument("--training", type=int, help=f"requests that are trained with (default {TRAINING})")
    experiment = open_experiment("serac", parser, arguments)
    table = scored(experiment, config_of(experiment))
    experiment.write(table.loc[table["measure"] != ROUTED, :], format_table(table))


def config_of(experiment: Experiment) -> SeracConfig:
    """The settings of the command line."""
    parsed, model = experiment.arguments, experiment.model
    layer = model.n_layers // 2 if parsed.layer is None else parsed.layer
    if not 0 <= layer < model.n_layers:
        raise InputError(f"--layer is {layer}, expected 0 to {model.n_layers - 1}, the layers of {model.name!r}")
    config = SeracConfig(layer=layer, seed=experiment.seed)
    if experiment.quick:
        config = dataclasses.replace(config, classifier_steps=QUICK_STEPS)
    passes = (1 if experiment.quick else None) if parsed.passes is None else parsed.passes
    return config if passes is None else dataclasses.replace(config, counterfactual_steps=passes)


def training_set(experiment: Experiment) -> list[EditRequest]:
    """Requests to train with, about none of the subjects that are scored.

    Raises:
        InputError: there are none.
    """
    parsed = experiment.arguments
    if parsed.model == "tiny" and parsed.requests == "tiny":
        others = training_requests(experiment.requests)
    else:
        subjects = {request.subject for request in experiment.requests}
        requests = load_requests(parsed.requests, conflicts="first")[len(experiment.requests) :]
        others = [request for request in requests if request.subject not in subjects]
    if not others:
        raise InputError(
            f"no request of {parsed.requests!r} is about a subject that is not scored, expected some to train with: "
            f"score fewer by --count"
        )
    default = 40 if experiment.quick else TRAINING
    return others[: default if parsed.training is None else parsed.training]


def scored(experiment: Experiment, config: SeracConfig) -> pd.DataFrame:
    """`method, memory, measure, mean, low, high, n`; the measure `routed` is the share of prompts that went to h.

    h, and the scores of each part of the records, are cached in the folder.
    """
    model, requests, others = experiment.model, experiment.requests, training_set(experiment)
    scope = train_scope(model, others, config)
    made_with = {"config": dataclasses.asdict(config), "training": value_hash([request.plain() for request in others])}
    counterfactual = None
    if config.counterfactual_steps:
        cache, key = experiment.folder.cache("edits"), numbered("edit", {**experiment.key([]), **made_with})
        counterfactual = cache.get(key, lambda: train_counterfactual(model, others, config), pipeline.EDIT)
    frames = []
    for name, change in ((UNTRAINED, None), *([(TRAINED, counterfactual)] if counterfactual else [])):
        for memory, parts in {"one": list(batches_of(requests, PART)), "all": [requests]}.items():
            tables = []
            for part in tqdm(parts, desc=f"{name}, {memory}", unit="part", disable=len(parts) < 2):
                memories = [[request] for request in part] if memory == "one" else [part]
                key = {
                    **experiment.score_key(None, part, experiment.evaluation),
                    **made_with, "serac": name, "memory": memory,
                }  # fmt: skip
                make = partial(rows_of, model, scope, change, memories, experiment.evaluation)
                tables.append(experiment.cached("serac", key, make))
            rows = pd.concat(tables, ignore_index=True)
            measured = rows.loc[rows["measure"] != ROUTED, :]
            scores = summarized(measured, [request.id for request in requests], experiment.evaluation)
            by_kind = means_by(where(rows, measure=ROUTED), "kind", "value")
            extra = [{"measure": ROUTED, "kind": kind, "mean": 100 * by_kind[kind]} for kind in by_kind.index]
            frames.append(pd.concat([scores, pd.DataFrame(extra)]).assign(method=name, memory=memory))
    return pd.concat(frames, ignore_index=True)


def rows_of(
    model: Model,
    scope: Scope,
    change: Edit | None,
    memories: Sequence[Sequence[EditRequest]],
    evaluation: EvaluationConfig,
) -> pd.DataFrame:
    """The scores tables of some memories, each of its own records, with a row `routed` for each prompt."""
    tables = []
    for memory in memories:
        system = Serac(model=model, scope=scope, counterfactual=change, memory=memory)
        tables += [system.evaluate(memory, evaluation), routed(system, memory)]
    return pd.concat(tables, ignore_index=True)


def routed(system: Serac, requests: Sequence[EditRequest]) -> pd.DataFrame:
    """Whether each prompt went to h, as rows of a scores table."""
    probes = [probe for request in requests for probe in probe_prompts(request, plus=False)]
    edits = system.retrieved([probe.text for probe in probes])
    return pd.DataFrame(
        [
            {
                "case": probe.case, "measure": ROUTED, "kind": probe.kind, "prompt": probe.index,
                "value": float(edit is not None), "state": "after",
            }
            for probe, edit in zip(probes, edits, strict=True)
        ]
    )  # fmt: skip


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method and memory: each measure with half its interval, and the percentages that went to h."""
    rows = []
    for (method, memory), scores in groups_of(table, ["method", "memory"]):
        shares = scores.loc[scores["measure"] == ROUTED, :].set_index("kind")["mean"]
        measured = scores.loc[scores["measure"] != ROUTED, :]
        to_h = {f"{kind} to h": round(float(shares[kind]), 1) for kind in KINDS if kind in shares.index}
        rows.append({"method": method, "memory": memory, **format_scores(measured, MEASURES), **to_h})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run_script(main)
