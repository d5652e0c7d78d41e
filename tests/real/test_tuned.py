"""Tuned settings beside untuned ones: on whom they are judged, and by how much the one is better."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechedit as me
from analyses.real_models.tuned import choices, gain, main, other_requests
from mechedit.errors import InputError
from mechedit.files import read_json
from mechedit.methods import write_tuned
from mechedit.statistics import harmonic_mean

TUNED = {"layers": [1, 2], "settings": {"steps": 1, "clamp": 3.0}, "trials": []}


def request(subject: str, prompt: str, relation: str | None = None) -> me.EditRequest:
    return me.EditRequest(
        id=f"{subject} {prompt}", subject=subject, prompt=prompt, target_new="a", target_true="b", relation=relation
    )


def test_nobody_judges_about_whom_or_in_whose_words_was_tuned() -> None:
    born, work, live = "{} was born in", "{} works in", "{} lives in"
    used = [request("Ada", born, "P19"), request("Bo", born, "P19")]
    fine = [request("Cy", work), request("Di", live, "P551")]
    refused = [request("Ada", work), request("Eve", born), request("Fay", live, "P19")]
    without = replace(request("Gus", work), target_true=None)
    ids = [entry.id for entry in used]
    chosen = other_requests([*used, *refused, *fine, without], ids, 2, seed=0)
    assert sorted(entry.subject for entry in chosen) == ["Cy", "Di"]
    with pytest.raises(
        InputError,
        match="there are 2 requests of other relations, about other subjects",
    ):
        other_requests([*used, *refused, *fine], ids, 3, seed=0)
    with pytest.raises(InputError, match="1 of the 2 requests that were tuned with are not there, such as 'Bo was"):
        other_requests([used[0], *fine], [used[0].id, "Bo was born in"], 1, seed=0)
    with pytest.raises(InputError, match="--facts is -1, expected at least 1"):
        other_requests([*used, *fine], ids, -1, seed=0)


def test_layers_with_a_gap_are_refused_before_anything_is_read() -> None:
    with pytest.raises(InputError, match="--layers is 3,5, expected layers that follow each other"):
        main(["no such model", "--tuned", "no such file", "--layers", "3,5", "--moments", "nowhere"])


def test_the_gain_is_the_difference_of_the_scores() -> None:
    numbers = np.random.default_rng(0)
    good, bad = (100.0 * (numbers.random((200, 3)) < chance) for chance in (0.9, 0.6))
    better = gain(good, bad)
    expected = harmonic_mean(good.mean(axis=0)[None])[0] - harmonic_mean(bad.mean(axis=0)[None])[0]
    assert better["gain"] == pytest.approx(expected)
    assert 20 < better["low"] < better["gain"] < better["high"] < 40
    assert gain(bad, good)["high"] < 0
    assert gain(good, good) == {"gain": 0.0, "low": 0.0, "high": 0.0}, "the same requests are drawn for both"


def test_both_are_edited_and_scored_and_a_second_call_edits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = me.load_model("tiny", device="cpu")
    requests = me.load_requests("tiny")
    write_tuned(tmp_path / "tuned.json", model, "memit", {**TUNED, "requests": [requests[0].id]})
    me.collect_moments(model, "tiny", [1, 2, 3], me.MomentsConfig(tokens=2_000), tmp_path / "moments")
    tried = choices(model, tmp_path / "tuned.json", [3])
    assert [choice.layers for choice in tried.values()] == [(3,), (1, 2), (1, 2)]
    assert [choice.config.steps for choice in tried.values()] == [25, 25, 1]
    command: list[Any] = ["tiny", "--tuned", tmp_path / "tuned.json", "--layers", "3", "--requests", "tiny"]
    command += ["--moments", tmp_path / "moments", "--out", tmp_path / "out", "--facts", "2"]
    main(list(map(str, command)))
    printed = capsys.readouterr().out
    rows = read_json(tmp_path / "out" / "gains.json")["rows"]
    assert [row["layers"] for row in rows] == ["3–3", "1–2", "1–2"]
    assert rows[0]["gain"] == 0.0
    assert rows[2]["ES"] <= rows[1]["ES"], "one step of the search installs less"

    def edits_nothing(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("mechedit.sweep.sweep.find_targets", edits_nothing, raising=False)
    main(list(map(str, command)))
    assert capsys.readouterr().out == printed
