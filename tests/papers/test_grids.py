"""ROME's figures by layer: editing at every layer and token, fine-tuning by layer and ε, integrated gradients."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.papers import finetune_grid, integrated_gradients, rome_grid
from mechedit import InputError, edited, evaluate, ft, load_facts, load_model, load_requests
from mechedit.data import Fact
from mechedit.evaluation import EvaluationConfig
from mechedit.tables import where
from mechedit.trace import TraceConfig, embedding_std, run_clean_and_corrupted, tokenize_fact

ONE = ["--quick", "--count", "1", "--layers", "2-3"]


def test_fine_tuning_is_scored_by_layer_and_bound(tmp_path: Path) -> None:
    finetune_grid.main([*ONE, "--bounds", "1e-9", "--out", str(tmp_path)])
    assert {path.suffix for path in tmp_path.glob("finetune_grid.*")} == {".parquet", ".csv", ".pdf", ".png"}
    table = pd.read_parquet(tmp_path / "finetune_grid.parquet")
    assert set(zip(table["method"], table["layer"], strict=True)) == {
        ("ft", 2), ("ft", 3), ("ft_l, ε 1e-09", 2), ("ft_l, ε 1e-09", 3),
    }  # fmt: skip
    model, request = load_model("tiny"), load_requests("tiny")[0]
    with edited(model, ft(model, [request], [3])):
        direct = evaluate(model, [request], EvaluationConfig(generation_tokens=0, likelihood="normalized")).summary()
    unmoved = where(table, method="ft_l, ε 1e-09", measure="ES")["mean"]
    for measure in ("ES", "PS", "NS"):
        assert where(table, method="ft", layer=3, measure=measure)["mean"].item() == pytest.approx(
            direct[measure]["mean"]
        )
    assert (unmoved == 0).all()
    assert direct["ES"]["mean"] == 100, "the control: without a bound the fact is written"


@pytest.mark.parametrize("text", ["0", "a", "-1,2", "inf"])
def test_bounds_that_are_no_positive_numbers_are_refused(text: str) -> None:
    assert finetune_grid.parse_bounds("1e-2,5e-5") == [5e-5, 1e-2]
    with pytest.raises(InputError, match="expected positive numbers"):
        finetune_grid.parse_bounds(text)


def test_a_token_that_a_prompt_lacks_leaves_its_record_out(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The subject at the prompt's end has no token after it: that token's row has the other record alone."""
    first, second = load_requests("tiny")[:2]
    ending = Fact(id="x", subject=first.subject, prompt="They speak of {}", object="x")
    records = [second, type(first)(id="ends", subject=ending.subject, prompt=ending.prompt, target_new="teal")]

    class Stub:
        requests, model, arguments = records, load_model("tiny"), argparse.Namespace(damping=0.0)

    scored: list[Any] = []

    def stub(experiment: Any, variant: Any, requests: Any, protocol: str) -> pd.DataFrame:
        scored.append([request.id for request in requests])
        return pd.DataFrame([{"measure": "S", "mean": 1.0, "low": 0.0, "high": 2.0, "n": len(requests)}])

    monkeypatch.setattr(rome_grid, "scored_alone", stub)
    assert rome_grid.scored(Stub(), "after", [2])["n"].tolist() == [1]  # type: ignore[arg-type]
    assert rome_grid.scored(Stub(), "last", [2])["n"].tolist() == [2]  # type: ignore[arg-type]
    assert scored == [[second.id], [second.id, "ends"]]
    assert "after: 1 records have no such token, and are left out" in capsys.readouterr().out
    Stub.requests = records[1:]
    with pytest.raises(InputError, match="none of the 1 prompts has a token 'after'"):
        rome_grid.scored(Stub(), "after", [2])  # type: ignore[arg-type]


def test_rome_writes_at_every_layer_of_the_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the second moments are singular, as at layer 0; the control: without damping it cannot."""
    command = ["--quick", "--count", "1", "--tokens-at", "subject_last", "--tokens", "20000", "--out", str(tmp_path)]
    with pytest.raises(InputError, match="not positive definite"):
        rome_grid.main([*command, "--layers", "0-1", "--damping", "0"])
    rome_grid.main(command)
    table = pd.read_parquet(tmp_path / "rome_grid.parquet")
    assert sorted(set(table["layer"])) == list(range(10))
    assert set(table["token"]) == {"subject_last"}


def test_every_layers_attributions_add_up_to_the_total_effect() -> None:
    """Completeness, Σᵢ aᵢ = P(o; h) − P(o; h*); with one point of the rule it does not hold."""
    model = load_model("tiny")
    fact = min(load_facts("known")[:40], key=lambda fact: len(fact.text))
    config = TraceConfig(kinds=("state",), samples=1, noise_std=3 * embedding_std(model, [fact.subject]))
    runs = run_clean_and_corrupted(model, [tokenize_fact(model, fact)], config.noise_std, config)
    total = float(runs.clean_scores["probability"][0] - runs.corrupted_scores["probability"][0])
    sums = integrated_gradients.attributions(model, fact, config, 24).sum(1)
    rough = integrated_gradients.attributions(model, fact, config, 1).sum(1)
    assert total > 0.2
    assert sums.shape == (model.n_layers,)
    np.testing.assert_allclose(sums, total, atol=0.01)
    assert np.abs(rough - total).max() > 0.05, "the control"


def test_the_last_layers_state_matters_at_the_last_token_alone() -> None:
    model = load_model("tiny")
    fact = load_facts("known")[0]
    config = TraceConfig(kinds=("state",), samples=1, noise_std=0.3)
    values = integrated_gradients.attributions(model, fact, config, 2)
    read = len(tokenize_fact(model, fact).ids) - len(tokenize_fact(model, fact).object_ids)
    assert np.abs(values[-1, :read]).max() == 0 < np.abs(values[-1, read:]).max()
    assert np.abs(values[0, :read]).max() > 0, "the control: in the first layer others do"


def test_the_facts_drawn_are_those_hurt_most() -> None:
    effects = pd.DataFrame({"fact": ["a", "b", "c"], "clean": [0.9, 0.9, 0.5], "corrupted": [0.5, 0.1, 0.4]})
    assert integrated_gradients.hurt_most(effects, 2) == ["b", "a"]
    with pytest.raises(InputError, match="--cases is 4, expected 1 to 3"):
        integrated_gradients.hurt_most(effects, 4)
    cells = effects.head(1).assign(layer=1, position=0)
    beside = integrated_gradients.beside_trace(torch.tensor([[0.1, 0.2], [0.3, 0.2]]).numpy(), cells)
    assert beside["attribution"].item() == pytest.approx(0.3)
    assert beside["missing"].item() == pytest.approx(0.1)
