"""A model that carries an adapter is refused with the reason, or edited with the adapter merged; never half of both."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.edits import identical, random_edit, weights
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from mechedit.cli import main
from mechedit.edit import edited, export
from mechedit.errors import InputError
from mechedit.models import load_model

ATTENTION, EMBEDDING = ["q_proj", "v_proj"], ["embed_tokens", "down_proj"]
IDS = torch.tensor([[5, 17, 200, 3, 42, 9, 111]])


@pytest.fixture
def base_folder(make_hf: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint of the base model."""
    folder = tmp_path / "base"
    make_hf("llama", tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def lora(targets: list[str] = ATTENTION, **fields: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **fields)


@torch.no_grad()
def logits(hf: Any) -> Tensor:
    return hf(IDS).logits


def with_added(folder: Path) -> Any:
    hf = plain(folder)
    hf.add_adapter(lora())
    return hf


def with_loaded(folder: Path) -> Any:
    get_peft_model(plain(folder), lora()).save_pretrained(folder.parent / "adapter")
    hf = plain(folder)
    hf.load_adapter(str(folder.parent / "adapter"))
    return hf


def from_folder(folder: Path) -> Any:
    get_peft_model(plain(folder), lora()).save_pretrained(folder.parent / "adapter")
    return AutoModelForCausalLM.from_pretrained(folder.parent / "adapter", dtype=torch.float32)


def wrapped(**fields: Any) -> Callable[[Path], Any]:
    return lambda folder: get_peft_model(plain(folder), lora(**fields)).eval()


CARRIERS: dict[str, Callable[[Path], Any]] = {
    "add_adapter": with_added,
    "load_adapter": with_loaded,
    "from_pretrained": from_folder,
    "PeftModel": wrapped(),
    "base_model.model": lambda folder: wrapped()(folder).base_model.model,
    "a tied embedding": wrapped(targets=EMBEDDING),
    "a module of its own": wrapped(modules_to_save=["lm_head"]),
    "DoRA": wrapped(use_dora=True),
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_it_is_refused_or_merged_on_request(base_folder: Path, tokenizer: Any, tmp_path: Path, carrier: str) -> None:
    torch.manual_seed(0)
    hf = CARRIERS[carrier](base_folder)
    with pytest.raises(InputError, match=r"merge_adapter=True.*merge_and_unload"):
        load_model(hf, tokenizer=tokenizer)
    start = {name: value.detach().clone() for name, value in hf.named_parameters()}
    adapted, unadapted = logits(hf), logits(plain(base_folder))
    assert (adapted - unadapted).norm() > 0.1 * unadapted.norm(), "the adapter must matter, else equality says nothing"
    model = load_model(hf, tokenizer=tokenizer, merge_adapter=True)
    torch.testing.assert_close(logits(model.hf), adapted, rtol=1e-3, atol=1e-3)
    edit = random_edit(model)
    with edited(model, edit):
        expected = logits(model.hf)
    assert (expected - adapted).norm() > 0.1 * adapted.norm()
    export(model, edit, tmp_path / "out")
    torch.testing.assert_close(logits(plain(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)
    # The caller's model keeps its weights, and its adapter beside them.
    assert torch.equal(logits(hf), adapted)
    assert all(torch.equal(value, start[name]) for name, value in hf.named_parameters())
    assert model.checkpoint == ""
    assert model.name.endswith("with its adapter merged")


def test_merging_is_of_no_effect_without_an_adapter(base_folder: Path, tokenizer: Any) -> None:
    hf = plain(base_folder)
    model = load_model(hf, tokenizer=tokenizer, merge_adapter=True)
    assert model.hf is hf
    assert load_model(base_folder, merge_adapter=True, device="cpu").weights_hash() == model.weights_hash()


def test_an_adapter_that_is_no_matrix_or_switched_off_is_not_merged(base_folder: Path, tokenizer: Any) -> None:
    prompt = get_peft_model(plain(base_folder), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(InputError, match="is a PeftModelForCausalLM"):
        load_model(prompt, tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"changes no module of the model \(PROMPT_TUNING\)"):
        load_model(prompt, tokenizer=tokenizer, merge_adapter=True)
    hf = with_added(base_folder)
    hf.disable_adapters()
    with pytest.raises(InputError, match="gives other logits than with the adapter beside it"):
        load_model(hf, tokenizer=tokenizer, merge_adapter=True)


def test_a_folder_with_an_adapter(base_folder: Path, tokenizer: Any, tmp_path: Path, backend: str) -> None:
    torch.manual_seed(0)
    hf, folder = wrapped()(base_folder), tmp_path / "adapter"
    hf.save_pretrained(folder)
    with pytest.raises(InputError, match=rf"is an adapter .* for the base model '{base_folder}'.*--merge-adapter"):
        load_model(folder)
    model = load_model(folder, merge_adapter=True, backend=backend, device="cpu")
    torch.testing.assert_close(logits(model.hf), logits(hf), rtol=1e-3, atol=1e-3)
    # The base model's tokenizer; one in the adapter's own folder comes first.
    assert model.tokenizer("mother tongue")["input_ids"] == tokenizer("mother tongue")["input_ids"]
    assert not any("lora" in name for name, _ in model.hf.named_parameters())
    # transformers reads the adapter also where a complete checkpoint lies beside it.
    shutil.copytree(base_folder, folder, dirs_exist_ok=True)
    with pytest.raises(InputError, match="is an adapter"):
        load_model(folder)
    before = weights(model)
    assert identical(load_model(str(folder), merge_adapter=True, device="cpu"), before)


def test_on_the_command_line(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    folder, edit = tmp_path / "adapter", tmp_path / "edit.safetensors"
    hf = wrapped()(base_folder)
    hf.save_pretrained(folder)
    model = load_model(folder, merge_adapter=True, device="cpu")
    random_edit(model).save(edit)
    apply = ["apply", "--model", str(folder), "--edit", str(edit), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        main(apply)
    assert caught.value.code == 2
    assert "--merge-adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as caught:
        main([*apply, "--merge-adapter"])
    assert caught.value.code == 0
    with edited(model, random_edit(model)):
        torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(model.hf), rtol=1e-4, atol=1e-4)


def test_our_own_adapter_is_one_too(base_folder: Path, tmp_path: Path) -> None:
    from mechedit.edit import export_lora

    model = load_model(base_folder, device="cpu")
    edit = random_edit(model)
    export_lora(model, edit, tmp_path / "adapter")
    assert PeftModel.from_pretrained(plain(base_folder), tmp_path / "adapter") is not None
    merged = load_model(tmp_path / "adapter", merge_adapter=True, device="cpu")
    with edited(model, edit):
        torch.testing.assert_close(logits(merged.hf), logits(model.hf), rtol=1e-3, atol=1e-3)
