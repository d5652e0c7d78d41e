"""Damage that reading alone does not notice: a bit that flipped, rows that are gone, a layer that is missing."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.run_folder import write_run, write_steps
from safetensors import safe_open
from safetensors.torch import save_file
from test_run_folder import NUMBER, STAMP, step

import mechedit as me
from mechedit import checksums, pipeline, run_folder
from mechedit.cache import PARQUET, Cache
from mechedit.cli import main
from mechedit.edit import Edit, Factors
from mechedit.errors import InputError
from mechedit.figures import run_figures
from mechedit.files import (
    read_checked_object,
    read_header,
    read_json,
    read_tensors,
    write_checked_json,
    write_json,
    write_tensors,
)
from mechedit.report import write_report
from mechedit.run_folder import RunFolder, check_step
from mechedit.selection import SelectConfig, Selection
from mechedit.session.metrics import HistoryEntry
from mechedit.session.session_folder import SessionFolder


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Flip one bit of a file; the same call flips it back."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def small_edit(layers: tuple[int, ...] = (1, 2)) -> Edit:
    draw = torch.Generator().manual_seed(0)
    factors = {
        layer: Factors(left=torch.randn(3, 2, generator=draw), right=torch.randn(2, 3, generator=draw))
        for layer in layers
    }
    manifest = {
        "method": "test", "layers": list(layers), "model": {"weights_hash": "ab"}, "facts": ["É → ü"],
        "settings": {"lr": 0.1},
    }  # fmt: skip
    return Edit(factors=factors, manifest=manifest)


def is_same(first: Edit, second: Edit) -> bool:
    return first.manifest == second.manifest and all(
        torch.equal(getattr(first.factors[layer], side), getattr(second.factors[layer], side))
        for layer in first.layers
        for side in ("left", "right")
    )


def without_checksums(path: Path, *layers: int, **changes: Any) -> None:
    """Write an edit again as an older release would have, with some layers and fields changed."""
    with safe_open(path, framework="pt") as reader:
        manifest = json.loads(reader.metadata()["manifest"])
        tensors = {name: reader.get_tensor(name).clone() for name in reader.keys()}  # noqa: SIM118
    assert {"sha256", "header_sha256"} <= manifest.keys(), "what mechedit writes has them"
    del manifest["sha256"], manifest["header_sha256"]
    present = {name: tensor for name, tensor in tensors.items() if int(name.split(".")[1]) in layers}
    save_file(present, path, metadata={"manifest": json.dumps({**manifest, **changes})})


def test_no_flipped_bit_of_an_edit_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    edit = small_edit()
    edit.save(path)
    assert is_same(Edit.load(path), edit)
    size, accepted = path.stat().st_size, 0
    for at in range(size):
        flip(path, at, at % 8)
        with contextlib.suppress(InputError):
            assert is_same(Edit.load(path), edit), f"byte {at} of {size}"
            accepted += 1
        flip(path, at, at % 8)
    assert accepted < size / 50, "only the spaces that fill the header up hold nothing"
    assert is_same(Edit.load(path), edit)


def test_an_edit_that_lacks_a_layer_of_its_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    small_edit((1, 2, 3)).save(path)
    tensors, manifest = read_tensors(path, "manifest")
    with safe_open(path, framework="pt") as reader:
        metadata = reader.metadata()
    save_file({name: tensor for name, tensor in tensors.items() if ".2." not in name}, path, metadata=metadata)
    with pytest.raises(InputError, match=r"edit\.safetensors.*header does not match.*mechedit edit"):
        Edit.load(path)
    with pytest.raises(InputError, match="header does not match"):
        read_header(path, "manifest")
    small_edit((1, 2, 3)).save(path)
    without_checksums(path, 1, 3)
    with pytest.raises(InputError, match=r"holds the layers \[1, 3\] and lacks \[2\].*mechedit edit"):
        Edit.load(path)
    small_edit((1, 2, 3)).save(path)
    without_checksums(path, 1, 2, 3, method="older")
    assert Edit.load(path).manifest == {**manifest, "method": "older"}, "without checksums it is read unchecked"
    assert "sha256" not in manifest, "an edit's manifest is the same made and loaded"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file count as large."""
    monkeypatch.setattr(checksums, "LARGE", 1)


@pytest.mark.usefixtures("large")
def test_of_large_files_the_header_is_always_checked_and_the_content_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    small_edit().save(path)
    content = path.read_bytes()
    flip(path, len(content) - 1)
    assert Edit.load(path).layers == [1, 2]
    with me.verify_contents(), pytest.raises(InputError, match="content does not match its SHA-256"):
        Edit.load(path)
    path.write_bytes(content)
    flip(path, content.index(b"weights_hash") + len('weights_hash\\": \\"'))
    with pytest.raises(InputError, match="header does not match its SHA-256"):
        Edit.load(path)
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match="cut short"):
        Edit.load(path)


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("manifest", "mechedit edit"),
        ("provenance", "mechedit moments"),
        ("targets", "finds these targets again"),
        ("batch", "all later ones"),
    ],
)
def test_all_tensors_are_checked_and_say_how_they_are_made_again(tmp_path: Path, key: str, remedy: str) -> None:
    path = tmp_path / "file.safetensors"
    tensors = {"half": torch.ones(3, dtype=torch.bfloat16), "none": torch.ones(0, 2), "scalar": torch.tensor(1.5)}
    write_tensors(path, tensors, key, {"layer": 3, "share": (0, 1)})
    read, header = read_tensors(path, key)
    assert header == read_header(path, key) == {"layer": 3, "share": [0, 1]}
    assert all(read[name].equal(tensor) for name, tensor in tensors.items())
    flip(path, path.stat().st_size - 1)
    with pytest.raises(InputError, match=f"{path.name}.*SHA-256.*{remedy}"):
        read_tensors(path, key)


@pytest.mark.parametrize("damage", ["cut", "flip", "longer"])
def test_a_damaged_file_of_a_step_is_refused_and_made_again_on_demand(tmp_path: Path, damage: str) -> None:
    step(tmp_path, 1)
    assert step(tmp_path, 2) == 1
    path = tmp_path / "number.json"
    path.write_bytes({"cut": b"1", "flip": b"3\n", "longer": b"1\n\n"}[damage])
    with pytest.raises(InputError, match=r"number\.json' is not as the trace wrote it.*--overwrite.*mechedit trace"):
        step(tmp_path, 2)
    assert step(RunFolder.at(tmp_path, overwrite=True), 2) == 2
    assert step(tmp_path, 3) == 2
    path.unlink()
    assert step(tmp_path, 4) == 4


def test_stamps_from_before_there_were_checksums_are_read_unchecked(tmp_path: Path) -> None:
    step(tmp_path, 1)
    config = read_json(tmp_path / "config.json")
    assert set(config["steps"]["trace"].pop("files")["number.json"]) == {"size", "sha256"}
    write_json(tmp_path / "config.json", config)
    assert step(tmp_path, 2) == 1
    (tmp_path / "number.json").write_text("7")
    assert step(tmp_path, 2) == 7
    for files in ([], {"number.json": None}, {"number.json": {"size": "2"}}):
        config["steps"]["trace"]["files"] = files
        write_json(tmp_path / "config.json", config)
        with pytest.raises(InputError, match=r"number\.json|trace\.files"):
            step(tmp_path, 2)


@pytest.mark.usefixtures("large")
def test_of_a_steps_large_files_the_size_is_always_checked_and_the_content_on_demand(tmp_path: Path) -> None:
    step(tmp_path, 1)
    (tmp_path / "number.json").write_text("2\n")
    assert step(tmp_path, 3) == 2
    with me.verify_contents(), pytest.raises(InputError, match="SHA-256"):
        step(tmp_path, 3)
    (tmp_path / "number.json").write_text("22\n")
    with pytest.raises(InputError, match="it has 3 bytes, expected 2"):
        step(tmp_path, 3)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose stamps hold the checksums of its tables."""
    write_run(tmp_path, n_facts=10)
    steps = read_json(tmp_path / "config.json")["steps"]
    files = {"trace": ("effects.parquet", "facts.parquet"), "evaluate": pipeline.SCORES.files}
    for name, names in files.items():
        steps[name]["files"] = {file: run_folder._record(tmp_path / file) for file in names}
    write_steps(tmp_path, **steps)
    return tmp_path


@pytest.mark.parametrize("file", ["effects.parquet", "facts.parquet", "scores.parquet", "answers.parquet"])
def test_every_command_that_reads_a_table_notices_a_flipped_bit(run: Path, file: str) -> None:
    config = SelectConfig(resamples=100)
    readers: dict[str, Callable[[], object]] = {
        "report": lambda: write_report(run),
        "figures": lambda: run_figures(run),
        "select": lambda: pipeline.select_step(RunFolder(run), config, save=False),
    }
    reads = set(readers) if file in ("effects.parquet", "facts.parquet") else {"report"}
    size = (run / file).stat().st_size
    for at in random.Random(file).sample(range(size), 6):
        flip(run / file, at)
        for name in reads:
            with pytest.raises(InputError, match=f"{file}' is not as the .* wrote it"):
                readers[name]()
        flip(run / file, at)
    check_step(run, "trace", "evaluate")


@pytest.mark.usefixtures("large")
def test_the_option_verify_checks_the_contents_of_large_files(
    run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The page checks its files itself; to draw the figures takes a hundred times as long.
    monkeypatch.setattr("mechedit.cli.report.run_figures", Path)

    def code(*arguments: str) -> int:
        with pytest.raises(SystemExit) as leaving:
            main(["report", str(run), *arguments])
        return int(leaving.value.code or 0)

    text = (run / "scores.json").read_text()
    (run / "scores.json").write_text(text[:-1] + " ")
    assert code() == 0
    assert code("--verify") == 2
    assert "scores.json' is not as the evaluation wrote it" in capsys.readouterr().err
    (run / "scores.json").write_text(text)
    assert code("--verify") == 0


def test_a_damaged_part_of_an_unfinished_step_is_refused(tmp_path: Path) -> None:
    """Tables without a stamp have a checksum of each page."""
    numbers = np.random.default_rng(0).normal(size=20_000)
    frame, cache = pd.DataFrame({"score": numbers}), Cache.at(tmp_path)
    cache.write("key", frame, PARQUET)
    (path,) = tmp_path.iterdir()
    assert np.array_equal(PARQUET.read(path)["score"], numbers)
    at = path.read_bytes().index(numbers[10_000].tobytes()[:4])
    flip(path, at)
    with pytest.raises(InputError, match=f"{path.name}.*make it again"):
        cache.read("key", PARQUET)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=f"{path.name}.*make it again"):
        cache.read("key", PARQUET)


def test_a_damaged_session_is_refused(tmp_path: Path) -> None:
    folder = SessionFolder(path=tmp_path)
    settings, entry = {"method": "memit"}, HistoryEntry("ES", "all", 0.25)
    folder.save_settings(settings, [entry])
    assert folder.load_settings() == (settings, (entry,))
    path = tmp_path / "session.json"
    flip(path, path.read_text().index("0.25") + 2)
    with pytest.raises(InputError, match=r"session\.json' is not as it was written"):
        folder.load_settings()
    content = read_json(path)
    del content["sha256"]
    write_json(path, content)
    assert folder.load_settings() == (settings, (HistoryEntry("ES", "all", 0.35),)), "an older one is read unchecked"


def test_the_files_of_a_step_are_those_that_its_codec_names(tmp_path: Path) -> None:
    write_run(tmp_path)
    scores = me.Scores.load(tmp_path)
    folder = RunFolder.at(tmp_path / "new")
    folder.step("evaluate", STAMP, lambda: scores, pipeline.SCORES)
    written = {path.name for path in folder.path.iterdir()} - {"config.json"}
    assert set(folder.stamps()["evaluate"]["files"]) == written == set(pipeline.SCORES.files)
    folder.step("edit", STAMP, lambda: 1, NUMBER, at="edit.json")
    assert set(folder.stamps()["edit"]["files"]) == {"edit.json"}


@pytest.mark.parametrize("name", ["selection.json", "summary.json"])
def test_no_flipped_bit_of_a_selection_or_a_summary_goes_unnoticed(tmp_path: Path, name: str) -> None:
    """Layers, means and counts are digits, of which another one is as good."""
    content = {"layers": [2, 3], "stability": 0.25, "reason": "é", "before": {"ES": {"mean": 31.25, "n": 40}}}
    write_checked_json(tmp_path / name, content)

    def read() -> dict[str, Any]:
        return read_checked_object(tmp_path / name, remedy="make it again")

    def silently_changed() -> int:
        changed = 0
        for at in range((tmp_path / name).stat().st_size):
            flip(tmp_path / name, at, at % 7)
            with contextlib.suppress(InputError):
                # Where the checksum's own name is damaged, the fields are those that were written.
                changed += {field: read().get(field) for field in content} != content
            flip(tmp_path / name, at, at % 7)
        return changed

    assert read() == content
    assert not silently_changed()
    write_json(tmp_path / name, content)
    assert read() == content, "older ones have no checksum"
    assert silently_changed() > 5, "the control: bits whose flip nothing else notices"


def test_a_selection_that_was_changed_is_refused_by_all_that_read_it(tmp_path: Path, capsys: Any) -> None:
    write_run(tmp_path)
    selection = me.select_layers(pd.read_parquet(tmp_path / "effects.parquet"))
    selection.save(tmp_path / "selection.json")
    assert Selection.load(tmp_path / "selection.json") == selection
    changed = {**read_json(tmp_path / "selection.json"), "layers": [1]}
    write_json(tmp_path / "selection.json", changed)
    for read in (lambda: Selection.load(tmp_path / "selection.json"), lambda: write_report(tmp_path),
                 lambda: run_figures(tmp_path)):  # fmt: skip
        with pytest.raises(InputError, match=r"selection\.json' is not as it was written.*select again"):
            read()
    with pytest.raises(SystemExit) as leaving:
        main(["edit", "--selection", str(tmp_path / "selection.json"), "--out", str(tmp_path / "new.safetensors")])
    assert leaving.value.code == 2
    assert "is not as it was written" in capsys.readouterr().err


def test_a_summary_that_was_changed_is_refused_by_all_that_read_it(tmp_path: Path) -> None:
    write_run(tmp_path)
    summary = {"before": read_json(tmp_path / "summary.json")["before"]}
    write_checked_json(tmp_path / "summary.json", summary)
    (tmp_path / "effects.parquet").unlink()  # its figures take most of the time
    write_report(tmp_path)
    run_figures(tmp_path)
    written = read_json(tmp_path / "summary.json")
    written["before"]["ES"]["mean"] += 1
    write_json(tmp_path / "summary.json", written)
    for read in (write_report, run_figures):
        with pytest.raises(InputError, match=r"summary\.json' is not as it was written.*evaluate again"):
            read(tmp_path)
