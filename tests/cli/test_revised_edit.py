"""An edit without some of its facts, or with others: the one that would have been made, from the known targets."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import call, complaint

import mechedit as me
import mechedit.targets.search
from mechedit.errors import InputError

FACTS = [
    {"id": request.id, "subject": request.subject, "prompt": request.prompt, "target_new": request.target_new}
    for request in me.load_requests("tiny")[:3]
]
SHARED = {**FACTS[1], "id": "shared", "prompt": "{} has the color", "target_new": "teal"}

TEXTS = me.load_texts("tiny")[:200]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moments of one layer, and files of requests, two of which share their subject."""
    path = tmp_path_factory.mktemp("revised")
    (path / "texts.txt").write_text("\n".join(TEXTS))
    assert call("moments", "--texts", path / "texts.txt", "--layers", "3-4", "--out", path) == 0
    return path


@pytest.fixture
def edit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[me.Edit, list[str]]]:
    """Makes an edit from the command line; returns it, and the ids of the facts that were searched for."""

    def make(requests: list[dict[str, Any]], *options: object) -> tuple[me.Edit, list[str]]:
        (folder / "requests.json").write_text(json.dumps(requests))
        searched: list[str] = []
        search = mechedit.targets.search.search_groups

        def counted(model: Any, groups: Any, *rest: Any) -> Any:
            searched.extend(request.id for group in groups for request in group)
            return search(model, groups, *rest)

        monkeypatch.setattr(mechedit.targets.search, "search_groups", counted)
        out = folder / "edit.safetensors"
        common = ["--requests", folder / "requests.json", "--moments", folder, "--layers", "3-4", "--out", out]
        settings = ["--set", "steps=3", "--set", "relative_covariance_weight=0.1", "--set", "covariance_weight=none"]
        assert call("edit", *common, *settings, "--overwrite", *options) == 0
        monkeypatch.setattr(mechedit.targets.search, "search_groups", search)
        return me.Edit.load(out), searched

    return make


def same(one: me.Edit, two: me.Edit) -> bool:
    return one.layers == two.layers and all(torch.equal(one.delta(layer), two.delta(layer)) for layer in one.layers)


def test_without_a_fact_it_is_the_edit_of_the_others(edit: Any) -> None:
    whole, searched = edit(FACTS)
    assert len(searched) in (0, 3), "found here, or by a test before"
    names = whole.manifest["requests"]
    revoked, searched = edit(FACTS, "--without", names[0])
    assert searched == []
    anew, _ = edit(FACTS[1:])
    assert same(revoked, anew)
    assert revoked.manifest["requests"] == names[1:]
    # λ follows the facts that are left, and so do the updates of those.
    assert not same(revoked, whole)


def test_who_shared_a_subject_with_it_is_searched_for_again_and_named(edit: Any, capsys: Any) -> None:
    requests = [*FACTS, SHARED]
    whole, _ = edit(requests)
    names = whole.manifest["requests"]
    capsys.readouterr()
    revoked, searched = edit(requests, "--without", names[3])
    said = "".join(capsys.readouterr())
    said_of = SHARED["prompt"].replace("{}", SHARED["subject"])[:30]
    assert f"requests left out: 1 ({names[3]}: {said_of}" in said
    assert "; added: 0; in all: 3" in said
    assert f"searched for again, since they share a subject with one of those: {names[1]}" in said
    # Its own target was found where this file's facts were written without the other; else just it is searched for.
    assert searched in ([], [names[1]])
    assert same(revoked, edit(FACTS)[0])


def test_with_further_facts_only_those_are_searched_for(edit: Any, folder: Path) -> None:
    edit(FACTS[:2])
    more = {**FACTS[2], "target_new": FACTS[2]["target_new"]}
    (folder / "more.json").write_text(json.dumps([more]))
    extended, searched = edit(FACTS[:2], "--with", folder / "more.json", "--set", "clamp=0.6")
    assert len(searched) == 3, "other settings, so that nothing is known"
    assert same(extended, edit(FACTS, "--set", "clamp=0.6")[0])
    _, searched = edit(FACTS[:2], "--with", folder / "more.json", "--set", "clamp=0.6")
    assert searched == []


@pytest.mark.parametrize(
    ("left_out", "message"),
    [("nonesuch", "no request has the id 'nonesuch', expected ids of the 3 requests"), ("*", "all 3 requests are")],
)
def test_ids_that_cannot_be_left_out(edit: Any, folder: Path, capsys: Any, left_out: str, message: str) -> None:
    whole, _ = edit(FACTS)
    named = ",".join(whole.manifest["requests"]) if left_out == "*" else left_out
    before = (folder / "edit.safetensors").read_bytes()
    arguments = ["--requests", folder / "requests.json", "--moments", folder, "--layers", "3-4", "--overwrite"]
    assert message in complaint(capsys, "edit", *arguments, "--without", named, "--out", folder / "edit.safetensors")
    assert (folder / "edit.safetensors").read_bytes() == before


def test_an_edit_in_memory_is_made_without_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = me.load_model("tiny"), me.load_requests("tiny")[:4]
    moments = {layer: moment.matrix for layer, moment in me.collect_moments(model, TEXTS, [3, 4]).items()}
    config = me.MemitConfig(steps=3, batch_size=2)
    whole = me.memit(model, requests, [3, 4], moments, config=config, cache=tmp_path)

    def no_search(*arguments: Any) -> None:
        raise AssertionError("no search may run")

    monkeypatch.setattr(mechedit.targets.search, "search_groups", no_search)
    revoked = whole.without(requests[1].id)
    remaining = [requests[0], *requests[2:]]
    anew = me.memit(model, remaining, [3, 4], moments, config=config, cache=tmp_path)
    assert same(revoked, anew)
    assert revoked.manifest == anew.manifest
    assert not same(revoked, whole)
    # It can be revoked further; the order in which it is does not matter.
    twice = revoked.without([requests[3].id])
    assert same(twice, whole.without([requests[3].id, requests[1].id]))
    assert twice.manifest["requests"] == [requests[0].id, requests[2].id]
    with pytest.raises(InputError, match="no request has the id"):
        revoked.without(requests[1].id)
    whole.save(tmp_path / "edit.safetensors")
    for copy in (me.Edit.load(tmp_path / "edit.safetensors"), pickle.loads(pickle.dumps(whole))):
        assert same(copy, whole)
        with pytest.raises(InputError, match="does not know how it was made"):
            copy.without(requests[1].id)
    with me.edited(model, whole), pytest.raises(InputError, match="undo other edits first"):
        whole.without(requests[1].id)
    monkeypatch.undo()
    unkept = me.memit(model, requests, [3, 4], moments, config=config)
    with pytest.raises(InputError, match="the targets of the edit were not kept"):
        unkept.without(requests[1].id)
    by_rome = me.rome(model, requests[:2], [4], moments, config=me.RomeConfig(steps=2), cache=tmp_path)
    with pytest.raises(InputError, match="its method rome finds each fact's on the model as edited so far"):
        by_rome.without(requests[1].id)


def test_in_memory_too_those_who_shared_a_subject_are_named(tmp_path: Path) -> None:
    model, requests = me.load_model("tiny"), me.load_requests("tiny")[:3]
    of_color = {"id": "shared", "prompt": "{} has the color", "target_new": "teal", "relation": "color"}
    requests.append(dataclasses.replace(requests[1], **of_color))
    moments = {layer: moment.matrix for layer, moment in me.collect_moments(model, TEXTS, [4]).items()}
    whole = me.memit(model, requests, [4], moments, config=me.MemitConfig(steps=2), cache=tmp_path)
    with pytest.warns(UserWarning, match=f"since they share a subject with those: {requests[1].id}$"):
        revoked = whole.without("shared")
    anew = me.memit(model, requests[:3], [4], moments, config=me.MemitConfig(steps=2), cache=tmp_path)
    assert same(revoked, anew)
