"""Tracing until the selection settles: it stops when it may, says so when it cannot, and goes on to the letter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import mechedit.trace.trace as trace_module
from mechedit import Corruption, Fact, InputError, TraceConfig, load_facts, load_model, pipeline, select_layers
from mechedit.run_folder import RunFolder
from mechedit.selection import SelectConfig
from mechedit.tables import read_table
from mechedit.trace import UntilSettled, Verdict, trace_until_settled

CONFIG = TraceConfig(kinds=("state",), sever=("nothing", "mlp"), samples=1, roles=("subject_last",), seed=3)
UNTIL = UntilSettled(first_facts=10)
SELECT = SelectConfig(resamples=200, overlap=0.7)
"""Three of the tiny model's four layers overlap them by three quarters."""
UNKNOWN = [Fact(id=f"no{i}", subject="Paris", prompt="{} goes with the color", object="Tuesday") for i in range(7)]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_model("tiny")


@pytest.fixture(scope="module")
def facts() -> list[Fact]:
    return load_facts("known")[:24]


def never(effects: pd.DataFrame) -> Verdict:
    return Verdict(settled=False, record={})


def test_it_stops_once_the_selection_is_settled(tiny: Any, facts: list[Fact], tmp_path: Path) -> None:
    lines: list[str] = []
    folder = RunFolder.at(tmp_path)
    traced = pipeline.trace_until_settled_step(folder, tiny, facts, CONFIG, UNTIL, SELECT, lines.append)
    assert traced["stopped"] == "settled"
    assert traced["n_facts"] < len(facts), "the control: there were more"
    *before, last = traced["rounds"]
    assert (last["state"], last["agreement"] >= 0.8) == ("settled", True)
    assert all(record["state"] != "settled" for record in before)
    assert "% of resamples agree" in lines[-1]
    assert "give just these layers" in lines[-1]
    selection = pipeline.select_step(folder, SELECT)
    assert (list(selection.layers), selection.n_facts) == (last["layers"], traced["n_facts"])
    table = read_table(tmp_path / "facts.parquet")
    assert table["traced"].sum() == traced["n_facts"]
    assert set(table[~table["traced"]]["reason"]) == {
        "it was not traced, because the facts before it were enough or took the whole budget"
    }
    assert list(table["id"]) == [fact.id for fact in facts], "in the order of the file"
    again = pipeline.trace_until_settled_step(folder, tiny, facts, CONFIG, UNTIL, SELECT, lines.append)
    assert again["rounds"] == traced["rounds"], "a finished trace is read"


def permuted(effects: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """The effects with each fact's layers in an order of its own, the same for all kinds and severings."""
    generator, attrs = np.random.default_rng(seed), effects.attrs
    layers = np.sort(effects["layer"].unique())
    orders = {fact: generator.permutation(layers) for fact in effects["fact"].unique()}
    moved = [orders[fact][layer] for fact, layer in zip(effects["fact"], effects["layer"], strict=True)]
    shuffled = effects.assign(layer=moved)
    shuffled.attrs = attrs
    return shuffled


def test_effects_permuted_over_layers_are_unsettled(tiny: Any, facts: list[Fact], tmp_path: Path) -> None:
    states: list[tuple[str, str]] = []

    def judge(effects: pd.DataFrame) -> Verdict:
        selections = [select_layers(frame, config=SELECT) for frame in (effects, permuted(effects))]
        states.append((selections[0].state, selections[1].state))
        return Verdict(settled=selections[1].state == "settled", record={})

    traced = trace_until_settled(tiny, facts[:18], CONFIG, UNTIL, judge, tmp_path, least=10)
    assert traced["stopped"] == "facts"
    assert all(state != "settled" for _, state in states)
    assert states[-1][0] == "settled", "the control: in their order they are"


def test_rounds_trace_what_one_trace_does(tiny: Any, facts: list[Fact], tmp_path: Path) -> None:
    traced = trace_until_settled(tiny, facts[:18], CONFIG, UNTIL, never, tmp_path / "rounds", least=10)
    assert traced["stopped"] == "facts"
    assert [record["facts"] for record in traced["rounds"]] == [10, 15, 18]
    (tmp_path / "once").mkdir()
    pipeline.trace_step(RunFolder.at(tmp_path / "once"), tiny, facts[:18], CONFIG)
    columns = ["fact", "kind", "sever", "layer", "position"]
    tables = [
        read_table(tmp_path / name / "effects.parquet").sort_values(columns, ignore_index=True)
        for name in ("rounds", "once")
    ]
    pd.testing.assert_frame_equal(*tables, atol=1e-5, check_exact=False)
    assert not (tmp_path / "once" / "trace_parts").exists()


def test_the_order_is_random_and_seeded(tiny: Any, facts: list[Fact], tmp_path: Path) -> None:
    def first_facts(seed: int) -> list[str]:
        seen: list[str] = []

        def judge(effects: pd.DataFrame) -> Verdict:
            seen.extend(effects["fact"].unique())
            return Verdict(settled=True, record={})

        config = TraceConfig(**{**vars(CONFIG), "seed": seed})
        until = UntilSettled(first_facts=2)
        trace_until_settled(tiny, facts[:10], config, until, judge, tmp_path / f"{seed}", least=1)
        shutil.rmtree(tmp_path / f"{seed}")
        return sorted(seen)

    assert first_facts(1) == first_facts(1)
    assert first_facts(1) != first_facts(2)
    assert first_facts(1) != sorted(fact.id for fact in facts[:2])


def test_an_interrupted_trace_goes_on_and_gives_the_same(
    tiny: Any, facts: list[Fact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = trace_until_settled(tiny, facts[:12], CONFIG, UNTIL, never, tmp_path / "whole", least=10)
    groups: list[int] = []
    trace_group = trace_module.trace_group

    def interrupted(*arguments: Any) -> Any:
        groups.append(1)
        if len(groups) == 4:
            raise KeyboardInterrupt
        return trace_group(*arguments)

    monkeypatch.setattr(trace_module, "trace_group", interrupted)
    arguments = (tiny, facts[:12], CONFIG, UNTIL, never, tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        trace_until_settled(*arguments, least=10)
    assert not (tmp_path / "resumed" / "effects.parquet").exists()
    resumed = trace_until_settled(*arguments, least=10)
    assert resumed == whole
    tables = [read_table(tmp_path / name / "effects.parquet") for name in ("whole", "resumed")]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_minutes_end_it(tiny: Any, facts: list[Fact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    times = map(float, range(0, 100_000, 40))
    monkeypatch.setattr("mechedit.trace.until_settled.monotonic", lambda: next(times))
    until = UntilSettled(first_facts=10, minutes=2, growth=1.2)
    traced = trace_until_settled(tiny, facts, CONFIG, until, never, tmp_path, least=10)
    assert traced["stopped"] == "minutes"
    assert len(traced["rounds"]) == 2, "80 seconds after the first round, 160 after the second"


def test_too_few_known_facts_are_refused_with_what_the_model_says(tiny: Any, facts: list[Fact], tmp_path: Path) -> None:
    message = (
        r"3 of the 10 facts can be traced, expected at least 10 .*"
        r"('no\d': the model says '[^']*', not 'Tuesday'; ){4}'no\d': [^;]*; …\)"
    )
    mixed = [*UNKNOWN, *facts[:3]]
    with pytest.raises(InputError, match=message):
        trace_until_settled(tiny, mixed, CONFIG, UNTIL, never, tmp_path, least=10)
    assert not list(tmp_path.rglob("*.parquet"))
    with pytest.raises(InputError, match=message):
        pipeline.trace_step(RunFolder.at(tmp_path), tiny, mixed, CONFIG, least=10)
    assert pipeline.trace_step(RunFolder.at(tmp_path), tiny, mixed, CONFIG)["n_facts"] == 3, "the control"


def test_what_needs_all_facts_at_once_is_refused(tiny: Any, facts: list[Fact], tmp_path: Path) -> None:
    config = TraceConfig(corruption=Corruption(distribution="tokens"))
    with pytest.raises(InputError, match="looks at all facts at once"):
        trace_until_settled(tiny, facts, config, UNTIL, never, tmp_path, least=10)
    for bad in ({"first_facts": 1}, {"growth": 1.0}, {"minutes": 0}):
        with pytest.raises(InputError, match=next(iter(bad))):
            UntilSettled(**bad)
