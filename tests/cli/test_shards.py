"""`trace --shard I/N` and `edit --targets-only --shard I/N`, then `--merge`: the files of one process, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import call, complaint
from hypothesis import given
from hypothesis import strategies as st

import mechedit as me
import mechedit.targets.search
import mechedit.trace.trace
from mechedit.errors import InputError
from mechedit.shards import Rank, deal, pieces_of

TRACE = ["trace", "--max-facts", 5, "--samples", 1, "--roles", "subject_last,last", "--kinds", "state"]
TRACE += ["--memory", 0.0015]  # a fact at a time, so that there are several groups to deal out
EDIT = ["edit", "--layers", "3-4", "--set", "steps=3", "--set", "batch_size=2"]


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """One model for all commands, and no figures."""
    model = me.load_model("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mechedit.cli.options.load_quietly", lambda *arguments: model)
        patch.setattr("mechedit.cli.trace.refresh_figures", lambda folder: None)
        yield


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace by one process, and moments."""
    folder = tmp_path_factory.mktemp("at_once")
    assert call(*TRACE, "--out", folder) == 0
    (folder / "texts.txt").write_text("\n".join(me.load_texts("tiny")[:200]))
    assert call("moments", "--texts", folder / "texts.txt", "--layers", "3-4", "--out", folder) == 0
    requests = [
        {"id": request.id, "subject": request.subject, "prompt": request.prompt, "target_new": request.target_new}
        for request in me.load_requests("tiny")[:7]
    ]
    (folder / "requests.json").write_text(json.dumps(requests))
    return folder


def test_a_trace_of_shards_is_that_of_one_process(at_once: Path, tmp_path: Path, capsys: Any) -> None:
    """Of two; below, of three."""
    parts, count = [], 2
    for index in reversed(range(count)):
        assert call(*TRACE, "--shard", f"{index}/{count}", "--out", tmp_path) == 0
        parts.append(len(list((tmp_path / "trace_parts").glob("*.parquet"))))
        assert not (tmp_path / "effects.parquet").exists()
    assert parts[0] < parts[-1], "every shard traces groups of its own"
    capsys.readouterr()
    assert call("trace", "--merge", "--out", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["facts"] == 5
    for name in ("effects.parquet", "facts.parquet", "config.json"):
        assert (tmp_path / name).read_bytes() == (at_once / name).read_bytes(), name
    assert not (tmp_path / "trace_parts").exists()
    # The control: merged files are files like any other, which the plain command takes, and another sample is not.
    assert call(*TRACE, "--out", tmp_path) == 0
    assert call(*TRACE, "--seed", 1, "--out", tmp_path) == 2


def test_an_approximate_trace_of_shards_is_held_against_the_exact_one(tmp_path: Path, capsys: Any) -> None:
    approximate = [*TRACE, "--approximate", "--exact-cells", 20, "--exact-facts", 2, "--points", 1]
    once, shards = [*approximate, "--least-correlation", 0], [*approximate, "--least-correlation", 0]
    assert call(*once, "--out", tmp_path / "once") == 0
    for index in range(2):
        assert call(*shards, "--shard", f"{index}/2", "--out", tmp_path / "shards") == 0
    (record,) = (tmp_path / "shards" / "trace_parts").glob("shard_0_of_2.json")
    strict = json.loads(record.read_text())
    assert call("trace", "--merge", "--out", tmp_path / "shards") == 0
    for name in ("effects.parquet", "facts.parquet", "config.json"):
        assert (tmp_path / "shards" / name).read_bytes() == (tmp_path / "once" / name).read_bytes(), name
    assert strict["content"]["attrs"]["config"]["approximation"]["exact_facts"] == 2


def test_a_killed_shard_goes_on_after_its_finished_groups(
    at_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[int] = []
    plain = mechedit.trace.trace.trace_group

    def interrupted(model: Any, group: Any, *rest: Any) -> Any:
        if len(traced) == 1:
            raise KeyboardInterrupt
        traced.append(len(group))
        return plain(model, group, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(mechedit.trace.trace, "trace_group", interrupted)
        assert call(*TRACE, "--shard", "0/2", "--out", tmp_path) == 130
    assert len(list((tmp_path / "trace_parts").glob("*.parquet"))) == 1
    # Another number of shards takes what is finished, and three give what two do.
    for index in range(3):
        assert call(*TRACE, "--shard", f"{index}/3", "--out", tmp_path) == 0
    assert call("trace", "--merge", "--out", tmp_path) == 0
    assert (tmp_path / "effects.parquet").read_bytes() == (at_once / "effects.parquet").read_bytes()


def test_shards_of_a_trace_that_do_not_make_up_one(tmp_path: Path, capsys: Any) -> None:
    out = ["--out", tmp_path]

    def shard(name: str, *options: object) -> None:
        assert call(*TRACE, *options, "--shard", name, *out) == 0
        capsys.readouterr()

    assert "there is no folder" in complaint(capsys, "trace", "--merge", "--out", tmp_path / "absent")
    assert "holds no finished shards" in complaint(capsys, "trace", "--merge", *out)
    shard("0/2")
    assert "the shard 1/2 is missing" in complaint(capsys, "trace", "--merge", *out)
    shard("1/3")
    assert "shards of [2, 3] processes" in complaint(capsys, "trace", "--merge", *out)
    (tmp_path / "trace_parts" / "shard_1_of_3.json").unlink()
    assert "settings.window = None, expected 3" in complaint(capsys, *TRACE, "--window", 3, "--shard", "0/2", *out)
    shard("1/2", "--window", 3)
    assert "was made with settings.window = 3, expected None" in complaint(capsys, "trace", "--merge", *out)
    shard("1/2", "--overwrite")
    record = json.loads((tmp_path / "trace_parts" / "shard_0_of_2.json").read_text())
    (tmp_path / "trace_parts" / record["content"]["parts"][0][0]).unlink()
    assert "is missing, which a finished shard wrote" in complaint(capsys, "trace", "--merge", *out)
    assert "shard is 0/99, expected at most" in complaint(capsys, *TRACE, "--shard", "0/99", *out)
    assert "shard is 2/2, expected one of" in complaint(capsys, *TRACE, "--shard", "2/2", *out)
    assert "leave" in complaint(capsys, *TRACE, "--shard", "0/2", "--until-settled", *out)
    assert "leave" in complaint(capsys, "trace", "--shard", "0/2", "--merge", *out)
    assert not (tmp_path / "effects.parquet").exists()
    assert not (tmp_path / "config.json").exists()


def edit(folder: Path, targets: Path, *options: object) -> list[object]:
    """An edit whose targets lie in a folder of their own, by the moments of another."""
    if not (targets / "moments").exists():
        targets.mkdir(exist_ok=True)
        (targets / "moments").symlink_to(folder / "moments")
    paths = ["--requests", folder / "requests.json", "--moments", targets, "--out", targets / "edit.safetensors"]
    return [*EDIT, *paths, *options]


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the facts that are searched for."""
    ids: list[str] = []
    plain = mechedit.targets.search.search_groups

    def counted(model: Any, groups: Sequence[Any], *rest: Any) -> Any:
        ids.extend(request.id for group in groups for request in group)
        return plain(model, groups, *rest)

    monkeypatch.setattr(mechedit.targets.search, "search_groups", counted)
    return ids


@pytest.mark.parametrize("count", [2, 3])
def test_an_edit_of_shards_is_that_of_one_process(
    count: int, at_once: Path, tmp_path: Path, searched: list[str]
) -> None:
    once, shards = tmp_path / "once", tmp_path / "shards"
    assert call(*edit(at_once, once)) == 0
    all_ids = sorted(searched)
    assert len(all_ids) == 7
    searched.clear()
    for index in reversed(range(count)):
        before = len(searched)
        assert call(*edit(at_once, shards, "--targets-only", "--shard", f"{index}/{count}")) == 0
        assert 0 < len(searched) - before < 7
        assert not (shards / "edit.safetensors").exists()
    assert sorted(searched) == all_ids, "each fact is searched for once"
    assert call(*edit(at_once, shards, "--merge")) == 0
    assert sorted(searched) == all_ids, "the merge searches for none"
    assert (shards / "edit.safetensors").read_bytes() == (once / "edit.safetensors").read_bytes()
    assert not list((shards / "targets").glob("shard_*"))


def test_targets_alone_are_those_of_the_edit(at_once: Path, tmp_path: Path, searched: list[str]) -> None:
    assert call(*edit(at_once, tmp_path, "--targets-only")) == 0
    assert len(searched) == 7
    assert not (tmp_path / "edit.safetensors").exists()
    assert call(*edit(at_once, tmp_path)) == 0
    assert len(searched) == 7


def test_shards_of_targets_that_do_not_make_up_an_edit(at_once: Path, tmp_path: Path, capsys: Any) -> None:
    def refused(*options: object) -> str:
        return complaint(capsys, *edit(at_once, tmp_path, *options))

    def shard(name: str, *options: object) -> None:
        assert call(*edit(at_once, tmp_path, "--targets-only", "--shard", name, *options)) == 0
        capsys.readouterr()

    assert "holds no finished shards" in refused("--merge")
    shard("0/2")
    assert "the shard 1/2 is missing" in refused("--merge")
    shard("1/2", "--set", "clamp=0.5")
    assert "settings.clamp = 0.5, expected 2.0" in refused("--merge")
    assert "settings.clamp = 0.5, expected 2.0" in refused("--targets-only", "--shard", "1/2")
    shard("1/2", "--overwrite")
    shard("1/3")
    assert "shards of [2, 3] processes" in refused("--merge")
    (tmp_path / "targets" / "shard_1_of_3.json").unlink()
    assert "settings.clamp = 2.0, expected 0.5" in refused("--merge", "--set", "clamp=0.5")
    next((tmp_path / "targets").glob("*.safetensors")).unlink()
    assert "though all shards are finished" in refused("--merge")
    assert "shard is 0/9, expected at most 4" in refused("--targets-only", "--shard", "0/9")
    assert "expected --targets-only with it" in refused("--shard", "0/2")
    assert "leave one of them out" in refused("--targets-only", "--merge")
    assert "keeps no targets" in refused("--targets-only", "--method", "rome", "--layers", "3")
    assert not (tmp_path / "edit.safetensors").exists()


@given(costs=st.lists(st.floats(0, 1e6), max_size=40), count=st.integers(1, 9))
def test_work_is_dealt_out_once_and_about_equally(costs: list[float], count: int) -> None:
    owners = deal(costs, count)
    assert len(owners) == len(costs)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == index) for index in range(count)]
    # Graham's bound: the last piece that a process took went to who had least.
    assert max(loads) <= sum(costs) / count + max(costs, default=0) + 1e-6
    assert owners == deal(costs, count), "all processes deal alike"


def test_more_shards_than_pieces_are_refused() -> None:
    assert [pieces_of([3, 1, 2], Rank(index, 3), "pieces") for index in range(3)] == [[0], [2], [1]]
    with pytest.raises(InputError, match="expected at most 3 shards, as many as there are pieces"):
        pieces_of([3, 1, 2], Rank(0, 4), "pieces")
