"""A disk that takes no more: one line that names the file and the reason, and nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.edits import random_edit
from tqdm import tqdm

from mechedit.atomic import atomic, atomic_folder
from mechedit.cli import main
from mechedit.disk_errors import disk_error
from mechedit.edit import export, export_lora
from mechedit.errors import InputError
from mechedit.figures.style import draw, save_figure
from mechedit.files import write_json, write_parquet, write_parquet_parts
from mechedit.files import write_tensors as write_safetensors

KILOBYTES = 200
"""Size of the largest file that the limited disk takes."""
NUMBERS = np.random.default_rng(0).normal(size=200_000)
FRAME = pd.DataFrame({"score": NUMBERS})


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let this process write no larger files; the system answers as a full disk does, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_npz(path: Path) -> None:
    with atomic(path) as temporary:
        np.savez(temporary, numbers=NUMBERS)


def write_figure(path: Path) -> None:
    def noise(ax: Any) -> Any:
        ax.imshow(NUMBERS.reshape(400, 500))
        return ax

    save_figure(draw(noise, width=8.0, height=8.0), path.parent, path.stem)


def write_folder(path: Path) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "small").write_bytes(b"1")
        (temporary / "large").write_bytes(NUMBERS.tobytes())


WRITERS: dict[str, Callable[[Path], object]] = {
    "file.json": lambda path: write_json(path, NUMBERS.tolist()),
    "file.parquet": lambda path: write_parquet(path, FRAME),
    "parts.parquet": lambda path: write_parquet_parts(path, (FRAME[:20_000] for _ in range(9)), {}),
    "file.safetensors": lambda path: write_safetensors(path, {"x": torch.from_numpy(NUMBERS)}, "key", {}),
    "file.npz": write_npz,
    "file.pdf": write_figure,
    "folder": write_folder,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_is_refused_in_one_line_and_none_is_left(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "file.json", "as it was")
    with files_of_at_most(KILOBYTES * 1024), pytest.raises(InputError, match=name.split(".")[0]) as refusal:
        WRITERS[name](tmp_path / name)
    assert "File too large" in str(refusal.value)
    assert "free space" in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
    assert (tmp_path / "file.json").read_text() == '"as it was"\n'
    WRITERS[name](tmp_path / name)
    assert (tmp_path / name).exists(), "without the limit it is written"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"this machine mounts no file system: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_as_such(small_disk: Path, name: str) -> None:
    (small_disk / "full").write_bytes(bytes(1_900_000))
    with pytest.raises(InputError, match="No space left on device"):
        WRITERS[name](small_disk / name)
    assert [path.name for path in small_disk.iterdir()] == ["full"]


@pytest.mark.parametrize("write", [export, export_lora])
def test_an_export_leaves_nothing_on_a_full_disk(lens_model: Any, tmp_path: Path, write: Callable[..., None]) -> None:
    edit = random_edit(lens_model)
    with files_of_at_most(1024), pytest.raises(InputError, match=r"cannot write .*out.*File too large"):
        write(lens_model, edit, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    write(lens_model, edit, tmp_path / "out")
    assert (tmp_path / "out" / "mechedit.json").exists()


def test_only_errors_of_a_disk_count_as_such() -> None:
    """Also where a library in Rust gives only a message, or raises another error when it cleans up."""
    full = OSError(errno.ENOSPC, "No space left on device")
    cleanup = ValueError("the file is not closed")
    cleanup.__context__ = full
    for error in (full, Exception("No space left on device (os error 28)"), cleanup):
        assert disk_error(error) == "No space left on device"
    for error in (ValueError("a bug"), OSError("no such tokenizer"), KeyError("x"), OSError(errno.EPIPE, "pipe")):
        assert disk_error(error) is None
    refusal = InputError("an argument")
    refusal.__cause__ = full
    assert disk_error(refusal) is None, "what was explained already keeps its message"


@pytest.mark.parametrize(
    ("error", "code", "beginning"),
    [(InputError("it is full"), 2, "mechedit: it is full"), (KeyboardInterrupt(), 130, "mechedit: interrupted")],
)
def test_what_ends_a_command_is_said_below_its_bars(
    monkeypatch: Any, tmp_path: Path, capsys: Any, error: BaseException, code: int, beginning: str
) -> None:
    """Where a generator holds a bar, the error's traceback holds the generator."""

    def rows() -> Iterator[int]:
        with tqdm(total=2, desc="rows") as bar:
            for number in range(2):
                yield number
                bar.update()

    def fail(*arguments: Any) -> None:
        for _ in rows():
            raise error

    monkeypatch.setattr("mechedit.cli.options.load_quietly", fail)
    with pytest.raises(SystemExit) as leaving:
        main(["trace", "--out", str(tmp_path / "run")])
    assert leaving.value.code == code
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert any(line.startswith("rows:   0%") for line in lines), "the control: a bar was open"
    assert sum(line.startswith(beginning) for line in lines) == 1


@pytest.mark.parametrize("refusal", [OSError(errno.ENOENT, "gone"), InputError("it cannot be read"), KeyError("x")])
def test_an_interrupt_stays_one_where_cleaning_up_after_it_fails(
    monkeypatch: Any, tmp_path: Path, capsys: Any, refusal: Exception
) -> None:
    """As in a library that closes what is no longer there."""

    def interrupt(*arguments: Any) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise refusal

    monkeypatch.setattr("mechedit.cli.options.load_quietly", interrupt)
    with pytest.raises(SystemExit) as leaving:
        main(["trace", "--out", str(tmp_path / "run")])
    assert leaving.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("mechedit: interrupted")
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "file"):
        interrupt()
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_it_in_one_line(monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    """Where no writer of ours has caught it, such as when a library fills its own cache."""

    def fill(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/of/a/library")

    monkeypatch.setattr("mechedit.cli.options.load_quietly", fill)
    with pytest.raises(SystemExit) as leaving:
        main(["trace", "--out", str(tmp_path / "run")])
    assert leaving.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mechedit: ")]
    assert "'/cache/of/a/library' cannot be read or written (No space left on device)" in line

    def break_down(*arguments: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("mechedit.cli.options.load_quietly", break_down)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["trace", "--out", str(tmp_path / "run")])
