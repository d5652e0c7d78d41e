"""What a choice of layers costs on planted models: who is traced, swept and judged, and how models are summed up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analyses.planted_truth.make import PLANS, draw_entries
from analyses.planted_truth.regret import LOST, by_rule, inputs
from analyses.tiny_model.records import make_facts


def test_those_who_judge_chose_nothing_and_their_neighbors_are_not_edited(tmp_path: Path) -> None:
    plan = PLANS[0]
    entries = draw_entries(plan.seed)
    facts = tmp_path / "all.jsonl"
    facts.write_text("\n".join(json.dumps(fact) for fact in make_facts(entries, plan.seed)), encoding="utf-8")
    inputs(plan, entries, facts, tmp_path)
    traced = {json.loads(line)["subject"] for line in (tmp_path / "facts.jsonl").read_text().splitlines()}
    records = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("sweep", "judges")}
    edited = {name: {record["requested_rewrite"]["subject"] for record in rows} for name, rows in records.items()}
    assert len(traced) == 20
    assert not traced & edited["sweep"]
    assert not (traced | edited["sweep"]) & edited["judges"]
    for name, rows in records.items():
        assert len(rows) > 50
        assert [record["case_id"] for record in rows] == list(range(len(rows)))
        for record in rows:
            assert record["neighborhood_prompts"]
            assert not [p for p in record["neighborhood_prompts"] for subject in edited[name] if p.startswith(subject)]


def test_rules_are_summed_up_over_the_models_on_which_they_can_be_edited() -> None:
    row = {"S": 90.0, "regret": 0.0, "stability": 1.0, "agreement": None}
    frames = {
        "a": pd.DataFrame([{"rule": "x", **row}, {"rule": "best of the screening, 1", **row}]),
        "b": pd.DataFrame([{"rule": "x", **row, "S": 70.0, "regret": LOST + 1, "stability": 0.5}]),
        "c": pd.DataFrame([{"rule": "x", "layers": "none"}, {"rule": "y", **row}]),
    }
    table = by_rule(frames).set_index("rule")
    assert list(table.index) == ["x", "y"]
    assert table.loc["x", ["models", "good"]].tolist() == [2, 1]
    assert table.loc["x", ["S", "regret", "worst", "stability"]].tolist() == pytest.approx([80, 2, LOST + 1, 0.75])
    assert np.isnan(table.loc["x", "agreement"])
