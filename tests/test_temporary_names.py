"""Temporary names: what a killed process left is removed, what a living one or another host writes stays."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers.commands import complaint
from helpers.run_folder import write_run

from mechedit.atomic import atomic, atomic_folder
from mechedit.cache import Codec
from mechedit.cli.new_folders import no_empty_folders
from mechedit.errors import InputError
from mechedit.files import read_json, write_json, write_tensors
from mechedit.locks import locked
from mechedit.moments.checkpoints import remove_temporary_files
from mechedit.moments.chunks import Rank
from mechedit.processes import ProcessIdentity, host_name, start_of
from mechedit.report import write_report
from mechedit.run_folder import RunFolder
from mechedit.session.session_folder import SessionFolder
from mechedit.temporary_names import owner_of, remove_folder, sweep, temporary_name

NUMBER: Codec[int] = Codec(read=read_json, write=write_json, suffix=".json")


@pytest.fixture(scope="module")
def ended() -> ProcessIdentity:
    """A process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    start = start_of(child.pid)
    child.wait()
    return ProcessIdentity(host_name(), child.pid, start)


def leftover(folder: Path, owner: ProcessIdentity, name: str = "effects") -> Path:
    """What a process leaves that is killed while it writes a file: a folder with a part of it."""
    path = folder / f".{name}.mechedit-{owner.host}-{owner.pid}-{owner.start}-0123abcd"
    path.mkdir(parents=True)
    (path / f"{name}.parquet").write_bytes(b"PAR1 half")
    (path / ".tmpQx3").write_bytes(b"of safetensors")
    return path


def owners(ended: ProcessIdentity) -> dict[str, ProcessIdentity]:
    """Owners whose files stay."""
    return {
        "this process": ProcessIdentity.current(),
        "its parent": ProcessIdentity(host_name(), os.getppid(), start_of(os.getppid())),
        "another host": ProcessIdentity(f"not-{host_name()}"[:63], ended.pid, ended.start),
    }


def test_a_name_says_whose_it_is() -> None:
    name = temporary_name("effects.parquet")
    assert name.startswith(".effects.parquet.")
    assert owner_of(name) == owner_of(f"{name}.old") == ProcessIdentity.current()
    assert temporary_name("effects.parquet") != name
    assert len(temporary_name("ü" * 250).encode()) < 255
    for other in ("effects.parquet", ".effects.x7.parquet", ".gitignore", ".mechedit-host-1-2-0123abcd"):
        assert owner_of(other) is None


def test_only_what_the_dead_of_this_host_left_is_removed(tmp_path: Path, ended: ProcessIdentity) -> None:
    staying = [leftover(tmp_path, owner, f"of {who}") for who, owner in owners(ended).items()]
    staying += [tmp_path / ".hidden", tmp_path / ".effects.x7.parquet"]
    for path in staying[-2:]:
        path.write_bytes(b"")
    going = [leftover(tmp_path, ended), leftover(tmp_path, ended, "baseline")]
    sweep([tmp_path, tmp_path / "absent"])
    assert not any(path.exists() for path in going)
    assert sorted(tmp_path.iterdir()) == sorted(staying)


def test_an_id_that_was_given_to_another_process_fools_nobody(tmp_path: Path) -> None:
    current = ProcessIdentity.current()
    earlier = ProcessIdentity(current.host, current.pid, current.start - 60)
    parent = psutil.Process(os.getppid())
    assert not ProcessIdentity(host_name(), parent.pid, start_of(parent.pid)).is_dead
    for owner in (earlier, ProcessIdentity(host_name(), parent.pid, start_of(parent.pid) - 60)):
        assert owner.is_dead
        path = leftover(tmp_path, owner)
        sweep([tmp_path])
        assert not path.exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes have no start that no clock moves")
def test_a_clock_that_is_set_makes_nobody_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    living = leftover(tmp_path, ProcessIdentity(host_name(), os.getppid(), start_of(os.getppid())))
    before = psutil.Process(os.getppid()).create_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1e9)  # the clock was set by years
    assert abs(psutil.Process(os.getppid()).create_time() - before) > 60, "the control"
    sweep([tmp_path])
    assert living.exists()


@pytest.mark.parametrize("pid", [10**30, 2**31, 0, -1])
def test_an_id_that_no_process_can_have_is_that_of_a_dead_one(tmp_path: Path, pid: int) -> None:
    """Of a file or a lock that is damaged."""
    owner = ProcessIdentity(host_name(), pid, 1)
    assert owner.is_dead
    assert not ProcessIdentity("another", pid, 1).is_dead
    (tmp_path / ".file.lock").write_text(json.dumps({"host": owner.host, "pid": pid, "start": 1}))
    with locked(tmp_path / "file", "the file"):
        assert json.loads((tmp_path / ".file.lock").read_text())["pid"] == os.getpid()
    if pid > 0:
        left = leftover(tmp_path, owner)
        sweep([tmp_path])
        assert not left.exists()


def test_a_process_that_nobody_waited_for_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    identity = ProcessIdentity(host_name(), child.pid, start_of(child.pid))
    assert not identity.is_dead
    child.kill()
    deadline = time.monotonic() + 30
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert identity.is_dead
    child.wait()


def remove_parts(folder: Path) -> None:
    parts = folder / "parts"
    parts.mkdir(parents=True)
    for name in "abc":
        (parts / name).write_text(name)
    remove_folder(parts)


def write_locked(folder: Path) -> None:
    with no_empty_folders(), locked(folder / "new.json", "the file"):
        write_json(folder / "new.json", 1)


def write_folder(folder: Path) -> None:
    for text in "ab":
        with atomic_folder(folder / "new", replaces="mark") as new:
            (new / "mark").write_text(text)


@pytest.mark.parametrize("act", [remove_parts, write_locked, write_folder])
def test_an_interrupt_while_something_is_removed_leaves_nothing(
    act: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = {"removals": 0, "interrupted": 0}

    def interrupting(remove: Callable[..., None], at: int) -> Callable[..., None]:
        def removing(*arguments: Any, **keywords: Any) -> None:
            counted["removals"] += 1
            if counted["removals"] == at:
                counted["interrupted"] += 1
                raise KeyboardInterrupt
            remove(*arguments, **keywords)

        return removing

    removals = {name: getattr(os, name) for name in ("unlink", "rmdir")}
    for at in range(1, 20):
        counted["removals"] = 0
        for name, remove in removals.items():
            monkeypatch.setattr(os, name, interrupting(remove, at))
        folder = tmp_path / str(at)
        with contextlib.suppress(KeyboardInterrupt):
            act(folder)
        if counted["removals"] < at:
            break
        assert not [path for path in folder.rglob(".*") if owner_of(path.name) or path.suffix == ".lock"], at
    assert counted["interrupted"] == at - 1 >= 2, "the control"


def test_files_of_a_folder_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").write_bytes(b"")
    with atomic_folder(tmp_path / "new") as new:
        (new / "inner").mkdir()
        for name in ("private", "inner/private"):
            (new / name).write_bytes(b"")
            (new / name).chmod(0o600)
    usual = (tmp_path / "any").stat().st_mode
    assert usual & 0o077, "the control"
    assert {(tmp_path / "new" / name).stat().st_mode for name in ("private", "inner/private")} == {usual}


def run_step(folder: Path) -> None:
    RunFolder.at(folder).step("trace", {"facts": "f"}, lambda: 1, NUMBER, at="number.json")


def write(folder: Path) -> None:
    write_json(folder / "new.json", 1)


def write_folder(folder: Path) -> None:
    with atomic_folder(folder / "new"):
        pass


def read_session(folder: Path) -> None:
    SessionFolder(path=folder).load_batches("")


@pytest.mark.parametrize(
    ("entry", "where"),
    [
        *((run_step, name) for name in ("", "figures", "moments", "moments/parts", "targets", "trace_parts")),
        (write, ""),
        (write_folder, ""),
        (read_session, "batches"),
        (lambda folder: remove_temporary_files(folder, 1, Rank()), "moments/parts"),
    ],
)
def test_every_writer_sweeps_at_its_start(tmp_path: Path, ended: ProcessIdentity, entry: Any, where: str) -> None:
    going = leftover(tmp_path / where, ended)
    staying = leftover(tmp_path / where, ProcessIdentity.current(), "sibling")
    entry(tmp_path)
    assert not going.exists()
    assert staying.exists()


def test_a_report_names_only_what_is_finished(tmp_path: Path, ended: ProcessIdentity) -> None:
    write_run(tmp_path)
    expected = write_report(tmp_path).read_bytes()
    sibling = ProcessIdentity.current()
    left = [
        leftover(tmp_path, ended),
        leftover(tmp_path / "figures", ended),
        leftover(tmp_path, sibling),
        tmp_path / ".effects.q2.parquet",
    ]
    left[-1].write_bytes(b"PAR1 half")
    (tmp_path / "figures" / ".severed.q2.png").write_bytes(b"half")
    assert write_report(tmp_path).read_bytes() == expected
    assert [path.exists() for path in left] == [False, False, True, True]
    (tmp_path / "figures" / "severed.png").write_bytes(b"another")
    assert write_report(tmp_path).read_bytes() != expected, "what is finished is named"


def kill_in_write(path: Path) -> None:
    """Be killed while a file is written."""
    with atomic(path) as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), 9)


def test_what_a_kill_leaves_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=kill_in_write, args=(tmp_path / "effects.parquet",))
    child.start()
    child.join()
    assert child.exitcode == -9
    (left,) = tmp_path.iterdir()
    assert owner_of(left.name) is not None
    sweep([tmp_path])
    assert not list(tmp_path.iterdir())


def test_what_a_library_leaves_beside_its_file_goes_with_it(tmp_path: Path) -> None:
    """safetensors writes into a file of its own beside the one that it was told to write."""

    def interrupted() -> None:
        with atomic(tmp_path / "edit.safetensors") as temporary:
            (temporary.parent / ".tmpQx3").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    write_tensors(tmp_path / "edit.safetensors", {"x": torch.ones(2)}, "manifest", {})
    assert [path.name for path in tmp_path.iterdir()] == ["edit.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "edit.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name, there in (("link", True), ("dangling", False)):
        target, link = tmp_path / "disk" / name, tmp_path / name
        if there:
            target.mkdir()
        link.symlink_to(target)
        with atomic_folder(link) as temporary:
            (temporary / "file").write_text("content")
        assert link.is_symlink()
        assert (target / "file").read_text() == "content"
        with pytest.raises(InputError, match="exists already"), atomic_folder(link):
            pass
    assert len(list((tmp_path / "disk").iterdir())) == 2
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="loop"), atomic_folder(tmp_path / "loop"):
        pass


@pytest.mark.parametrize("command", [["edit", "--layers=1"], ["train-mend", "--steps=1"]])
def test_what_is_no_file_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, command: list[str]
) -> None:
    """A device by that name, such as /dev/null, would be gone for the whole machine."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkdir("folder")
    for name in ("pipe", "folder"):
        with pytest.raises(InputError, match=f"'{name}' is a folder, a pipe, a socket or a device"), atomic(name):
            pass
        assert "a pipe, a socket or a device" in complaint(capsys, *command, f"--out={name}", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]
    assert not (tmp_path / "pipe").is_file()
    with atomic("file") as temporary:  # the control
        temporary.write_text("content")
    assert Path("file").read_text() == "content"
