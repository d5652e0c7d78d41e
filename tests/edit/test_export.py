"""What an export leaves at its destination is the edited model: read back, and with the source's own files."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.edits import identical, logits, random_edit, weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechedit.cli import main
from mechedit.edit import Edit, Factors, apply_, edited, export, export_lora
from mechedit.errors import InputError
from mechedit.models import load_model


@pytest.fixture
def source(make_hf: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint in bfloat16 and in several files, with settings and files of its own."""
    folder = tmp_path / "source"
    hf = make_hf("llama").bfloat16()
    # transformers reads such settings, and refuses to write them.
    hf.save_pretrained(folder, max_shard_size=40_000)
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false, "eos_token_id": [0, 1]}\n')
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    (folder / "special_tokens_map.json").write_text('{"eos_token":   "<|endoftext|>", "pad_token": "<|pad|>"}')
    (folder / "tokenizer.model").write_bytes(b"of sentencepiece")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def soft(edit: Edit, scale: float) -> Edit:
    """The edit, times a scale."""
    factors = {k: Factors(left=f.left, right=f.right * scale) for k, f in edit.factors.items()}
    return Edit(factors=factors, manifest=edit.manifest)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_the_weights_are_new(source: Path, tmp_path: Path) -> None:
    model = load_model(source, device="cpu")
    assert (model.dtype, model.checkpoint_dtype) == (torch.float32, torch.bfloat16)
    before = weights(model)
    export(model, random_edit(model), tmp_path / "out")
    assert identical(model, before)
    assert model.hf.config.dtype == torch.float32
    old, new = files(source), files(tmp_path / "out")
    shards, old_shards = ({name for name in names if name.startswith("model-")} for names in (new, old))
    assert len(shards) >= len(old_shards) > 3
    assert max(len(new[name]) for name in shards) <= max(len(old[name]) for name in old_shards)
    index, old_index = (json.loads(names["model.safetensors.index.json"])["weight_map"] for names in (new, old))
    assert index.keys() == old_index.keys()
    assert set(index.values()) == shards
    same = old.keys() - old_shards - {"model.safetensors.index.json"}
    assert same | shards | {"model.safetensors.index.json", "mechedit.json"} == new.keys()
    assert {"config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"} < same
    assert [name for name in same if old[name] != new[name]] == []
    dtypes = {tensor.dtype for shard in shards for tensor in load_file(tmp_path / "out" / shard).values()}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_an_edit_in_float32_survives_the_checkpoints_rounding(source: Path, tmp_path: Path, scale: float) -> None:
    """The bits are those of the edit on the model in bfloat16, where to the nearest number little would be left."""
    model, half = load_model(source, device="cpu"), load_model(source, device="cpu", dtype="bfloat16")
    edit = soft(random_edit(model), scale)
    export(model, edit, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert reloaded.dtype == torch.bfloat16
    same = Edit(factors=edit.factors, manifest={"model": half.provenance()})
    with edited(half, same):
        assert identical(load_model(reloaded, tokenizer=half.tokenizer), weights(half))
    start, delta = half.projection(0).double(), edit.delta(0)
    written = reloaded.model.layers[0].mlp.down_proj.weight.T.double() - start
    nearest = (start + delta).bfloat16().double() - start
    sizes = [float((change * delta).sum() / delta.square().sum()) for change in (written, nearest)]
    assert abs(sizes[0] - 1) < 0.2
    if scale < 1:
        assert sizes[1] < 0.6, "to the nearest number, much of it would be gone"


def test_applied_edits_are_rounded_once_with_the_new_one(source: Path, tmp_path: Path) -> None:
    model = load_model(source, device="cpu")
    first = random_edit(model, 0, (0, 1))
    start = {layer: model.projection(layer).double().clone() for layer in (0, 1, 2)}
    apply_(model, first)
    second = random_edit(model, 1, (1, 2))
    before = weights(model)
    export(model, second, tmp_path / "out")
    assert identical(model, before)
    layers = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").model.layers
    for layer, deltas in {0: [first], 1: [first, second], 2: [second]}.items():
        exact = start[layer] + sum(edit.delta(layer) for edit in deltas)
        written = layers[layer].mlp.down_proj.weight.T.double()
        spacing = torch.finfo(torch.bfloat16).eps * exact.abs().clamp_min(1e-9)
        assert ((written - exact).abs() <= spacing).all()
        assert not torch.equal(written, exact.bfloat16().double()), "rounded at random, not to the nearest"


def test_the_dtype_can_be_chosen(source: Path, tmp_path: Path) -> None:
    model = load_model(source, device="cpu")
    edit = random_edit(model)
    export(model, edit, tmp_path / "out", dtype="float32")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert reloaded.dtype == torch.float32
    with edited(model, edit):
        assert identical(load_model(reloaded, tokenizer=model.tokenizer), weights(model))
    with pytest.raises(InputError, match="the dtype is 'int8', expected one of float32"):
        export(model, edit, tmp_path / "none", dtype="int8")
    assert not (tmp_path / "none").exists()


def test_a_model_from_memory_keeps_its_dtype_and_a_changed_tokenizer(
    make_hf: Any, source: Path, tmp_path: Path
) -> None:
    """Files of a source that no longer say what is in memory are not copied."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    hf = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    hf.generation_config.max_new_tokens, hf.generation_config.temperature = 7, 1.0
    model = load_model(hf, tokenizer=tokenizer)
    edit = random_edit(model)
    export(model, edit, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert (reloaded.dtype, reloaded.generation_config.max_new_tokens) == (torch.float16, 7)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def unedited(hf: Any, start: dict[str, Tensor]) -> Any:
    """A `save_pretrained` that writes the weights of before, as one that an adapter or a wrapper patched may."""
    save = type(hf).save_pretrained

    def saving(folder: Path, state_dict: dict[str, Tensor], **settings: Any) -> None:
        state = {name: start[name].to(tensor.dtype) for name, tensor in state_dict.items() if name in start}
        save(hf, folder, state_dict={**state_dict, **state}, **settings)

    return saving


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lost_edit_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(source, device="cpu", dtype=dtype)
    # So soft that its logits differ less than a half precision's own.
    edit, start = soft(random_edit(model), 1e-2), weights(model)
    monkeypatch.setattr(model.hf, "save_pretrained", unedited(model.hf, start))
    with pytest.raises(InputError, match=r"is not the edited model: its 'model.layers.0.mlp.down_proj.weight'"):
        export(model, edit, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert identical(model, start)
    monkeypatch.undo()
    monkeypatch.setattr(type(model.hf), "save_pretrained", losing(type(model.hf).save_pretrained))
    edit.save(tmp_path / "edit.safetensors")
    with pytest.raises(SystemExit) as caught:
        main([
            "apply", "--model", str(source), "--edit", str(tmp_path / "edit.safetensors"), "--dtype", dtype,
            "--device", "cpu", "--out", str(tmp_path / "out"),
        ])  # fmt: skip
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "is not the edited model: 1 weights are missing" in said
    assert "wrote" not in said
    assert not (tmp_path / "out").exists()


def losing(save: Any) -> Any:
    """A `save_pretrained` that forgets an edited matrix."""

    def saving(self: Any, folder: Path, state_dict: dict[str, Tensor], **settings: Any) -> None:
        state_dict.pop("model.layers.2.mlp.down_proj.weight")
        save(self, folder, state_dict=state_dict, **settings)

    return saving


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_parameters"])
def test_a_config_that_computes_otherwise_is_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """All weights are right, and the logits are not."""
    model = load_model(source, device="cpu")
    save = model.hf.save_pretrained

    def saving(folder: Path, **settings: Any) -> None:
        save(folder, **settings)
        config = json.loads((source / "config.json").read_text())
        config[field] = {"rms_norm_eps": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}[field]
        (source / "config.json").write_text(json.dumps(config))
        (Path(folder) / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(model.hf, "save_pretrained", saving)
    monkeypatch.setattr(sys.modules["mechedit.models.saving"], "_same", lambda first, second: True)
    with pytest.raises(InputError, match="its logits on 'The Eiffel Tower is in the city of' differ by"):
        export(model, random_edit(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lost_adapter_is_noticed(lens_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporting = sys.modules["mechedit.edit.export"]

    def halved(tensors: dict[str, Tensor], path: Path, **settings: Any) -> None:
        save_file({name: tensor / 2 for name, tensor in tensors.items()}, path, **settings)

    monkeypatch.setattr(exporting, "save_file", halved)
    with pytest.raises(InputError, match="is not the edit: its product for layer 0"):
        export_lora(lens_model, random_edit(lens_model), tmp_path / "out")
    monkeypatch.undo()
    config = exporting._lora_config
    monkeypatch.setattr(
        exporting, "_lora_config", lambda *arguments: {**config(*arguments), "alpha_pattern": {}, "lora_alpha": 8}
    )
    with pytest.raises(InputError, match=r"PEFT's logits on .* differ by"):
        export_lora(lens_model, random_edit(lens_model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_rounding_that_takes_the_effect_is_said(source: Path, tmp_path: Path) -> None:
    model = load_model(source, device="cpu")
    start = random_edit(model)
    manifest = {**start.manifest, "facts": ["The mother tongue of Leon Blum is → Korean"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export(model, Edit(factors=start.factors, manifest=manifest), tmp_path / "large")
    small = soft(Edit(factors=start.factors, manifest=manifest), 1e-5)
    with pytest.warns(UserWarning, match=r"in torch.bfloat16 rounding changes what the edit does .* by \d+%"):
        export(model, small, tmp_path / "small")
    assert logits(load_model(tmp_path / "small", device="cpu")).isfinite().all()


@pytest.mark.parametrize("write", [export, export_lora])
@pytest.mark.parametrize("extra", ["thesis.txt", "notes/plan.md", ".hidden", "model.safetensors.bak"])
def test_only_an_export_is_replaced(lens_model: Any, tmp_path: Path, write: Any, extra: str) -> None:
    out, edit = tmp_path / "out", random_edit(lens_model)
    for _ in range(2):  # the control: the second replaces the first
        write(lens_model, edit, out, overwrite=True)
    (out / extra).parent.mkdir(exist_ok=True)
    (out / extra).write_text("a year's work")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=f"holds '{extra}' beside an earlier export"):
        write(lens_model, edit, out, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
