"""SERAC's wrapper: a scope that is learned, prompts that go where the scope says, and weights that stay."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from analyses.common.serac import (
    Scope,
    ScopeHead,
    Serac,
    SeracConfig,
    scope_pairs,
    train_counterfactual,
    train_scope,
)
from analyses.papers import serac
from analyses.tiny_model.mend import training_requests
from mechedit import InputError, edited, evaluate, load_model, load_requests
from mechedit.evaluation import QUICK, score_targets
from mechedit.evaluation.probe_prompts import edit_sentence
from mechedit.tables import where

CONFIG = SeracConfig(layer=0, classifier_steps=150, counterfactual_steps=1)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("tiny")


@pytest.fixture(scope="module")
def scored() -> list[Any]:
    return load_requests("tiny")[:2]


@pytest.fixture(scope="module")
def others() -> list[Any]:
    return training_requests(load_requests("tiny"))[:80]


class Chosen(Scope):
    """A scope that takes the prompts it is given, and the first edit."""

    def __init__(self, inside: set[str] | None) -> None:
        object.__setattr__(self, "inside", inside)

    def nearest(self, texts: Any, edits: Any) -> list[int | None]:
        inside = self.inside  # type: ignore[attr-defined]
        return [0 if inside is None or text in inside else None for text in texts]


def values(table: pd.DataFrame) -> dict[tuple[str, str, str, int], float]:
    return {(row.case, row.measure, row.kind, row.prompt): row.value for row in table.itertuples()}


def test_a_scope_is_learned_that_holds_for_other_subjects(model: Any, others: list[Any]) -> None:
    """Of requests that it was not trained with: their paraphrases are in scope, their neighbors are not."""
    held_out = [request for request in load_requests("tiny") if request.paraphrases and request.neighbors][:20]
    assert not {request.subject for request in others} & {request.subject for request in held_out}

    def right(scope: Scope) -> float:
        answers = []
        for request in held_out:
            texts = [*request.paraphrases, *(neighbor.prompt for neighbor in request.neighbors[:2])]
            inside = [index is not None for index in scope.nearest(texts, [request.text])]
            answers += [is_in == (i < len(request.paraphrases)) for i, is_in in enumerate(inside)]
        return sum(answers) / len(answers)

    untrained = train_scope(model, others, SeracConfig(layer=0, classifier_steps=0))
    assert right(train_scope(model, others, CONFIG)) > 0.95 > 0.6 > right(untrained), (
        "the control: it was not so at first"
    )


def test_a_logit_is_the_equation_for_each_pair_by_itself() -> None:
    """b + c Σ_t α_t max_u cos(A t, A u), by loops; padding of a batch takes no part."""
    head = ScopeHead(6, 4, seed=0).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    head.weight += torch.randn(6, generator=generator)
    edits, prompts = ([torch.randn(n, 6, generator=generator) for n in counts] for counts in ((2, 5), (4, 3)))
    for edit, prompt, logit in zip(edits, prompts, head(edits, prompts).tolist(), strict=True):
        weights = [math.exp(float(head.weight @ t)) for t in edit]
        best = [
            max(torch.cosine_similarity(head.projection @ t, head.projection @ u, dim=0).item() for u in prompt)
            for t in edit
        ]
        expected = sum(w * value for w, value in zip(weights, best, strict=True)) / sum(weights)
        assert logit == pytest.approx(float(head.bias + head.slope * expected), abs=1e-4)


def test_pairs_have_paraphrases_inside_and_neighbors_outside(others: list[Any]) -> None:
    first, pairs = others[0], scope_pairs(others, seed=0)
    assert (first.paraphrases[0], first.text, True) in pairs
    assert (first.neighbors[0].prompt, first.text, False) in pairs
    with pytest.raises(InputError, match="has paraphrases and neighbors"):
        train_scope(None, [], CONFIG)  # type: ignore[arg-type]


def test_what_is_in_no_scope_is_answered_by_the_model_itself(model: Any, scored: list[Any]) -> None:
    system = Serac(model=model, scope=Chosen(set()), counterfactual=None, memory=scored)
    assert values(system.evaluate(scored, QUICK)) == values(evaluate(model, scored, QUICK).table)


def test_what_is_in_scope_is_read_behind_the_edit(model: Any, scored: list[Any]) -> None:
    """P(new) − P(true) after the edit's sentence and the prompt, of all kinds of prompts."""
    system = Serac(model=model, scope=Chosen(None), counterfactual=None, memory=scored[:1])
    table = values(system.evaluate(scored[:1], QUICK))
    request, sentence = scored[0], edit_sentence(scored[0])
    prompts = {
        ("EM", "rewrite", 0): request.text, ("PM", "paraphrase", 0): request.paraphrases[0],
        ("NM", "neighborhood", 1): request.neighbors[1].prompt,
    }  # fmt: skip
    objects = (request.target_new, request.target_true)
    for (measure, kind, index), text in prompts.items():
        scores = score_targets(model, [(sentence + text, target) for target in objects])
        new, true = (scores[sentence + text, target].probability(QUICK.likelihood) for target in objects)
        expected = true - new if kind == "neighborhood" else new - true
        assert table[request.id, measure, kind, index] == pytest.approx(expected, abs=1e-6)
    assert table != values(evaluate(model, scored[:1], QUICK).table), "the control"


def test_only_prompts_in_scope_see_the_other_model_and_no_weight_changes(
    model: Any, scored: list[Any], others: list[Any]
) -> None:
    change = train_counterfactual(model, others[:8], CONFIG)
    before = model.weights_hash()
    request = scored[0]
    rows = Serac(model=model, scope=Chosen({request.text}), counterfactual=change, memory=[request]).evaluate(
        [request], QUICK
    )
    assert model.weights_hash() == before
    unedited = values(evaluate(model, [request], QUICK).table)
    assert all(value == unedited[key] for key, value in values(rows).items() if key[2] != "rewrite")
    with edited(model, change):
        behind = edit_sentence(request) + request.text
        scores = score_targets(model, [(behind, request.target_new), (behind, request.target_true)])
    new, true = (
        scores[behind, target].probability(QUICK.likelihood) for target in (request.target_new, request.target_true)
    )
    assert where(rows, measure="EM")["value"].item() == pytest.approx(new - true, abs=1e-6)


def test_the_script_scores_both_memories_and_trains_once(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--quick", "--count", "2", "--training", "6", "--passes", "1", "--layer", "0", "--out", str(tmp_path)]
    serac.main(arguments)
    printed = pd.read_csv(tmp_path / "serac.csv")
    assert list(zip(printed["method"], printed["memory"], strict=True)) == [
        (serac.UNTRAINED, "one"), (serac.UNTRAINED, "all"), (serac.TRAINED, "one"), (serac.TRAINED, "all"),
    ]  # fmt: skip
    assert (printed["rewrite to h"] == 100).all(), "a prompt is in the scope of the edit that it is of"
    assert {"S", "ES", "PS", "NS", "neighborhood to h"} <= set(printed)
    table = (tmp_path / "serac.parquet").read_bytes()

    def refuses(*_: object) -> None:
        raise AssertionError("what is kept was made again")

    monkeypatch.setattr(serac, "train_counterfactual", refuses)
    monkeypatch.setattr(serac, "rows_of", refuses)
    serac.main(arguments)
    assert (tmp_path / "serac.parquet").read_bytes() == table
    with pytest.raises(InputError, match="--layer is 10, expected 0 to 9"):
        serac.config_of(SimpleNamespace(arguments=SimpleNamespace(layer=10), model=model))  # type: ignore[arg-type]
