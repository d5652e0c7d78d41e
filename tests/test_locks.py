"""Two processes in one folder at once: one makes a thing, and the other is told whose it is, or waits for it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.edits import random_edit
from helpers.run_folder import write_run
from test_run_folder import NUMBER, step

import mechedit as me
from mechedit import pipeline
from mechedit.cli import main
from mechedit.edit import export, export_lora
from mechedit.errors import InputError
from mechedit.figures import run_figures
from mechedit.locks import locked
from mechedit.moments.checkpoints import shard_lock
from mechedit.processes import host_name
from mechedit.provenance import value_hash
from mechedit.report import write_report
from mechedit.run_folder import RunFolder, _deciding
from mechedit.session.session_folder import SessionFolder
from mechedit.shards import Rank
from mechedit.sweep import SweepConfig


class Holder:
    """A forked process that holds a lock until it is told to end, or killed."""

    def __init__(self, path: Path, made_with: str | None = None) -> None:
        locking, self._ending = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException), locked(path, "it", made_with=made_with):
                os.close(self._ending[1])
                os.write(locking[1], b"locked")
                os.read(self._ending[0], 1)
            os._exit(0)
        os.close(locking[1])
        os.close(self._ending[0])
        assert os.read(locking[0], 6) == b"locked"
        os.close(locking[0])

    def release(self) -> None:
        os.close(self._ending[1])
        assert os.waitpid(self.pid, 0)[1] == 0
        self.pid = 0

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self._ending[1])
            self.pid = 0


@pytest.fixture
def hold() -> Iterator[Callable[..., Holder]]:
    """Start holders, which end with the test."""
    holders: list[Holder] = []

    def start(path: Path, made_with: str | None = None) -> Holder:
        holders.append(Holder(path, made_with))
        return holders[-1]

    yield start
    for holder in holders:
        holder.kill()


def test_a_lock_says_whose_it_is_and_ends_with_its_process(tmp_path: Path, hold: Callable[..., Holder]) -> None:
    path = tmp_path / "thing"
    first = hold(path)
    pattern = rf"the thing is being made by process {first.pid} on {host_name()} since 2.* \(.*\), .*--out"
    for _ in range(2):
        with pytest.raises(InputError, match=pattern), locked(path, "the thing"):
            pass
    with locked(tmp_path / "other", "another thing"):
        pass
    first.release()
    assert not list(tmp_path.iterdir()), "a lock's file goes with it"
    second = hold(path)
    second.kill()
    assert [file.name for file in tmp_path.iterdir()] == [".thing.lock"]
    with locked(path, "the thing"):
        owner = json.loads((tmp_path / ".thing.lock").read_text())
        assert owner["pid"] == os.getpid()
        with pytest.raises(InputError, match=f"process {os.getpid()} on"), locked(path, "the thing"):
            pass
    assert not list(tmp_path.iterdir())


def test_who_makes_the_same_waits_for_it_and_reads_it(tmp_path: Path, hold: Callable[..., Holder]) -> None:
    step(tmp_path, 1)
    first = hold(tmp_path / "trace", value_hash(["trace", "number.json", _deciding(read_stamp(tmp_path))]))
    timer = threading.Timer(0.5, first.release)
    start = time.monotonic()
    timer.start()
    with pytest.warns(UserWarning, match="the trace in .* is being made by process .*; waiting for it"):
        assert step(tmp_path, 2) == 1
    assert time.monotonic() - start > 0.4
    timer.join()


def read_stamp(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["steps"]["trace"]


def test_who_makes_it_from_other_input_is_refused(tmp_path: Path, hold: Callable[..., Holder]) -> None:
    first = hold(tmp_path / "trace", value_hash("other settings"))
    with pytest.raises(InputError, match=f"the trace in .* is being made by process {first.pid}"):
        step(tmp_path, 2)
    assert not (tmp_path / "number.json").exists()
    first.kill()
    assert step(tmp_path, 3) == 3, "a killed process holds nothing"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "number.json"]


def test_steps_of_two_processes_keep_each_others_stamps(tmp_path: Path) -> None:
    """An array of jobs in one folder: the stamps are in one file."""
    folder, children = RunFolder.at(tmp_path, overwrite=True), []
    for name in ("trace", "edit"):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                for number in range(40):
                    folder.step(name, {"number": number}, partial(int, number), NUMBER, at=f"{name}.json")
                os._exit(0)
            os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    stamps = json.loads((tmp_path / "config.json").read_text())["steps"]
    assert {name: stamp["number"] for name, stamp in stamps.items()} == {"trace": 39, "edit": 39}
    assert not list(tmp_path.glob(".*"))


def test_shards_of_an_array_do_not_lock_each_other(tmp_path: Path, hold: Callable[..., Holder]) -> None:
    with shard_lock(tmp_path, 1, Rank(0, 2)), shard_lock(tmp_path, 1, Rank(1, 2)), shard_lock(tmp_path, 2, Rank(0, 2)):
        for layer, rank in ((1, Rank(0, 2)), (1, Rank(1, 2)), (2, Rank(0, 2))):
            with (
                pytest.raises(InputError, match=f"the shard {rank.index}/2 of layer {layer}"),
                shard_lock(tmp_path, layer, rank),
            ):
                pass
    holder = hold(tmp_path / "moments_layer_1.shard_1_of_2")
    (tmp_path / "texts.txt").write_text("\n".join(f"text number {number} of many" for number in range(99)))
    arguments = ["moments", "--layers", "1", "--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path)]
    for shard, code in (("0/2", 0), ("1/2", 2)):
        with pytest.raises(SystemExit) as leaving:
            main([*arguments, "--tokens", "2000", "--shard", shard])
        assert (leaving.value.code or 0) == code
    holder.release()


@pytest.mark.parametrize("write", [export, export_lora])
def test_two_exports_to_one_folder(
    lens_model: Any, tmp_path: Path, write: Callable[..., None], hold: Callable[..., Holder]
) -> None:
    edit, folder = random_edit(lens_model), tmp_path / "out"
    (tmp_path / "link").symlink_to(folder)
    first = hold(folder)
    for path in (folder, tmp_path / "link"):
        with pytest.raises(InputError, match=f"the export .*out' is being made by process {first.pid}"):
            write(lens_model, edit, path)
    assert not folder.exists()
    first.release()
    write(lens_model, edit, tmp_path / "link")
    assert (folder / "mechedit.json").is_file()


def test_two_edits_to_one_file(tmp_path: Path, hold: Callable[..., Holder], capsys: Any) -> None:
    holder = hold(tmp_path / "edit.safetensors")
    with pytest.raises(SystemExit) as leaving:
        main(["edit", "--layers", "1-2", "--out", str(tmp_path / "edit.safetensors"), "--overwrite"])
    assert leaving.value.code == 2
    assert f"is being made by process {holder.pid}" in capsys.readouterr().err


def test_two_selections_in_one_folder(
    lens_model: Any, tmp_path: Path, hold: Callable[..., Holder], capsys: Any
) -> None:
    """Also while windows are swept, which takes hours."""
    write_run(tmp_path)
    selection = me.select_layers(pd.read_parquet(tmp_path / "effects.parquet"))
    before = (tmp_path / "selection.json").read_bytes()
    holder = hold(tmp_path / "selection.json", value_hash("other settings"))
    message = f"the selection in {str(tmp_path)!r} is being made by process {holder.pid}"
    with pytest.raises(SystemExit) as leaving:
        main(["select", str(tmp_path)])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err
    requests, sweep, config, reading = me.load_requests("tiny"), SweepConfig(), me.MemitConfig(), me.MomentsConfig()
    with pytest.raises(InputError, match=re.escape(message)):
        pipeline.validate_step(
            RunFolder.at(tmp_path), lens_model, selection, requests, "tiny", sweep, "memit", config, reading
        )
    assert (tmp_path / "selection.json").read_bytes() == before
    holder.kill()
    pipeline.select_step(RunFolder.at(tmp_path), me.SelectConfig())
    assert (tmp_path / "selection.json").read_bytes() != before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("name", "make"), [("report.html", write_report), ("figures", run_figures)])
def test_two_reports_in_one_folder_are_made_one_after_the_other(
    tmp_path: Path, hold: Callable[..., Holder], name: str, make: Callable[[Path], object]
) -> None:
    write_run(tmp_path)
    (tmp_path / "effects.parquet").unlink()  # its figures take most of the time
    holder = hold(tmp_path / name)
    timer = threading.Timer(1.5, holder.release)
    timer.start()
    start = time.monotonic()
    make(tmp_path)
    assert time.monotonic() - start > 1.4
    timer.join()
    assert (tmp_path / name).exists()
    assert not list(tmp_path.glob(".*"))


def test_two_sessions_in_one_folder(tmp_path: Path, hold: Callable[..., Holder]) -> None:
    folder = SessionFolder(path=tmp_path)
    holder = hold(tmp_path / "session")
    with pytest.raises(InputError, match=f"the session in .* is being made by process {holder.pid}"), \
         folder.locked(0):  # fmt: skip
        pass
    holder.kill()
    with folder.locked(0):
        pass
    folder.save_settings({"method": "memit"}, [])
    with pytest.raises(InputError, match="made with method = 'memit', expected 'rome'"):
        folder.save_settings({"method": "rome"}, [])
    (tmp_path / "batches").mkdir()
    (tmp_path / "batches" / "0001.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="has 1 batches, expected the 0"), folder.locked(0):
        pass


def test_a_lock_needs_a_folder_that_can_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the folder"), locked(tmp_path / "file" / "thing", "it"):
        pass


def test_a_link_in_the_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".file.lock").symlink_to("elsewhere")
    with pytest.raises(InputError, match="Too many levels of symbolic links"), locked(tmp_path / "file", "the file"):
        pass
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / ".file.lock").unlink()
    with locked(tmp_path / "file", "the file"):
        assert (tmp_path / ".file.lock").exists(), "the control"
