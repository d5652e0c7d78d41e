"""MEND's editor for a pretrained model: what it is scored on, it was not trained on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

import mechedit as me
from analyses.real_models.mend import divided, kinds, main
from mechedit.data import EditRequest, Neighbor
from mechedit.errors import InputError
from mechedit.files import write_json
from mechedit.methods import MendEditor

TONGUE, TOWN, SPORT = "The mother tongue of {} is", "{} lives in", "{} plays"


def request(subject: str, prompt: str, old: str, new: str) -> EditRequest:
    neighbor = Neighbor(prompt=prompt.format("Apple"), object=old)
    return EditRequest(
        id=f"{subject} {prompt}", subject=subject, prompt=prompt, target_new=new, target_true=old,
        paraphrases=(f"They say that {prompt.format(subject)}",), neighbors=(neighbor,),
    )  # fmt: skip


REQUESTS = [
    request("Ada", TONGUE, "French", "Korean"),
    request("Bo", TONGUE, "English", "French"),
    request("Cy", TONGUE, "Korean", "English"),
    request("Di", TOWN, "Paris", "Seattle"),
    request("Ada", TOWN, "Seattle", "Paris"),
    request("Eve", SPORT, "basketball", "guitar"),
]


def test_relations_are_told_apart_by_chains_of_objects() -> None:
    """Each kind is what a naive closure over common objects reaches."""

    def reached(start: EditRequest) -> set[str]:
        objects = {start.target_true, start.target_new}
        while (
            more := {
                value
                for entry in REQUESTS
                if objects & {entry.target_true, entry.target_new}
                for value in (entry.target_true, entry.target_new)
            }
            - objects
        ):
            objects |= more
        return {str(value) for value in objects}

    found = kinds(REQUESTS)
    assert found == [0, 0, 0, 1, 1, 2]
    for first, kind in zip(REQUESTS, found, strict=True):
        for second, other in zip(REQUESTS, found, strict=True):
            assert (second.target_new in reached(first)) == (kind == other)
    joining = request("Gus", TONGUE, "Paris", "French")
    assert kinds([*REQUESTS, joining]) == [0, 0, 0, 0, 0, 1, 0], "the control: one chain more, one kind fewer"


def test_nothing_that_is_scored_was_trained_with() -> None:
    scored = [request("Bo", TOWN, "Paris", "Seattle")]
    trained, unseen = divided(REQUESTS, scored, 10)
    assert [entry.subject for entry in trained] == ["Ada", "Cy"]
    assert {entry.subject for entry in unseen} == {"Di", "Eve"}, "Ada was trained with, in another relation"
    assert divided(REQUESTS, scored, 1)[1] == [entry for entry in unseen if entry in divided(REQUESTS, scored, 1)[1]]


def test_an_editor_is_trained_and_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make_model: Any
) -> None:
    model = make_model("gpt2", initializer_range=0.05)
    monkeypatch.setattr(me, "load_model", lambda name, device: model)
    for name, requests in (("requests", REQUESTS), ("scored", [request("Bo", TOWN, "Paris", "Seattle")])):
        write_json(tmp_path / f"{name}.json", [entry.plain() for entry in requests])
    write_json(tmp_path / "texts.jsonl", {"text": "LeBron James plays the sport of basketball in Seattle."})
    main([
        "folder", "--requests", str(tmp_path / "requests.json"), "--scored", str(tmp_path / "scored.json"),
        "--texts", str(tmp_path / "texts.jsonl"), "--steps", "2", "--rank", "4", "--out", str(tmp_path / "out"),
    ])  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "out" / "mend_scores.csv").open()))
    assert [(row["relations"], row["requests"]) for row in rows] == [("all", "3"), ("scored", "1"), ("unseen", "2")]
    assert all(0 <= float(row[name]) <= 100 for row in rows for name in ("ES", "PS", "NS", "exact_match"))
    curve = list(csv.DictReader((tmp_path / "out" / "mend.csv").open()))
    assert [row["step"] for row in curve] == ["0", "2"]
    editor = MendEditor.load(tmp_path / "out" / "mend.safetensors")
    assert editor.layers == tuple(range(model.n_layers - 3, model.n_layers))
    assert "2 requests are of unseen relations, of 100" in capsys.readouterr().out


def test_what_cannot_be_scored_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    write_json(tmp_path / "requests.json", [entry.plain() for entry in REQUESTS])
    write_json(tmp_path / "scored.json", [{**REQUESTS[0].plain(), "target_true": None}])
    files = [str(tmp_path / f"{name}.json") for name in ("requests", "scored")]
    command = ["no such model", "--requests", files[0], "--scored", files[1]]
    with pytest.raises(InputError, match="has a true object"):
        main(command)
    with pytest.raises(InputError, match="--count is -1, expected at least 0"):
        main([*command, "--count", "-1"])
