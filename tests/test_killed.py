"""Every command that writes, killed at any moment, with a full disk, and in a folder that nobody may write to.

A command that was killed or ran out of space gives, run again, the same bytes as one that nothing interrupted.
`make torture` kills each command `MECHEDIT_KILLS` times at moments drawn from `MECHEDIT_SEED`; without these a test
kills twice, at moments that are the same each time: once after a time, once before one of the last changes in its
folder. The model is the smallest that takes every step, and figures are sketches but for those of a report in
`make torture`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.smallest import write_data
from helpers.zygote import Ended, Zygote

from mechedit.cli.app import INTERRUPTED
from mechedit.files import open_tensors, read_tensors
from mechedit.processes import host_name

KILLS = int(os.environ.get("MECHEDIT_KILLS", "2"))
SEED = int(os.environ.get("MECHEDIT_SEED", "0"))
DISKS = max(1, KILLS // 5)
"""Full disks of each kind per command."""
NO_PROCESS = 2**22 + 1
"""An id above those that Linux gives."""
DATA = "--model smallest"
TRACE = f"trace {DATA} --facts facts.json --max-facts 10 --samples 1 --kinds state,mlp --sever nothing,mlp --out run"
SETTLED = (
    f"trace {DATA} --until-settled --facts facts.json --samples 1 --kinds state,mlp --roles subject_last --out run"
)
SWEEP = f"select run --validate {DATA} --windows 0-0,1-2 --requests held_out.json --validate-requests 2"
MOMENTS = f"moments {DATA} --layers 1-2 --texts texts.txt --checkpoint-seconds 0 --out run"
EDIT = f"edit {DATA} --requests requests.json --layers 1-2 --moments run --set steps=2 --out edit.safetensors"
TARGETS = "--set batch_size=1 --targets-only --shard"
EVALUATE = f"evaluate {DATA} --edit edit.safetensors --requests requests.json --generation-tokens 2 --out run"
APPLY = f"apply {DATA} --edit edit.safetensors"
RUN = (
    f"run {DATA} --layers 1-2 --facts facts.json --max-facts 10 --all-facts --samples 1 --requests requests.json "
    f"--texts texts.txt --set steps=2 --generation-tokens 2 --no-tuned --out run"
)
TUNE = "tune smallest --requests held_out.json --texts texts.txt --windows 0-0,0-1 --facts 4 --edits 12 --set steps=2"
MEND = (
    "train-mend smallest --requests held_out.json --texts texts.txt --layers 1-2 --steps 3 --batch-size 2 --rank 4 "
    "--text-tokens 8 --validation 1 --validate-every 2"
)
COMMANDS: dict[str, tuple[list[str], str]] = {
    "trace": ([], TRACE),
    "until settled": ([], SETTLED),
    "trace shard": ([], f"{TRACE} --shard 0/2"),
    "trace merge": ([f"{TRACE} --shard 0/2", f"{TRACE} --shard 1/2"], "trace --merge --out run"),
    "select": ([TRACE], "select run"),
    "validate": ([TRACE], f"{SWEEP} --texts texts.txt --set steps=2 --no-tuned"),
    "moments": ([], MOMENTS),
    "shard": ([], f"{MOMENTS} --shard 0/2"),
    "merge": ([f"{MOMENTS} --shard 0/2", f"{MOMENTS} --shard 1/2"], "moments --merge --out run"),
    "convergence": ([], f"{MOMENTS} --convergence --npz npz"),
    "edit": ([MOMENTS], EDIT),
    "targets shard": ([MOMENTS], f"{EDIT} {TARGETS} 0/2"),
    "edit merge": ([MOMENTS, f"{EDIT} {TARGETS} 0/2", f"{EDIT} {TARGETS} 1/2"], f"{EDIT} --set batch_size=1 --merge"),
    "evaluate": ([MOMENTS, EDIT], EVALUATE),
    "zsre": ([MOMENTS, EDIT], f"{EVALUATE} --protocol zsre"),
    "apply": ([MOMENTS, EDIT], f"{APPLY} --out checkpoint"),
    "lora": ([MOMENTS, EDIT], f"{APPLY} --format lora --out adapter"),
    "report": ([TRACE, "select run"], "report run"),
    "run": ([], RUN),
    "tune": ([], f"{TUNE} --out tuned"),
    "train mend": ([], f"{MEND} --out mend.safetensors"),
    "session": ([], "session session"),
}
"""Each command that writes, after those that make what it reads."""


@dataclass(frozen=True)
class Command:
    """A command, the folder in which it begins, and what it does there when nothing interrupts it."""

    zygote: Zygote
    name: str
    arguments: list[str]
    before: Path
    uninterrupted: Ended
    expected: dict[str, bytes | None]

    def copy(self, folder: Path) -> Path:
        """A new copy of the folder in which it begins."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.before, folder, symlinks=True)
        return folder

    def run(self, folder: Path, **limits: float | bool | None) -> Ended:
        """Run it in a folder."""
        return run(self.zygote, self.name, " ".join(self.arguments), folder, **limits)

    @property
    def written(self) -> list[int]:
        """Sizes of the files that it writes, ascending."""
        before = contents(self.before)
        return sorted(len(data) for name, data in self.expected.items() if data and before.get(name) != data)


def run(zygote: Zygote, name: str, words: str, folder: Path, **limits: float | bool | None) -> Ended:
    """Run a command in a folder."""
    return zygote.run(words.split(), folder, sketched=name != "report" or KILLS < 10, **limits)


@pytest.fixture(scope="module")
def prepare(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Path]:
    """Makes the folder in which a command begins, by those that come before it; each chain of them runs once."""
    folders: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("prepared")

    def prepared(commands: list[str]) -> Path:
        key = "\n".join(commands)
        if key not in folders:
            before = prepared(commands[:-1]) if commands else None
            folder = folders[key] = root / str(len(folders))
            if before:
                shutil.copytree(before, folder)
                ended = run(zygote, "", commands[-1], folder)
                assert ended.code in (0, 3), ended.printed
            else:
                folder.mkdir()
                write_data(folder)
        return folders[key]

    return prepared


@pytest.fixture(scope="module", params=COMMANDS)
def command(
    request: pytest.FixtureRequest,
    zygote: Zygote,
    prepare: Callable[[list[str]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Command:
    """A command that has been run once."""
    earlier, words = COMMANDS[request.param]
    before, folder = prepare(earlier), tmp_path_factory.mktemp("uninterrupted") / "folder"
    shutil.copytree(before, folder)
    ended = run(zygote, request.param, words, folder)
    assert ended.code in (0, 3), ended.printed
    expected = contents(folder)
    shutil.rmtree(folder)
    assert differences(before, expected), "the command writes"
    parts = request.param == "trace shard"
    assert parts == any("trace_parts" in Path(name).parts for name in expected), "all else leaves none"
    return Command(zygote, request.param, words.split(), before, ended, expected)


def contents(folder: Path) -> dict[str, bytes | None]:
    """The bytes of every file below a folder, hidden ones too, and None for each folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def differences(folder: Path, expected: dict[str, bytes | None]) -> list[str]:
    """Names of what differs."""
    actual = contents(folder)
    return sorted({name for name, _ in {*actual.items()} ^ {*expected.items()}})


SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
"""What ends commands."""


def killed(command: Command, folder: Path, draw: random.Random, *, at_change: bool, late: bool) -> str:
    """Run a command and kill or interrupt it at a random moment, in a folder in which it begins; the moment in words.

    Args:
        command: the command.
        folder: where it runs.
        draw: draws the moment.
        at_change: whether the moment is one before a change in the folder.
        late: whether that is one of the last changes, by which what is of no more use is removed.
    """
    latest = command.uninterrupted.changes if at_change else command.uninterrupted.seconds
    number = draw.choice(SIGNALS)
    while True:
        earliest = max(1, int(latest) - 9) if late else 1
        moment = draw.randint(earliest, max(earliest, int(latest))) if at_change else draw.uniform(0, latest)
        limits = {"kill_at" if at_change else "kill_after": moment, "signal": number}
        ended = command.run(command.copy(folder), **limits)
        if ended.code in (-number, 130):
            if ended.code == 130:
                check_interrupted(ended)
            when = f"change {moment} of {latest}" if at_change else f"{moment:.3f} of {latest:.3f} seconds"
            return f"{number.name} at {when}"
        assert ended.code == command.uninterrupted.code, ended.printed
        latest = moment  # it ended before that


def check_interrupted(ended: Ended) -> None:
    """What has to hold of a command that was interrupted: it says so in one line."""
    assert "Traceback" not in ended.printed
    assert ended.refusals == [INTERRUPTED], ended.printed


def test_a_killed_command_gives_the_bytes_of_one_that_nothing_interrupted(command: Command, tmp_path: Path) -> None:
    draw, folder, midway = random.Random(f"{SEED} {command.name}"), tmp_path / "killed", 0
    for number in range(KILLS):
        moment = killed(command, folder, draw, at_change=bool(number % 2), late=number % 4 == 1)
        midway += bool(differences(folder, contents(command.before)) and differences(folder, command.expected))
        again = command.run(folder)
        assert again.code == command.uninterrupted.code or "exists" in again.printed, f"{moment}: {again.printed}"
        assert not differences(folder, command.expected), f"killed at {moment}"
    leave_as_killed(command, folder)
    finished = command.run(folder)
    assert finished.code == command.uninterrupted.code or "exists" in finished.printed, finished.printed
    assert not differences(folder, command.expected), "a finished command changes nothing, and sweeps"
    assert midway or KILLS < 10, "some kills leave a part of the files"
    print(f"{command.name}: {KILLS} kills, {midway} with a part of the files there; seed {SEED}")


def leave_as_killed(command: Command, folder: Path) -> None:
    """Leave what a process does that is killed after its last file: the empty folder in which it wrote it."""
    changed = differences(command.before, command.expected)
    written = {Path(name).parent for name in changed if command.expected.get(name)}
    # These refuse to begin where their file or folder is.
    for parent in {Path()} if command.name in ("edit", "edit merge", "apply", "lora") else written:
        (folder / parent / f".file.mechedit-{host_name()}-{NO_PROCESS}-1-{'0' * 8}").mkdir()
    assert differences(folder, command.expected)


def check_full(ended: Ended, command: Command, folder: Path, reason: str) -> None:
    """What has to hold of a command whose disk was full."""
    assert ended.code == 2, ended.printed
    assert "Traceback" not in ended.printed
    assert len(ended.refusals) == 1, ended.printed
    assert reason in ended.refusals[0]
    before, actual = contents(command.before), contents(folder)
    assert not [name for name in actual if ".mechedit-" in name or name.endswith(".lock")]
    for name, data in actual.items():
        if data is None or data in (before.get(name), command.expected.get(name)):
            continue
        if name in command.expected and Path(name).suffix == ".safetensors":
            with open_tensors(folder / name) as reader:
                (key,) = reader.metadata()
            read_tensors(folder / name, key)  # a checkpoint, which is whole by its checksums
        elif name in command.expected:  # stamps, and the seconds of a search, come with each step
            json.loads(data)
            assert Path(name).name in ("config.json", "drawn.json") or "ledger" in Path(name).parts, f"half of {name}"


def check_again(command: Command, folder: Path) -> None:
    """With space, the same command gives the same bytes."""
    if not differences(folder, contents(command.before)):
        return  # it is what the uninterrupted run began with
    again = command.run(folder)
    assert again.code == command.uninterrupted.code, again.printed
    assert not differences(folder, command.expected)


def test_files_that_may_not_grow_end_a_command_in_one_line(command: Command, tmp_path: Path) -> None:
    draw = random.Random(f"{SEED} {command.name}")
    for _ in range(DISKS):
        folder, limit = command.copy(tmp_path / "full"), draw.randrange(draw.choice(command.written))
        ended = command.run(folder, largest=limit)
        check_full(ended, command, folder, "File too large")
        check_again(command, folder)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts file systems of a size; the one before is gone."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def unmount() -> None:
        if os.path.ismount(disk):
            subprocess.run(["umount", str(disk)], check=True)

    def mount(size: int) -> Path:
        unmount()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
        if ended.returncode:
            pytest.skip(f"this machine mounts no file system: {ended.stderr.strip()}")
        return disk

    yield mount
    unmount()


def pages(folder_contents: dict[str, bytes | None]) -> int:
    """Bytes that files take on a disk of pages."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(-(-len(data) // page) * page for data in folder_contents.values() if data)


def test_a_full_disk_ends_a_command_in_one_line(
    command: Command, mounted: Callable[[int], Path], tmp_path: Path
) -> None:
    draw, before = random.Random(f"{SEED} {command.name}"), pages(contents(command.before))
    for _ in range(DISKS):
        free = pages(command.expected) - before
        while free > 0:
            free = draw.randrange(free)
            folder = command.copy(mounted(before + free + os.sysconf("SC_PAGE_SIZE")) / "full")
            ended = command.run(folder)
            if ended.code != command.uninterrupted.code:
                break  # else that much was enough
        else:
            return  # it removes more than it writes
        check_full(ended, command, folder, "No space left on device")
        shutil.rmtree(tmp_path / "roomy", ignore_errors=True)
        check_again(command, Path(shutil.copytree(folder, tmp_path / "roomy")))


def test_folders_that_nobody_may_write_to_are_refused_in_one_line(command: Command, tmp_path: Path) -> None:
    folder = command.copy(tmp_path / "unwritable")
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    ended = command.run(folder, unprivileged=True)
    for path in folders:
        path.chmod(0o755)
    assert ended.code == 2, ended.printed
    assert len(ended.refusals) == 1, ended.printed
    assert "Permission denied" in ended.refusals[0]
    assert not differences(folder, contents(command.before))
    check_again(command, folder)


def test_what_a_killed_training_left_goes_when_the_same_command_runs_again(
    zygote: Zygote, prepare: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    folder, words = tmp_path / "left", COMMANDS["train mend"][1]
    shutil.copytree(prepare([]), folder)
    assert run(zygote, "train mend", words, folder).code == 0
    expected = contents(folder)
    shutil.copy(folder / "mend.safetensors", folder / "mend.training.safetensors")
    assert differences(folder, expected), "the control"
    assert run(zygote, "train mend", words, folder).code == 0
    assert not differences(folder, expected)


READ = (
    ("moments", "texts.txt"), ("edit", "requests.json"), ("edit", "run/moments/layer_1.safetensors"),
    ("select", "run/effects.parquet"), ("select", "run/config.json"), ("validate", "run/facts.parquet"),
    ("evaluate", "edit.safetensors"), ("report", "run/selection.json"), ("lora", "edit.safetensors"),
)  # fmt: skip
"""Commands, and files that they read."""


@pytest.mark.parametrize(("name", "file"), READ)
def test_files_that_nobody_may_read_are_refused_in_one_line(
    zygote: Zygote, prepare: Callable[[list[str]], Path], tmp_path: Path, name: str, file: str
) -> None:
    earlier, words = COMMANDS[name]
    before = prepare(earlier)
    folder = Path(shutil.copytree(before, tmp_path / "unreadable"))
    (folder / file).chmod(0)
    ended = run(zygote, name, words, folder, unprivileged=True)
    (folder / file).chmod(0o644)
    assert ended.code == 2, ended.printed
    assert len(ended.refusals) == 1, ended.printed
    assert "Permission denied" in ended.refusals[0]
    assert file in ended.refusals[0]
    assert not {name for name in differences(folder, contents(before)) if not (folder / name).is_dir()}
