"""Finished work: read again when all that determines it is the same, and never half there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.edits import random_edit

import mechedit as me
from mechedit import Edit
from mechedit.cache import CACHE_VARIABLE, PARQUET, Cache, Codec, cache_folder, codec_of
from mechedit.errors import InputError
from mechedit.methods.tuned_settings import TUNED_VARIABLE, tuned_folder
from mechedit.models import ModelShapes

EDIT = codec_of(Edit, suffix=".safetensors")


class Maker:
    """Makes a table and counts how often."""

    def __init__(self, error: type[BaseException] | None = None) -> None:
        self.count, self.error = 0, error

    def __call__(self) -> pd.DataFrame:
        self.count += 1
        if self.error is not None:
            raise self.error
        frame = pd.DataFrame({"fact": ["a", "b"], "score": [0.25, float("nan")]})
        frame.attrs = {"n": 2, "why": {"reason": "none"}}
        return frame


def test_a_result_is_made_once_and_read_again_as_it_was(tmp_path: Path) -> None:
    make, cache = Maker(), Cache.at(tmp_path / "parts")
    assert cache.read({"layer": 3}, PARQUET) is None
    first = cache.get({"layer": 3, "seed": 0}, make, PARQUET)
    again = cache.get({"seed": 0, "layer": 3}, make, PARQUET)
    assert make.count == 1, "the order of a key's fields does not matter"
    pd.testing.assert_frame_equal(again, first)
    assert again.attrs == first.attrs
    cache.get({"layer": 4, "seed": 0}, make, PARQUET)
    assert make.count == 2
    assert len(list((tmp_path / "parts").iterdir())) == 2


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make = Maker()
    for _ in range(2):
        Cache.at(None).get("key", make, PARQUET)
    assert make.count == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_is_interrupted_leaves_nothing_and_is_made_again(tmp_path: Path, error: type[BaseException]) -> None:
    cache, make = Cache.at(tmp_path), Maker()
    with pytest.raises(error):
        cache.get("key", Maker(error), PARQUET)

    def broken(path: Path, frame: pd.DataFrame) -> None:
        assert PARQUET.write is not None
        PARQUET.write(path.with_name("other.parquet"), frame)
        raise error

    with pytest.raises(error):
        cache.get("key", make, Codec(read=pd.read_parquet, write=broken, suffix=".parquet"))
    assert [path.name for path in tmp_path.iterdir()] == ["other.parquet"], "the file of the key is whole or absent"
    cache.get("key", make, PARQUET)
    assert make.count == 2


def test_an_edit_is_kept_with_its_manifest(lens_model: Any, tmp_path: Path) -> None:
    cache, edit = Cache.at(tmp_path), random_edit(lens_model)
    assert cache.get("edit", lambda: edit, EDIT) is edit
    loaded = cache.get("edit", pytest.fail, EDIT)
    assert loaded.manifest == edit.manifest
    for layer in edit.layers:
        assert torch.equal(loaded.delta(layer), edit.delta(layer))


def test_the_home_of_a_user_who_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = "~no-such-user-of-this-machine/folder"
    for variable, folder in ((CACHE_VARIABLE, cache_folder), (TUNED_VARIABLE, tuned_folder)):
        monkeypatch.setenv(variable, nobody)
        with pytest.raises(me.InputError, match="the home of a user who is not known"):
            folder()
        monkeypatch.setenv(variable, "~/folder")
        assert folder() == Path.home() / "folder", "the control"
    for read in (me.load_model, ModelShapes.of_config):
        with pytest.raises(me.InputError, match="the home of a user who is not known"):
            read(nobody)


def test_a_damaged_file_is_refused_and_not_made_again(lens_model: Any, tmp_path: Path) -> None:
    cache = Cache.at(tmp_path)
    cache.get("edit", lambda: random_edit(lens_model), EDIT)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="cut short"):
        cache.get("edit", pytest.fail, EDIT)


def test_a_result_of_several_files_is_finished_when_all_are_there(tmp_path: Path) -> None:
    codec: Codec[int] = Codec(read=lambda folder: 1, files=("a.json", "b.json"))
    assert not codec.finished(tmp_path)
    (tmp_path / "a.json").touch()
    assert not codec.finished(tmp_path)
    (tmp_path / "b.json").touch()
    assert codec.finished(tmp_path)
