"""A run folder: what is reused, what is refused, and what is made again, of new results and of older ones."""

from __future__ import annotations

import hashlib
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import call, complaint

import mechedit as me
from mechedit import pipeline, provenance, run_folder
from mechedit.cache import PARQUET, Codec
from mechedit.errors import InputError
from mechedit.files import read_json, read_tensors, write_json, write_tensors
from mechedit.models import backend
from mechedit.moments import moment_path
from mechedit.provenance import ALGORITHMS
from mechedit.run_folder import RunFolder

MODEL = {
    "mechedit": "0.1.0",
    "model": "tiny",
    "backend": "transformer_lens",
    "weights_hash": "w",
    "tokenizer_hash": "t",
    "dtype": "float32",
    "module": "mlp",
}
STAMP = {"model": MODEL, "facts": "f", "settings": {"samples": 3, "roles": ("subject_last",)}}
NUMBER: Codec[int] = Codec(read=read_json, write=write_json, suffix=".json")


def step(folder: RunFolder | Path, value: int = 1, **changes: Any) -> int:
    """Make the step `trace`, whose result is a number, unless it is there."""
    run = folder if isinstance(folder, RunFolder) else RunFolder.at(folder)
    return run.step("trace", {**STAMP, **changes}, lambda: value, NUMBER, at="number.json")


def restamp(folder: Path, **changes: Any) -> None:
    """Change the stamp of the step; None removes a field."""
    config = read_json(folder / "config.json")
    stamp = {**config["steps"]["trace"], **changes}
    config["steps"]["trace"] = {name: field for name, field in stamp.items() if field is not None}
    write_json(folder / "config.json", config)


def test_a_step_is_made_once_and_its_stamp_says_all_that_went_in(tmp_path: Path) -> None:
    assert step(tmp_path, 1) == 1
    assert step(tmp_path, 2) == 1
    assert RunFolder.at(tmp_path).stamps()["trace"] == {
        "algorithm": ALGORITHMS["trace"],
        **STAMP,
        "settings": {"samples": 3, "roles": ["subject_last"]},
        "files": {"number.json": {"size": 2, "sha256": hashlib.sha256(b"1\n").hexdigest()}},
    }


@pytest.mark.parametrize("field", ["model", "backend", "mechedit"])
def test_names_backends_and_releases_do_not_decide(tmp_path: Path, field: str) -> None:
    step(tmp_path, 1)
    assert step(tmp_path, 2, model={**MODEL, field: "other"}) == 1
    assert RunFolder.at(tmp_path).stamps()["trace"]["model"][field] == MODEL[field], "the record says how it was made"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {**MODEL, "weights_hash": "v"}}, "model.weights_hash = 'w', expected 'v'"),
        ({"model": {**MODEL, "tokenizer_hash": "v"}}, "model.tokenizer_hash"),
        ({"model": {**MODEL, "dtype": "float16"}}, "model.dtype"),
        ({"model": {**MODEL, "module": "attn"}}, "model.module = 'mlp', expected 'attn'"),
        ({"facts": "g"}, "facts = 'f', expected 'g'"),
        ({"settings": {**STAMP["settings"], "samples": 4}}, "settings.samples = 3, expected 4"),
    ],
)
def test_other_input_is_refused_by_name_and_replaced_only_on_demand(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    step(tmp_path, 1)
    with pytest.raises(InputError, match=f"the trace in .* was made with {named}.*--overwrite"):
        step(tmp_path, 2, **changes)
    assert step(tmp_path, 3) == 1, "what was refused has changed nothing"
    assert step(RunFolder.at(tmp_path, overwrite=True), 4) == 1, "the same input is not made again"
    assert step(RunFolder.at(tmp_path, overwrite=True), 5, **changes) == 5
    assert step(tmp_path, 6, **changes) == 5


@pytest.mark.parametrize(
    ("name", "noun"), [("evaluate", "evaluation"), ("finals", "last round of the sweep"), ("edit", "edit")]
)
def test_a_refused_step_is_called_by_a_noun(tmp_path: Path, name: str, noun: str) -> None:
    run = RunFolder.at(tmp_path)
    run.step(name, STAMP, lambda: 1, NUMBER, at="number.json")
    with pytest.raises(InputError, match=f"^the {noun} in .* was made with facts"):
        run.step(name, {**STAMP, "facts": "g"}, lambda: 1, NUMBER, at="number.json")


def test_another_algorithm_number_is_another_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step(tmp_path, 1)
    number = ALGORITHMS["trace"]
    monkeypatch.setitem(ALGORITHMS, "trace", number + 1)
    with pytest.raises(InputError, match=f"made with algorithm = {number}, expected {number + 1}"):
        step(tmp_path, 2)
    assert step(RunFolder.at(tmp_path, overwrite=True), 3) == 3


def test_a_stamp_without_a_number_counts_as_of_algorithm_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a stamp was before there were numbers: without backend, and in the oldest without the edited module."""
    monkeypatch.setitem(ALGORITHMS, "trace", 1)
    step(tmp_path, 1)
    older = {name: value for name, value in MODEL.items() if name not in ("backend", "module")}
    restamp(tmp_path, algorithm=None, model=older)
    assert "algorithm" not in RunFolder.at(tmp_path).stamps()["trace"]
    assert step(tmp_path, 2) == 1
    monkeypatch.setitem(ALGORITHMS, "trace", 2)
    with pytest.raises(InputError, match="made with algorithm = 1, expected 2"):
        step(tmp_path, 3)


def test_a_step_without_its_files_or_its_stamp_is_made_again(tmp_path: Path) -> None:
    step(tmp_path, 1)
    (tmp_path / "number.json").unlink()
    assert step(tmp_path, 2) == 2
    (tmp_path / "config.json").unlink()
    assert step(tmp_path, 3) == 3


def test_an_interrupted_step_is_made_again(tmp_path: Path) -> None:
    step(tmp_path, 1)
    run = RunFolder.at(tmp_path, overwrite=True)

    def interrupted() -> int:
        write_json(tmp_path / "number.json", 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.step("trace", {**STAMP, "facts": "g"}, interrupted, NUMBER, at="number.json")
    assert "trace" not in run.stamps()
    assert step(tmp_path, 3) == 3, "a file that was replaced halfway is not taken for the former result"


def test_a_refused_step_leaves_the_former_result_as_it_was(tmp_path: Path) -> None:
    """Also its stamp, without which it would be made again."""
    step(tmp_path, 1)
    run = RunFolder.at(tmp_path, overwrite=True)
    run.step("edit", {"requests": "r"}, lambda: 7, NUMBER, at="edit.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refused(*, writes: bool = False) -> int:
        if writes:
            write_json(tmp_path / "number.json", 2)
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        run.step("trace", {**STAMP, "facts": "g"}, refused, NUMBER, at="number.json")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert step(tmp_path, 3) == 1
    with pytest.raises(InputError, match="no"):
        run.step("trace", {**STAMP, "facts": "g"}, partial(refused, writes=True), NUMBER, at="number.json")
    assert set(run.stamps()) == {"edit"}, "what it replaced is no former result"
    assert step(tmp_path, 3) == 3


def test_steps_do_not_touch_one_another(tmp_path: Path) -> None:
    step(tmp_path, 1)
    run = RunFolder.at(tmp_path)
    assert run.step("edit", {"requests": "r"}, lambda: 7, NUMBER, at="edit.json") == 7
    assert set(run.stamps()) == {"trace", "edit"}
    assert step(tmp_path, 2) == 1


def test_a_renamed_model_and_a_new_release_make_neither_trace_nor_moments_again(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the pipeline: the model's folder has another name, the backend is another, and mechedit is newer."""
    model, facts = me.load_model("tiny"), me.load_facts("known")[:4]
    config, reading = me.TraceConfig(samples=1, kinds=("state",), sever=("nothing",)), me.MomentsConfig(max_length=16)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(me.load_texts("tiny")[:600]))
    run = RunFolder.at(tmp_path / "run")
    n_facts = pipeline.trace_step(run, model, facts, config)["n_facts"]
    moments = pipeline.moments_step(run, model, texts, [2], reading)
    files = {path: path.stat().st_mtime_ns for path in run.path.rglob("*.*") if path.name != "config.json"}
    assert len(files) == 3

    folder = tmp_path / "renamed"
    shutil.copytree(Path(me.__file__).parent / "models" / "tiny", folder)
    renamed = me.load_model(str(folder), backend="nnsight")
    for module in (provenance, backend, run_folder):
        monkeypatch.setattr(module, "VERSION", "9.9")
    assert renamed.provenance() != model.provenance()
    assert renamed.identity() == model.identity()
    assert pipeline.trace_step(run, renamed, facts, config)["n_facts"] == n_facts
    again = pipeline.moments_step(run, renamed, texts, [2], reading)
    assert again[2].matrix.equal(moments[2].matrix)
    assert files == {path: path.stat().st_mtime_ns for path in run.path.rglob("*.*") if path.name != "config.json"}

    # Moments from before there were numbers count as of algorithm 1.
    tensors, header = read_tensors(moment_path(run.path, 2), "provenance")
    assert header.pop("algorithm") == ALGORITHMS["moments"]
    write_tensors(moment_path(run.path, 2), tensors, "provenance", header)
    before = moment_path(run.path, 2).stat().st_mtime_ns
    pipeline.moments_step(run, renamed, texts, [2], reading)
    assert moment_path(run.path, 2).stat().st_mtime_ns == before

    monkeypatch.setitem(ALGORITHMS, "moments", 2)
    with pytest.raises(InputError, match="made with algorithm = 1, expected 2"):
        pipeline.moments_step(run, renamed, texts, [2], reading)


@pytest.mark.parametrize("file", ["config.json", "number.json"])
@pytest.mark.parametrize("to", [".", "/dev/full"])
def test_what_cannot_be_replaced_is_seen_before_the_work(tmp_path: Path, file: str, to: str) -> None:
    (tmp_path / file).symlink_to(to)
    made: list[int] = []

    def make() -> int:
        made.append(1)
        return 1

    folder = RunFolder.at(tmp_path)
    with pytest.raises(InputError, match=f"{file}' is a folder, a pipe, a socket or a device"):
        folder.step("trace", STAMP, make, NUMBER, at="number.json")
    assert made == []
    (tmp_path / file).unlink()
    assert folder.step("trace", STAMP, make, NUMBER, at="number.json") == len(made) == 1, "the control"


def test_a_folder_in_the_place_of_the_summary_is_seen_before_scoring(lens_model: Any, tmp_path: Path) -> None:
    (tmp_path / "summary.json").mkdir()
    requests, config = me.load_requests("tiny")[:1], me.EvaluationConfig()
    with pytest.raises(InputError, match=r"summary\.json' is a folder"):
        pipeline.evaluate_step(RunFolder.at(tmp_path), lens_model, requests, None, config)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["summary.json"]


def test_a_refused_first_step_writes_nothing(tmp_path):
    folder = RunFolder.at(tmp_path / "run")

    def refused() -> Any:
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        folder.step("trace", {"model": MODEL}, refused, PARQUET, at="effects.parquet")
    assert [path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "words",
    [
        ["edit", "--layers=1", "--moments=new/deeper", "--out=new/deeper/edit.safetensors"],
        ["edit", "--layers=1", "--requests=none.json", "--out=new/deeper/edit.safetensors"],
        ["train-mend", "--requests=none.json", "--out=new/deeper/mend.safetensors"],
        ["tune", "--requests=none.json", "--out=new/deeper"],
        ["moments", "--layers=99", "--out=new/deeper"],
        ["apply", "--edit=none.safetensors", "--out=new/deeper/model"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_refused_command_leaves_no_empty_folder(tmp_path, monkeypatch, capsys, lens_model, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mechedit.cli.options.load_quietly", lambda *arguments: lens_model)
    complaint(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_command_leaves_no_empty_folder(tmp_path, monkeypatch):
    def interrupt(*arguments: object) -> None:
        assert (tmp_path / "new" / "deeper").is_dir(), "the control"
        raise KeyboardInterrupt

    monkeypatch.setattr("mechedit.cli.options.load_quietly", interrupt)
    (tmp_path / "before").mkdir()
    assert call("trace", f"--out={tmp_path}/new/deeper") == 130
    assert call("trace", f"--out={tmp_path}/before/../new/deeper") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["before"], "what was there before stays"
