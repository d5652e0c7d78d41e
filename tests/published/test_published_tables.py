"""What the papers say: their numbers agree with themselves and stand in one place; no model gets another's settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechedit import InputError, published_scores, published_settings, published_table
from mechedit.data import EditRequest
from mechedit.methods import METHODS, MemitConfig, with_published_layers
from mechedit.published import SCORES, PublishedRange, PublishedSettings, Shape, settings
from mechedit.published.tables import FOLDER

ROOT = Path(__file__).parents[2]
GPT_J = Shape(type="gptj", layers=28, d_model=4096, d_mlp=16384)
LLAMA_3 = Shape(type="llama", layers=32, d_model=4096, d_mlp=14336)
REQUEST = EditRequest(id="a", subject="Leon Blum", prompt="The mother tongue of {} is", target_new="Korean")


@pytest.mark.parametrize("name", ["memit_table_1", "memit_table_2", "rome_table_4", "rome_table_5"])
def test_every_printed_score_is_the_harmonic_mean_of_its_three_rates(name: str) -> None:
    table = published_table(name)
    rates = ["efficacy", "paraphrase", "specificity"] if name == "memit_table_1" else ["ES", "PS", "NS"]
    values = table[rates].to_numpy(dtype=float)
    # Rates are rounded to 0.05 at most, of which small ones change the mean by up to three times as much.
    assert np.abs(3 / (1 / values).sum(1) - table["S"]).max() <= 0.2
    assert np.abs(values.mean(1) - table["S"]).max() > 5, "the control: the plain mean is another number"


def test_scores_are_tidy_with_both_ends_of_their_intervals() -> None:
    scores = published_scores("memit_table_2", "GPT-NeoX").set_index(["method", "measure"])
    assert list(scores.loc["memit"].index) == ["S", "ES", "PS", "NS", "GE", "RS"]
    row = scores.loc[("memit", "NS")]
    assert (row["low"] + row["high"]) / 2 == pytest.approx(row["mean"])
    assert 0 < row["high"] - row["mean"] < 3
    assert scores.loc[("memit", "S"), ["low", "high"]].isna().all(), "no interval is printed for S"


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="the published table is 'memit_table_3', expected one of memit_demonstra"):
        published_table("memit_table_3")
    with pytest.raises(InputError, match="expected one of memit_table_1, memit_table_2, rome_table_1"):
        published_scores("memit_seconds", "GPT-J")
    with pytest.raises(InputError, match="memit_table_1 has no 'GPT-NeoX', expected one of GPT-J"):
        published_scores("memit_table_1", "GPT-NeoX")


def test_no_number_of_the_papers_stands_in_the_code() -> None:
    pattern = re.compile(r"(?<![\w.])\d[\d,]*\.\d+")
    printed = {cell for file in FOLDER.glob("*.csv") for cell in file.read_text().replace("\n", ",").split(",")}
    # 622.4 and longer; 23.7 may be any other number.
    distinctive = {cell for cell in printed if pattern.fullmatch(cell) and len(cell) >= 5 and not cell.endswith(".0")}
    assert len(distinctive) > 25
    for folder in ("mechedit", "analyses", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not distinctive & {text.replace(",", "") for text in pattern.findall(file.read_text())}, file


def test_the_registrys_settings_are_those_of_their_methods_and_models() -> None:
    entries = [entry for _, entry in settings._registry()]
    assert len(entries) > 50
    for entry in entries:
        layers = entry.range.layers
        assert list(layers) == sorted(set(layers))
        assert entry.shape is None or layers[-1] < entry.shape.layers
        assert entry.range.source
        METHODS[{"blue": "memit"}.get(entry.method, entry.method)].config(**entry.settings)  # refuses what it lacks


def test_settings_are_found_by_name_and_by_shape_and_never_for_another_size() -> None:
    by_name = published_settings("EleutherAI/gpt-j-6B", GPT_J, "memit")
    assert published_settings("my/copy", GPT_J, "memit") == by_name != []
    assert by_name[0].settings["covariance_weight"] == MemitConfig(convention="memit-2022").covariance_weight
    assert published_settings("my/gpt-j-6b", Shape(type="gptj", layers=27, d_model=4096, d_mlp=16384)) == []
    assert published_settings("my/copy") == []
    assert {entry.name for entry in published_settings("a", LLAMA_3)} == {"llama-3-8b", "llama-3.1-8b"}
    assert {entry.name for entry in published_settings("Meta-Llama-3-8B", LLAMA_3)} == {"llama-3-8b"}


def entry(name: str, shape: Shape, layers: tuple[int, ...], **changes: Any) -> tuple[frozenset[str], PublishedSettings]:
    chosen = {"convention": "memit-2022", "lr": 0.25, "steps": 2, **changes}
    published = PublishedRange(model=name, method="MEMIT", layers=layers, source="a repository")
    return frozenset([name]), PublishedSettings(name=name, range=published, settings=chosen, shape=shape)


def test_an_edit_takes_published_layers_by_itself_and_published_settings_when_asked(
    lens_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(type="gpt2", layers=lens_model.n_layers, d_model=lens_model.d_model, d_mlp=lens_model.d_key)
    monkeypatch.setattr(settings, "_registry", lambda: (entry("big", shape, (0, 1)),))
    memit = METHODS["memit"]
    plain = with_published_layers(memit.recommendation(lens_model), "memit", lens_model)
    assert (plain.layers, plain.config) == ((0, 1), MemitConfig()), "layers alone: settings have other units"
    assert plain.record == [{"source": "published", "hash": plain.sources[0].hash, "settings": ["layers"]}]
    asked = memit.recommendation(lens_model, published=True)
    assert asked.layers == (0, 1)
    assert asked.config == MemitConfig(convention="memit-2022", lr=0.25, steps=2)
    assert asked.sources[0].settings == ("layers", "convention", "lr", "steps")
    assert "published for big and not tried here" in asked.sources[0].in_words()
    assert memit.published(lens_model)[0].in_words() == "big, layers 0, 1 (a repository)"
    edit = memit(
        lens_model, [REQUEST], [0, 1], {0: torch.eye(shape.d_mlp), 1: torch.eye(shape.d_mlp)}, config=asked.config
    )
    assert edit.manifest["settings"]["lr"] == 0.25
    with pytest.raises(InputError, match=r"nothing was published for rome on .* \(gpt2, 3 layers, d_model 32\)"):
        METHODS["rome"].recommendation(lens_model, published=True)
    assert memit.published(lens_model.writing("attn")) == [], "nothing was published of attention"


def test_a_shape_of_several_models_that_are_edited_otherwise_is_refused(
    lens_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(type="gpt2", layers=lens_model.n_layers, d_model=lens_model.d_model, d_mlp=lens_model.d_key)
    monkeypatch.setattr(settings, "_registry", lambda: (entry("one", shape, (0, 1)), entry("two", shape, (1, 2))))
    with pytest.raises(InputError, match=r"of several published models.*one, layers 0, 1.*two, layers 1, 2"):
        METHODS["memit"].recommendation(lens_model, published=True)
    monkeypatch.setattr(settings, "_registry", lambda: (entry("one", shape, (0, 1)), entry("two", shape, (0, 1))))
    assert METHODS["memit"].recommendation(lens_model, published=True).layers == (0, 1), "the control: they agree"


def test_all_tables_of_scores_are_read() -> None:
    assert {file.stem for file in FOLDER.glob("*_table_*.csv")} == set(SCORES)
    for name in SCORES:
        for model in set(published_table(name)["model"]):
            assert len(published_scores(name, model)) >= 9
