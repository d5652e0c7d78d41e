"""Settings of a method: which source wins, what is refused, and that an edit says where its settings come from."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from mechedit import InputError, MemitConfig, apply_, recommended, undo_
from mechedit.data import EditRequest
from mechedit.methods import METHODS, TunedSettings, tuned_folder, tuned_folder_of, write_tuned
from mechedit.methods.recommendation import with_settings

REQUEST = EditRequest(id="a", subject="Leon Blum", prompt="The mother tongue of {} is", target_new="Korean")
RECORD = {"layers": [0, 1], "settings": {"clamp": 3.0, "steps": 2}, "trials": [{"S": 90.0, "seconds": 1.5}]}


@pytest.fixture
def checkpoint(lens_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that the model seems to be loaded from."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    monkeypatch.setattr(type(lens_model), "checkpoint", str(folder))
    monkeypatch.setenv("MECHEDIT_TUNED", str(tmp_path / "cache"))
    return folder


def test_the_strongest_source_wins(lens_model: Any, checkpoint: Path) -> None:
    assert recommended("memit", lens_model) == MemitConfig()
    (checkpoint / "editing.json").write_text('{"memit": {"clamp": 1.0, "steps": 7, "kl_weight": 0.5}}')
    assert recommended("memit", lens_model) == MemitConfig(clamp=1.0, steps=7, kl_weight=0.5)
    cached = write_tuned(tuned_folder_of(lens_model) / "tuned.json", lens_model, "memit", {**RECORD, "layers": [1]})
    assert METHODS["memit"].recommendation(lens_model).layers == (1,)
    beside = write_tuned(checkpoint / "tuned.json", lens_model, "memit", RECORD)
    settings = METHODS["memit"].recommendation(lens_model)
    assert settings.config == MemitConfig(clamp=3.0, steps=2, kl_weight=0.5)
    assert settings.layers == (0, 1)
    assert [(source.name, source.settings) for source in settings.sources] == [
        ("tuned.json", ("layers", "clamp", "steps")),
        ("editing.json", ("kl_weight",)),
    ], "each setting is claimed by the one file that it is taken from"
    assert settings.sources[0].hash == beside.hash != cached.hash
    without = METHODS["memit"].recommendation(lens_model, tuned=False)
    assert (without.config, without.layers) == (MemitConfig(clamp=1.0, steps=7, kl_weight=0.5), None)
    chosen = settings.changed({"clamp": 5.0})
    assert chosen.config == MemitConfig(clamp=5.0, steps=2, kl_weight=0.5)
    assert chosen.sources[0].settings == ("layers", "steps")


def test_a_setting_in_one_unit_replaces_a_weaker_one_in_the_other() -> None:
    tuned = {"relative_lr": 0.1, "relative_covariance_weight": 0.01}
    assert with_settings({"lr": 0.5, "covariance_weight": 100, "clamp": 2}, tuned) == {"clamp": 2, **tuned}
    assert with_settings(tuned, {"lr": 0.5}) == {"lr": 0.5, "relative_covariance_weight": 0.01}
    assert with_settings(tuned, {"convention": "memit-2022"}) == {"convention": "memit-2022"}
    by_text = {"convention": "paper"}
    assert with_settings({"kl_weight": 0.25, "weight_decay": 0.1, "clamp": 2}, by_text) == {"clamp": 2, **by_text}
    assert with_settings({"lr": 0.5}, {"clamp": 1}) == {"lr": 0.5, "clamp": 1}, "the control: what is not replaced"


def test_a_setting_is_claimed_by_no_source_that_another_unit_replaces(lens_model: Any, checkpoint: Path) -> None:
    (checkpoint / "editing.json").write_text('{"memit": {"covariance_weight": 100, "lr": 0.5, "kl_weight": 0.5}}')
    settings = {"relative_covariance_weight": 0.1, "steps": 2}
    write_tuned(checkpoint / "tuned.json", lens_model, "memit", {**RECORD, "settings": settings})
    taken = METHODS["memit"].recommendation(lens_model)
    assert [source.settings for source in taken.sources] == [("layers", *settings), ("lr", "kl_weight")]
    assert (taken.config.covariance_weight, taken.config.lr) == (None, 0.5)
    chosen = taken.changed({"relative_lr": 0.1})
    assert [source.settings for source in chosen.sources] == [("layers", *settings), ("kl_weight",)]
    assert [source.settings for source in taken.for_own_layers().sources] == [tuple(settings), ("lr", "kl_weight")]


def test_a_convention_replaces_what_a_file_says(lens_model: Any, checkpoint: Path) -> None:
    (checkpoint / "editing.json").write_text('{"memit": {"kl_weight": 0.25}}')
    settings = METHODS["memit"].recommendation(lens_model, tuned=False)
    assert settings.config.kl_weight == 0.25, "the control"
    assert settings.changed({"convention": "memit-2022"}).config.kl_weight == settings.config.kl_weight
    by_text = settings.changed({"convention": "paper"}).config
    assert by_text.kl_weight == by_text.weight_decay == 0.0
    with pytest.raises(InputError, match=r"kl_weight is 0\.25, expected 0\.0 with the convention 'paper'"):
        settings.changed({"convention": "paper", "kl_weight": 0.25})


def test_an_edit_says_where_its_settings_come_from(lens_model: Any, checkpoint: Path) -> None:
    moments = {layer: torch.eye(lens_model.d_key) for layer in (0, 1)}
    plain = METHODS["memit"](lens_model, [REQUEST], [0, 1], moments)
    assert plain.manifest["settings_from"] == []
    tuned = write_tuned(checkpoint / "tuned.json", lens_model, "memit", RECORD)
    edit = METHODS["memit"](lens_model, [REQUEST], [0, 1], moments)
    assert edit.manifest["settings_from"] == [
        {"source": "tuned.json", "hash": tuned.hash, "settings": ["layers", "clamp", "steps"]}
    ]
    assert (edit.manifest["settings"]["steps"], plain.manifest["settings"]["steps"]) == (2, 25)
    explicit = METHODS["memit"](lens_model, [REQUEST], [0, 1], moments, config=MemitConfig(steps=1))
    assert "settings_from" not in explicit.manifest
    # An edited model is still the one that was tuned.
    apply_(lens_model, edit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recommended("memit", lens_model) == MemitConfig(clamp=3.0, steps=2)
    undo_(lens_model, edit)


def test_settings_of_another_model_are_left_out_with_a_warning_and_refused_where_they_are_named(
    lens_model: Any, make_model: Any, checkpoint: Path
) -> None:
    different = make_model("gpt2", seed=1)
    file = checkpoint / "tuned.json"
    write_tuned(file, different, "memit", RECORD)
    with pytest.warns(UserWarning, match="was tuned for another model, and is left out"):
        assert recommended("memit", lens_model) == MemitConfig()
    with pytest.raises(InputError, match="was made with weights_hash"):
        METHODS["memit"].recommendation(lens_model, file=file)
    assert METHODS["memit"].recommendation(different, file=file).layers == (0, 1)
    # Written over by those of this model, whatever the file held before.
    write_tuned(file, lens_model, "emmet", RECORD)
    assert list(json.loads(file.read_text())["methods"]) == ["emmet"]


def test_settings_of_another_method_are_refused_where_they_are_named(lens_model: Any, checkpoint: Path) -> None:
    file = checkpoint / "tuned.json"
    write_tuned(file, lens_model, "memit", RECORD)
    assert METHODS["emmet"].recommendation(lens_model).layers is None
    with pytest.raises(InputError, match="holds tuned settings of memit, expected 'emmet'; tune"):
        METHODS["emmet"].recommendation(lens_model, file=file)
    write_tuned(file, lens_model, "emmet", RECORD)
    for method in ("memit", "emmet"):
        assert METHODS[method].recommendation(lens_model, file=file).layers == (0, 1), "a file holds several methods"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["methods"]["memit"]["settings"].update(clamp=9.0), "changed after it was written"),
        (lambda content: content["methods"]["memit"].update(layers=[]), "the layers of memit are"),
        (lambda content: content["methods"]["memit"].update(layers=[1, True]), "the layers of memit are"),
        (lambda content: content["methods"]["memit"].pop("settings"), "the settings of memit are None"),
        (lambda content: content.pop("model"), "it has no model"),
        (lambda content: content.update(methods=[]), "expected a JSON object"),
        (lambda content: content["methods"].update(memit=3), "memit is 3"),
    ],
)
def test_a_damaged_file_is_refused(lens_model: Any, checkpoint: Path, change: Any, message: str) -> None:
    file = checkpoint / "tuned.json"
    write_tuned(file, lens_model, "memit", RECORD)
    content = json.loads(file.read_text())
    content["methods"]["memit"]["trials"][0]["seconds"] = 3.0
    file.write_text(json.dumps(content))
    assert TunedSettings.load(file, "memit").layers == (0, 1), "the control: seconds decide nothing"
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        recommended("memit", lens_model)


def test_a_setting_that_the_method_lacks_is_refused(lens_model: Any, checkpoint: Path) -> None:
    write_tuned(checkpoint / "tuned.json", lens_model, "memit", {**RECORD, "settings": {"null_threshold": 0.1}})
    with pytest.raises(InputError, match=r"settings of 'memit' in .*tuned\.json' has a field 'null_threshold'"):
        recommended("memit", lens_model)


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not tuned_folder().exists(), "tests read nothing that a user tuned"
    monkeypatch.delenv("MECHEDIT_TUNED")
    monkeypatch.setenv("MECHEDIT_CACHE", str(tmp_path))
    assert tuned_folder() == tmp_path / "tuned"
    monkeypatch.setenv("MECHEDIT_TUNED", str(tmp_path / "elsewhere"))
    assert tuned_folder() == tmp_path / "elsewhere"
