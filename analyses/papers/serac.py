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

import pandas as pd
from tqdm import tqdm

from analyses.common.batches import summarized
from analyses.common.command import open_experiment, options, run
from analyses.common.experiment import Experiment
from analyses.common.frames import groups_of
from analyses.common.printing import format_scores
from analyses.common.serac import Serac, SeracConfig, train_counterfactual, train_scope
from analyses.tiny_model.mend import training_requests
from mechedit.data import EditRequest, load_requests
from mechedit.errors import InputError
from mechedit.evaluation.probe_prompts import probe_prompts

MEASURES = ("S", "ES", "EM", "PS", "PM", "NS", "NM", "exact_match")
TRAINED, UNTRAINED = "serac", "serac, untrained h"
KINDS = ("rewrite", "paraphrase", "neighborhood")
TRAINING = 800
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
    experiment.write(table.loc[table["measure"] != "routed", :], format_table(table))


def config_of(experiment: Experiment) -> SeracConfig:
    """The settings of the command line."""
    parsed, model = experiment.arguments, experiment.model
    layer = model.n_layers // 2 if parsed.layer is None else parsed.layer
    if not 0 <= layer < model.n_layers:
        raise InputError(f"--layer is {layer}, expected 0 to {model.n_layers - 1}, the layers of {model.name!r}")
    config = SeracConfig(layer=layer, seed=experiment.seed)
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
        others = [r for r in load_requests(parsed.requests)[len(experiment.requests) :] if r.subject not in subjects]
    if not others:
        raise InputError(
            f"no request of {parsed.requests!r} is about a subject that is not scored, expected some to train with: "
            f"score fewer by --count"
        )
    return others[: parsed.training or (40 if experiment.quick else TRAINING)]


def scored(experiment: Experiment, config: SeracConfig) -> pd.DataFrame:
    """`method, memory, measure, mean, low, high, n`; the measure `routed` is the share of prompts that went to h."""
    model, requests, others = experiment.model, experiment.requests, training_set(experiment)
    scope = train_scope(model, others, config)
    counterfactual = train_counterfactual(model, others, config)
    frames = []
    for name, change in ((UNTRAINED, None), (TRAINED, counterfactual)):
        if name == TRAINED and change is None:
            continue
        memories = {"one": [[request] for request in requests], "all": [requests]}
        for memory, groups in memories.items():
            rows, routed = [], []
            for group in tqdm(groups, desc=f"{name}, {memory}", unit="memory", disable=len(groups) < 2):
                system = Serac(model=model, scope=scope, counterfactual=change, memory=group)
                rows.append(system.evaluate(group, experiment.evaluation))
                routed.append(shares(system, group))
            cases = [request.id for request in requests]
            scores = summarized(pd.concat(rows, ignore_index=True), cases, experiment.evaluation)
            by_kind = pd.concat(routed).groupby("kind")["inside"].mean()
            extra = [{"measure": "routed", "kind": kind, "mean": 100 * by_kind[kind]} for kind in by_kind.index]
            frames.append(pd.concat([scores, pd.DataFrame(extra)]).assign(method=name, memory=memory))
    return pd.concat(frames, ignore_index=True)


def shares(system: Serac, requests: Sequence[EditRequest]) -> pd.DataFrame:
    """Whether each prompt went to h: `kind, inside`."""
    probes = [probe for request in requests for probe in probe_prompts(request, plus=False)]
    edits = system.retrieved([probe.text for probe in probes])
    return pd.DataFrame(
        [{"kind": probe.kind, "inside": edit is not None} for probe, edit in zip(probes, edits, strict=True)]
    )


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method and memory: each measure with half its interval, and the percentages that went to h."""
    rows = []
    for (method, memory), scores in groups_of(table, ["method", "memory"]):
        routed = scores.loc[scores["measure"] == "routed", :].set_index("kind")["mean"]
        measured = scores.loc[scores["measure"] != "routed", :]
        to_h = {f"{kind} to h": round(float(routed[kind]), 1) for kind in KINDS if kind in routed.index}
        rows.append({"method": method, "memory": memory, **format_scores(measured, MEASURES), **to_h})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run(main)
