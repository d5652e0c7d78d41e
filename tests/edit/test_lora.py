"""PEFT itself loads what `export_lora` wrote, and gets the edited model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.edits import identical, random_edit, weights
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mechedit.edit import Edit, Factors, edited, export_lora, lost_fraction
from mechedit.errors import InputError
from mechedit.models import load_model


@torch.no_grad()
def outputs(hf: Any) -> Tensor:
    return hf(torch.arange(5, 21).reshape(2, 8)).logits.float()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "base", tmp_path / "adapter"


def based(hf: Any, tokenizer: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model, loaded from a folder as a person would."""
    hf.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder, dtype=dtype)


def test_peft_gets_the_edited_model(make_hf: Any, tokenizer: Any, family: str, folders: tuple[Path, Path]) -> None:
    """On every family, with another rank in each layer; merged into the weights, too."""
    base, folder = folders
    model = based(make_hf(family), tokenizer, base)
    edit, before = random_edit(model, layers=(0, 2), ranks=(3, 1)), weights(model)
    edit = Edit(
        factors={k: Factors(left=f.left, right=f.right / 10) for k, f in edit.factors.items()}, manifest=edit.manifest
    )
    with edited(model, edit):
        expected = outputs(model.hf)
    export_lora(model, edit, folder)
    assert identical(model, before)
    clean = AutoModelForCausalLM.from_pretrained(PeftConfig.from_pretrained(folder).base_model_name_or_path)
    start = outputs(clean)
    adapted = PeftModel.from_pretrained(clean, folder)
    size = expected.abs().max()
    assert float((start - expected).abs().max() / size) > 0.01
    assert float((outputs(adapted) - expected).abs().max() / size) < 1e-5
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2
    assert float((outputs(adapted.merge_and_unload()) - expected).abs().max() / size) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_rank_for_all_layers_as_engines_that_serve_take(
    make_hf: Any, tokenizer: Any, family: str, folders: tuple[Path, Path]
) -> None:
    base, folder = folders
    model = based(make_hf(family), tokenizer, base)
    edit = random_edit(model, layers=(0, 2), ranks=(5, 1))
    written = export_lora(model, edit, folder, rank=2)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {min(value.shape) for value in tensors.values()} == {2}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (2, 2, {}, {})
    with edited(model, written):
        expected = outputs(model.hf)
    with edited(model, edit):
        untruncated = outputs(model.hf)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    size = expected.abs().max()
    assert float((outputs(adapted) - expected).abs().max() / size) < 1e-5
    assert float((outputs(adapted.merge_and_unload()) - expected).abs().max() / size) < 1e-5
    assert float((untruncated - expected).abs().max() / size) > 1e-3, "the control: something is lost"
    values = torch.linalg.svdvals(edit.delta(0)).square()
    total = sum(edit.delta(layer).square().sum() for layer in edit.layers)
    assert lost_fraction(edit, written) == pytest.approx(float((values[2:].sum() / total).sqrt()))
    assert json.loads((folder / "mechedit.json").read_text())["truncated"][0]["rank"] == 2
    with pytest.raises(InputError, match="the rank is 33, expected 1 to 32"):
        export_lora(model, edit, folder, rank=33, overwrite=True)


def test_the_folder_holds_what_peft_reads_and_the_manifest(lens_model: Any, tmp_path: Path) -> None:
    edit = random_edit(lens_model, layers=(0, 2), ranks=(3, 1))
    export_lora(lens_model, edit, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "mechedit.json"]
    assert json.loads((tmp_path / "out" / "mechedit.json").read_text()) == edit.manifest
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name: list(value.shape) for name, value in tensors.items()} == {
        "base_model.model.transformer.h.0.mlp.c_proj.lora_A.weight": [3, 96],
        "base_model.model.transformer.h.0.mlp.c_proj.lora_B.weight": [32, 3],
        "base_model.model.transformer.h.2.mlp.c_proj.lora_A.weight": [1, 96],
        "base_model.model.transformer.h.2.mlp.c_proj.lora_B.weight": [32, 1],
    }
    with pytest.raises(InputError, match="exists already"):
        export_lora(lens_model, edit, tmp_path / "out")
    export_lora(lens_model, random_edit(lens_model, 1), tmp_path / "out", overwrite=True)
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 4


def test_layer_1_is_not_taken_for_layer_11(make_hf: Any, tokenizer: Any, folders: tuple[Path, Path]) -> None:
    base, folder = folders
    model = based(make_hf("llama", num_hidden_layers=12), tokenizer, base)
    export_lora(model, random_edit(model, layers=(1,), ranks=(2,)), folder)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    layers = {name.split(".layers.")[1].split(".")[0] for name, _ in adapted.named_parameters() if "lora" in name}
    assert layers == {"1"}


def test_more_terms_than_the_matrix_has_are_brought_down(
    make_hf: Any, tokenizer: Any, folders: tuple[Path, Path]
) -> None:
    base, folder = folders
    model = based(make_hf("gpt2"), tokenizer, base)
    edit = random_edit(model, layers=(0, 2), ranks=(50, 2))
    export_lora(model, edit, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.transformer.h.0.mlp.c_proj.lora"
    assert tensors[f"{name}_A.weight"].shape == (32, 96)
    actual = (tensors[f"{name}_B.weight"].double() @ tensors[f"{name}_A.weight"].double()).T
    torch.testing.assert_close(actual, edit.delta(0), rtol=1e-5, atol=1e-4)


def test_on_half_precision_the_adapter_is_not_rounded(make_hf: Any, tokenizer: Any, folders: tuple[Path, Path]) -> None:
    base, folder = folders
    model = based(make_hf("llama"), tokenizer, base, torch.bfloat16)
    edit = random_edit(model)
    export_lora(model, edit, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    actual = tensors["base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"]
    assert torch.equal(actual, edit.factors[2].left.T.float())
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with edited(model, edit):
        expected = outputs(model.hf)
    start, reached = outputs(model.hf), outputs(adapted)
    assert float((reached - expected).norm() / (start - expected).norm()) < 0.1


def test_what_cannot_be_written_leaves_no_folder(
    lens_model: Any, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = random_edit(lens_model)
    with pytest.raises(InputError, match="the edit was made for"):
        export_lora(make_model("gpt2", seed=1), edit, tmp_path / "out")
    empty = Factors(left=torch.zeros(96, 0), right=torch.zeros(0, 32))
    with pytest.raises(InputError, match="layer 1 has rank 0"):
        export_lora(lens_model, Edit(factors={1: empty}, manifest=edit.manifest), tmp_path / "out")
    huge = Factors(
        left=torch.full((96, 1), 1e300, dtype=torch.float64), right=torch.full((1, 32), 1e-300, dtype=torch.float64)
    )
    with pytest.raises(InputError, match=r"left factor holds 1.0e\+300, expected values of at most 1e\+30"):
        export_lora(lens_model, Edit(factors={1: huge}, manifest=edit.manifest), tmp_path / "out")

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["mechedit.edit.export"], "_lora_config", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_lora(lens_model, edit, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
