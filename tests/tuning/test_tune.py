"""Tuning on the tiny model: better than a bad default, and no worse than a good one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from mechedit import (
    EditRequest,
    MemitConfig,
    TuneConfig,
    collect_moments,
    edited,
    evaluate,
    load_model,
    load_requests,
    load_texts,
    memit,
    recommended,
    tune,
)
from mechedit.evaluation import QUICK
from mechedit.sweep import Window

TUNED_WITH = ("plant", "colour", "stone", "instrument")
"""Relations of the facts that are tuned with; facts of the others, about other subjects, judge the result."""
UNTUNED_LAYERS = [1, 2, 3, 4]
"""The layers that the trace of the tiny model selects."""
BAD = MemitConfig(relative_covariance_weight=1000.0, clamp=2.0, kl_prompt="{}", steps=15, generated_prefixes=0)
"""Settings with which nothing is written: λ is too large."""
GOOD_BUDGET = TuneConfig(edits=12, facts=6, windows=(Window(1, 4), Window(5, 6)))


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_model("tiny")


@pytest.fixture(scope="module")
def moments(tiny: Any) -> Mapping[int, Any]:
    return collect_moments(tiny, list(load_texts("tiny"))[:250], [1, 2, 3, 4, 5, 6])


@pytest.fixture(scope="module")
def facts() -> tuple[list[EditRequest], list[EditRequest]]:
    """Facts to tune with, and 10 others of other relations about other subjects; few prompts each."""
    requests = [
        dataclasses.replace(request, paraphrases=request.paraphrases[:1], neighbors=request.neighbors[:2])
        for request in load_requests("tiny")
    ]
    tuned_with = [request for request in requests if request.relation in TUNED_WITH]
    subjects = {request.subject for request in tuned_with}
    others = [request for request in requests if request.relation not in TUNED_WITH and request.subject not in subjects]
    return tuned_with, others[:10]


def score(model: Any, requests: Sequence[EditRequest], layers: Sequence[int], moments: Any, config: Any) -> float:
    with edited(model, memit(model, requests, list(layers), moments, config=config)):
        return evaluate(model, requests, QUICK).summary()["S"]["mean"]


def test_a_bad_default_is_improved_on_facts_and_relations_that_were_not_used(
    tiny: Any, moments: Any, facts: Any
) -> None:
    tuned = tune(tiny, facts[0], moments, config=BAD, tuning=GOOD_BUDGET)
    others = facts[1]
    assert not {request.relation for request in others} & {request.relation for request in facts[0]}
    assert score(tiny, others, UNTUNED_LAYERS, moments, BAD) < 20, "the control: with these settings nothing is written"
    assert score(tiny, others, tuned.layers, moments, tuned.config) > 80
    assert tuned.config.relative_covariance_weight <= 1
    assert tuned.layers == (1, 2, 3, 4), "the MLPs of layers 5 and 6 hold nothing"


def test_tuned_settings_are_no_worse_than_good_ones_on_facts_and_relations_that_were_not_used(
    tiny: Any, moments: Any, facts: Any
) -> None:
    good = dataclasses.replace(recommended("memit", tiny), steps=15, generated_prefixes=0)
    before = tiny.weights_hash()
    tuned = tune(tiny, facts[0], moments, config=good, tuning=GOOD_BUDGET)
    assert tiny.weights_hash() == before
    untuned = score(tiny, facts[1], UNTUNED_LAYERS, moments, good)
    assert untuned > 80, "the control: the default is a good one"
    assert score(tiny, facts[1], tuned.layers, moments, tuned.config) >= untuned - 1
