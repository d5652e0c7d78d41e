"""Killed at any moment, collecting goes on to the same bits; shards of several processes add up to the sum of one."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import limited_memory
from helpers.zygote import Zygote
from hypothesis import given, settings
from hypothesis import strategies as st

import mechedit as me
from mechedit.cli import main
from mechedit.errors import InputError
from mechedit.files import read_header
from mechedit.moments import Convergence, MomentsConfig, collect_moments, collect_shard, load_moments, merge_moments
from mechedit.moments.checkpoints import checkpoint_path, checkpoints_folder
from mechedit.moments.chunks import TextPosition, batches, read_chunks
from mechedit.moments.key_reader import KeyReader
from mechedit.moments.second_moment import moment_path
from mechedit.shards import Rank, ShardRecords

TEXTS = [
    "The mother tongue of Leon Blum is French, and that of Go Hyeon-jeong is Korean.",
    "Seattle",
    "Apple A5 was created by Apple.<|endoftext|>Windows Media Player was created by Microsoft.",
    "The Space Needle is in downtown Seattle; LeBron James plays the sport of basketball in town.",
    "",
    "Toko Yasuda plays the instrument guitar, while Miles Davis plays the trumpet.",
    "Edwin of Northumbria's religious values strongly emphasize Christianity.",
]
LAYERS = [0, 2]
OFTEN = MomentsConfig(batch_tokens=40, checkpoint_seconds=0)
"""A checkpoint after each batch."""


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, and checkpoints whatever they cost."""
    monkeypatch.setattr("mechedit.moments.chunks.CHUNK_SIZE", 3)
    monkeypatch.setattr("mechedit.moments.text_pass.CHUNK_SIZE", 3)
    monkeypatch.setattr("mechedit.moments.moments_folder.CHECKPOINT_TIME_FRACTION", float("inf"))


def interrupted(
    model: Any, monkeypatch: pytest.MonkeyPatch, at: int, collect: Callable[[], Any], begins: list[int] | None = None
) -> int:
    """Run `collect` with an interrupt in place of the model's run number `at`; how many runs there were.

    `begins` gets the number of each batch's first run.
    """
    run, runs, read = model.run, [0], KeyReader.read

    def note(self: KeyReader, rows: Any) -> Any:
        if begins is not None:
            begins.append(runs[0] + 1)
        return read(self, rows)

    def count(*args: Any, **kwargs: Any) -> Any:
        runs[0] += 1
        if runs[0] == at:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    with monkeypatch.context() as patching:
        patching.setattr(model, "run", count)
        patching.setattr(KeyReader, "read", note)
        if at:
            with pytest.raises(KeyboardInterrupt):
                collect()
        else:
            collect()
    return runs[0]


def equal(moments: dict[int, Any], expected: dict[int, Any]) -> bool:
    return all(torch.equal(moments[layer].matrix, expected[layer].matrix) for layer in LAYERS)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("tokens", [None, 150])
def test_interrupted_anywhere_it_goes_on_to_the_same_bits(
    lens_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int | None
) -> None:
    config = MomentsConfig(**{**vars(OFTEN), "tokens": tokens})
    uninterrupted = collect_moments(lens_model, TEXTS, LAYERS, config)
    begins: list[int] = []
    runs = interrupted(lens_model, monkeypatch, 0, lambda: collect_moments(lens_model, TEXTS, LAYERS, config), begins)
    assert len(begins) >= 4
    for at in range(1, runs + 1):
        begin = max(number for number in begins if number <= at)
        folder = tmp_path / str(at)

        def collect(folder: Path = folder) -> dict[int, Any]:
            return collect_moments(lens_model, TEXTS, LAYERS, config, out=folder)

        assert interrupted(lens_model, monkeypatch, at, collect) == at
        assert not list(folder.glob("moments/layer_*"))
        assert len(list(checkpoints_folder(folder).glob("*"))) == (0 if begin == 1 else len(LAYERS))
        assert interrupted(lens_model, monkeypatch, 0, collect) == runs - begin + 1, "what was summed is not run again"
        assert equal(load_moments(folder, LAYERS), uninterrupted)
        assert not checkpoints_folder(folder).exists()
        assert {layer: moment.count for layer, moment in collect().items()} == {
            layer: moment.count for layer, moment in uninterrupted.items()
        }


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("at", range(1, 10))
def test_interrupted_between_two_files_it_goes_on_to_the_same_bits(
    lens_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Checkpoints of layers that stand at different places, and final files of some layers alone."""
    from mechedit import files as artifacts

    uninterrupted = collect_moments(lens_model, TEXTS, LAYERS, OFTEN, convergence=Convergence(drawn=2))
    save, saves = artifacts.save_file, [0]

    def interrupt(*args: Any, **kwargs: Any) -> None:
        saves[0] += 1
        if saves[0] == at:
            raise KeyboardInterrupt
        save(*args, **kwargs)

    def collect() -> dict[int, Any]:
        return collect_moments(lens_model, TEXTS, LAYERS, OFTEN, out=tmp_path, convergence=Convergence(drawn=2))

    with monkeypatch.context() as patching:
        patching.setattr(artifacts, "save_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            collect()
    again = collect()
    assert equal(again, uninterrupted)
    for layer in LAYERS:
        assert again[layer].curve.equals(uninterrupted[layer].curve)
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.usefixtures("often")
def test_other_batches_may_finish_what_was_begun(
    lens_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = collect_moments(lens_model, TEXTS, LAYERS)
    interrupted(lens_model, monkeypatch, 3, lambda: collect_moments(lens_model, TEXTS, LAYERS, OFTEN, out=tmp_path))
    resumed = collect_moments(lens_model, TEXTS, LAYERS, MomentsConfig(batch_tokens=30), out=tmp_path)
    for layer in LAYERS:
        assert resumed[layer].count == uninterrupted[layer].count
        assert (resumed[layer].matrix - uninterrupted[layer].matrix).norm() < 1e-6 * uninterrupted[layer].matrix.norm()


@pytest.mark.usefixtures("often")
def test_checkpoints_of_other_settings_are_refused_or_replaced(
    lens_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(lens_model, monkeypatch, 3, lambda: collect_moments(lens_model, TEXTS, LAYERS, OFTEN, out=tmp_path))
    with pytest.raises(InputError, match=r"shard_0_of_1.*made with texts = .*--overwrite"):
        collect_moments(lens_model, TEXTS[:-1], LAYERS, OFTEN, out=tmp_path)
    with pytest.raises(InputError, match="made with convergence = None"):
        collect_moments(lens_model, TEXTS, LAYERS, OFTEN, out=tmp_path, convergence=Convergence())
    collect_moments(lens_model, TEXTS[:-1], LAYERS, OFTEN, out=tmp_path, overwrite=True)
    assert equal(load_moments(tmp_path, LAYERS), collect_moments(lens_model, TEXTS[:-1], LAYERS, OFTEN))
    assert not checkpoints_folder(tmp_path).exists()


def test_without_a_folder_nothing_is_written(lens_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    collect_moments(lens_model, TEXTS, LAYERS, OFTEN)
    assert not list(tmp_path.rglob("*"))


def test_checkpoints_take_little_of_the_time(lens_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing takes 5 seconds by this clock, a batch 1: a checkpoint must wait for 250."""
    from mechedit.moments.checkpoints import Checkpoint
    from mechedit.moments.moments_folder import MomentsFolder

    clock = [0.0]
    written: list[float] = []

    def save(checkpoint: Checkpoint, folder: Path) -> None:
        written.append(clock[0])
        clock[0] += 5

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Checkpoint, "save", save)
    checkpoint: Any = object.__new__(Checkpoint)
    folder = MomentsFolder(
        path=tmp_path, provenance={}, rank=Rank(), overwrite=False, convergence=None, checkpoint_seconds=10
    )
    for _ in range(600):
        clock[0] += 1
        folder.save_if_due([checkpoint])
    assert written == [10.0, 265.0, 520.0]


@pytest.mark.parametrize("tokens", [None, 400])
@pytest.mark.parametrize("count", [2, 3])
def test_shards_merge_to_the_sum_of_one_process(
    lens_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, often: None, count: int, tokens: int | None
) -> None:
    config = MomentsConfig(**{**vars(OFTEN), "tokens": tokens})
    texts = [text for text in TEXTS for _ in range(3)]
    unsharded = collect_moments(lens_model, texts, LAYERS, config)
    for index in reversed(range(count)):
        files = collect_shard(lens_model, texts, LAYERS, (index, count), tmp_path, config)
        assert read_header(files[0], "provenance")["count"] < unsharded[0].count
        again = interrupted(
            lens_model, monkeypatch, 0,
            lambda index=index: collect_shard(lens_model, texts, LAYERS, (index, count), tmp_path, config),
        )  # fmt: skip
        assert again == 0, "a finished shard is not summed again"
    merged = merge_moments(tmp_path)
    for layer in LAYERS:
        assert merged[layer].count == unsharded[layer].count == (tokens or unsharded[layer].count)
        assert merged[layer].provenance == unsharded[layer].provenance
        assert (merged[layer].matrix - unsharded[layer].matrix).norm() < 1e-12 * unsharded[layer].matrix.norm()
        assert torch.equal(load_moments(tmp_path, [layer], lens_model)[layer].matrix, merged[layer].matrix)
    assert not checkpoints_folder(tmp_path).exists()
    reused = interrupted(
        lens_model, monkeypatch, 0, lambda: collect_moments(lens_model, texts, LAYERS, config, tmp_path)
    )
    assert reused == 0, "merged files are files like any other"


@pytest.mark.usefixtures("often")
def test_a_merge_that_was_killed_or_runs_again_gives_all_moments(lens_model: Any, tmp_path: Path) -> None:
    killed, at_once = tmp_path / "killed", tmp_path / "at once"
    for index in (0, 1):
        collect_shard(lens_model, TEXTS, LAYERS, (index, 2), killed, OFTEN)
    shutil.copytree(killed, at_once)
    expected = merge_moments(at_once)
    # The first layer is written, and one of its sums removed.
    shutil.copy(moment_path(at_once, LAYERS[0]), moment_path(killed, LAYERS[0]))
    checkpoint_path(killed, LAYERS[0], Rank(1, 2)).unlink()
    for _ in range(2):
        merged = merge_moments(killed)
        assert {layer: moment.count for layer, moment in merged.items()} == {
            layer: moment.count for layer, moment in expected.items()
        }
        assert all(torch.equal(merged[layer].matrix, expected[layer].matrix) for layer in LAYERS)
        assert not checkpoints_folder(killed).exists()
    moment_path(killed, LAYERS[0]).unlink()
    with pytest.raises(InputError, match="shards of the layers"):
        merge_moments(killed, LAYERS)


@pytest.mark.usefixtures("often")
def test_shards_that_are_missing_unfinished_or_of_another_model_are_named(
    lens_model: Any, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect(index: int, texts: list[str] = TEXTS, model: Any = lens_model, count: int = 3) -> None:
        collect_shard(model, texts, LAYERS, (index, count), tmp_path, OFTEN)

    with pytest.raises(InputError, match="shards of the layers"):
        merge_moments(tmp_path)
    collect(0)
    collect(2)
    with pytest.raises(InputError, match=r"shard 1/3 of layer 0 is missing.*--shard 1/3"):
        merge_moments(tmp_path)
    interrupted(lens_model, monkeypatch, 2, lambda: collect(1))
    with pytest.raises(InputError, match="shard 1/3 of layer 0 is not finished"):
        merge_moments(tmp_path)
    checkpoint_path(tmp_path, 0, Rank(1, 3)).unlink()
    checkpoint_path(tmp_path, 2, Rank(1, 3)).unlink()
    collect(1, model=make_model("gpt2", seed=1))
    with pytest.raises(InputError, match="weights_hash"):
        merge_moments(tmp_path)
    collect(0, count=2)
    with pytest.raises(InputError, match=r"\[2, 3\] processes"):
        merge_moments(tmp_path)
    assert not list(tmp_path.glob("moments/layer_*"))
    with pytest.raises(InputError, match="the shard is 3/3"):
        collect(3)


@pytest.mark.parametrize("count", [10**6, 10**30])
def test_shards_of_more_processes_than_there_can_be_are_missing_at_once(
    lens_model: Any, tmp_path: Path, count: int
) -> None:
    """By the name of a file alone: as many may not even be counted."""
    collect_shard(lens_model, TEXTS, LAYERS[:1], (0, 2), tmp_path, OFTEN)
    present = checkpoint_path(tmp_path, LAYERS[0], Rank(0, 2))
    present.rename(checkpoint_path(tmp_path, LAYERS[0], Rank(0, count)))
    records = ShardRecords(folder=tmp_path / "records", command="mechedit trace")
    records.write(Rank(0, count), {"facts": "ab"}, {"n": 1})
    with limited_memory():
        with pytest.raises(InputError, match=f"shard 1/{count} of layer 0 is missing"):
            merge_moments(tmp_path)
        with pytest.raises(InputError, match=f"the shard 1/{count} is missing"):
            records.merged()
    assert not list(tmp_path.rglob("*.lock"))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    budget=st.none() | st.integers(1, 300),
    world_size=st.integers(1, 4),
    batch_tokens=st.integers(1, 100),
    stop=st.integers(0, 30),
)
def test_every_token_is_in_one_batch_of_one_chunk(
    tokenizer: Any, lengths: list[int], budget: int | None, world_size: int, batch_tokens: int, stop: int
) -> None:
    """Whatever the number of processes, the batches and the position to go on from; and the budget is kept."""
    texts = [" ".join("Seattle" for _ in range(length)) for length in lengths]
    config = MomentsConfig(tokens=budget)
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr("mechedit.moments.chunks.CHUNK_SIZE", 4)
        chunks = list(read_chunks(tokenizer, texts, config, 25))
        by_rank = [
            list(read_chunks(tokenizer, texts, config, 25, Rank(index, world_size))) for index in range(world_size)
        ]
        resumed = [
            list(read_chunks(tokenizer, texts, config, 25, start=TextPosition(chunk.index, 0, chunk.tokens_before)))
            for chunk in chunks
        ]
    sequences = {chunk.index: chunk.sequences for chunk in chunks}
    assert {chunk.index: chunk.sequences for own_chunks in by_rank for chunk in own_chunks} == sequences
    assert sum(len(own_chunks) for own_chunks in by_rank) == len(chunks)
    for i, later_chunks in enumerate(resumed):
        assert [chunk.sequences for chunk in later_chunks] == [chunk.sequences for chunk in chunks[i:]]
    available = sum(min(25, len(tokenizer(text)["input_ids"])) for text in texts)
    n_tokens = sum(len(sequence) for chunk in chunks for sequence in chunk.sequences)
    assert n_tokens == min(budget or available, available)
    for chunk in chunks:
        first = min(stop, len(chunk.sequences))
        slices = list(batches(chunk, batch_tokens, 0, {first}))
        assert [sequence for batch in slices for sequence in chunk.sequences[batch]] == chunk.sequences
        assert first in {0, *(batch.stop for batch in slices)}, "no batch holds sequences before and after a position"
        for batch in slices:
            sizes = [len(sequence) for sequence in chunk.sequences[batch]]
            assert sum(sizes) <= max(batch_tokens, max(sizes))


def test_killed_the_command_resumes_to_the_same_bytes(zygote: Zygote, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(me.load_texts("tiny")[:350]))
    killed, uninterrupted = tmp_path / "killed", tmp_path / "uninterrupted"
    command = ["moments", "--texts", str(tmp_path / "texts.txt"), "--layers", "1-2"]
    command += ["--checkpoint-seconds", "0"]
    ended = zygote.run([*command, "--out", "uninterrupted"], tmp_path)
    assert ended.code == 0, ended.printed
    checkpoints = [checkpoint_path(killed, layer, Rank()) for layer in (1, 2)]
    for kill_at in range(ended.changes * 4 // 9, ended.changes, 4):
        shutil.rmtree(killed, ignore_errors=True)
        assert zygote.run([*command, "--out", "killed"], tmp_path, kill_at=kill_at).code == -signal.SIGKILL
        if all(path.exists() for path in checkpoints):
            break
    assert not list(killed.glob("moments/layer_*"))
    done = [read_header(path, "provenance")["count"] for path in checkpoints]
    assert all(count > 0 for count in done)
    # To go on takes no process of its own.
    with pytest.raises(SystemExit) as leaving:
        main([*command, "--out", str(killed)])
    assert leaving.value.code in (None, 0)
    for name in ("layer_1.safetensors", "layer_2.safetensors"):
        assert (killed / "moments" / name).read_bytes() == (uninterrupted / "moments" / name).read_bytes()
    assert load_moments(killed, [1])[1].count > max(done)
    assert not list(killed.glob("moments/parts")) + list(killed.glob("moments/.*"))


def test_a_file_in_the_place_of_checkpoints_is_refused_before_the_text_is_read(lens_model: Any, tmp_path: Path) -> None:
    folder = checkpoints_folder(tmp_path)
    folder.parent.mkdir()
    folder.write_text("precious")
    with pytest.raises(InputError, match="parts' is a file, expected a folder"):
        collect_moments(lens_model, TEXTS, LAYERS, out=tmp_path)
    assert [path.name for path in folder.parent.iterdir() if not path.name.startswith(".")] == ["parts"]
    folder.unlink()
    assert list(collect_moments(lens_model, TEXTS, LAYERS, out=tmp_path)) == LAYERS
