"""Checkpoints whose files are damaged, or hold pickle, are refused by name; nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import random_hf
from helpers.mutations import json_text, mutated_bytes, mutated_json, mutated_safetensors, refusal
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from mechedit import InputError, load_model, recommended
from mechedit.chat import chat_turn
from mechedit.files import write_json

MUTATIONS = 4
"""Damaged copies of each file; a model takes a second to load."""
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
DAMAGES = ("null", "[]", "{", "", "[" * 100_000)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    random_hf("gpt2").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_damaged_json_is_refused_or_does_without(folder: Path, name: str) -> None:
    load_model(folder)  # the control: it loads as it is
    for damage in DAMAGES:
        (folder / name).write_text(damage)
        message = refusal(lambda: load_model(folder))
        # transformers goes on without generation settings, and reads a tokenizer from its other file.
        assert message or name in ("generation_config.json", "tokenizer_config.json"), damage
        assert len(message or "") < 1000


@pytest.mark.parametrize("content", ["null", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_damaged_index_is_refused(checkpoint: Path, tmp_path: Path, content: str, tokenizer: Any) -> None:
    folder = tmp_path / "sharded"
    random_hf("gpt2").save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    assert load_model(folder).checkpoint_dtype == torch.float32
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="sharded"):
        load_model(folder)


@pytest.mark.parametrize("name", [*FILES, "model.safetensors"])
def test_a_checkpoint_that_is_damaged_at_random_is_accepted_or_refused(
    checkpoint: Path, folder: Path, name: str
) -> None:
    original = (checkpoint / name).read_bytes()
    accepted = 0
    for seed in range(MUTATIONS):
        generator = random.Random(f"{name}{seed}")
        if name == "model.safetensors":
            (folder / name).write_bytes(mutated_safetensors(original, generator))
        elif generator.random() < 0.3:
            (folder / name).write_bytes(mutated_bytes(original, generator))
        else:
            (folder / name).write_text(json_text(mutated_json(json.loads(original), generator)))
        message = refusal(lambda: load_model(folder))
        accepted += message is None
        assert len(message or "") < 2000
    # transformers goes on without generation settings.
    assert accepted < MUTATIONS or name == "generation_config.json", "some damage must matter"


class Trap:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def pickled(folder: Path, content: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def test_weights_in_pickle_are_read_only_where_that_is_allowed(folder: Path) -> None:
    expected = load_model(folder).weights_hash()
    state = random_hf("gpt2").state_dict()
    pickled(folder, state)
    with pytest.raises(InputError, match=r"in pickle \(pytorch_model\.bin\).*expected safetensors.*--allow-pickle"):
        load_model(folder)
    assert load_model(folder, allow_pickle=True).weights_hash() == expected
    # Beside safetensors, pickle is not looked at.
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    random_hf("gpt2").save_pretrained(folder)
    assert load_model(folder).weights_hash() == expected


def test_an_adapter_in_pickle_is_read_only_where_that_is_allowed(folder: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(random_hf("gpt2"), LoraConfig(target_modules=["c_proj"], init_lora_weights=False))
    adapted.save_pretrained(adapter := tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", {**config, "base_model_name_or_path": str(folder)})
    expected = load_model(adapter, merge_adapter=True).weights_hash()
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"in pickle \(adapter_model\.bin\)"):
        load_model(adapter, merge_adapter=True)
    assert load_model(adapter, merge_adapter=True, allow_pickle=True).weights_hash() == expected


def test_a_program_in_pickle_is_never_run(folder: Path, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "made")
    pickled(folder, {"transformer.wte.weight": trap})
    for allow in (False, True):
        with pytest.raises(InputError):
            load_model(folder, allow_pickle=allow)
        assert not trap.path.exists()
    pickle.loads(pickle.dumps(trap))  # the control: it would have run
    assert trap.path.exists()


def test_python_in_a_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (folder / "modeling_own.py").write_text(f"open({str(made)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot load the model"):
        load_model(folder)
    assert not made.exists()
    exec((folder / "modeling_own.py").read_text())  # the control: it would have made the file
    assert made.exists()


def test_a_chat_template_is_run_in_a_sandbox(folder: Path) -> None:
    model = load_model(folder)
    model.tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match=r"cannot show .*SecurityError"):
        chat_turn(model.tokenizer)
    model.tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert chat_turn(model.tokenizer)[0] == "<{}>"  # the control: a harmless one runs


def test_recommended_settings_of_a_damaged_checkpoint_are_refused(folder: Path) -> None:
    model = load_model(folder)
    for content in ("null", '{"memit": {"steps": true}}', '{"memit": {"convention": 5}}', '{"memit": {"x": 1}}'):
        (folder / "editing.json").write_text(content)
        with pytest.raises(InputError, match=r"editing\.json"):
            recommended("memit", model)
    (folder / "editing.json").write_text('{"memit": {"steps": 3}}')
    assert recommended("memit", model).steps == 3  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
def test_a_pipe_in_place_of_a_file_ends_in_an_error(folder: Path) -> None:
    for name in FILES:
        (folder / name).rename(folder / "saved")
        os.mkfifo(folder / name)
        refusal(lambda: load_model(folder))
        (folder / name).unlink()
        (folder / "saved").rename(folder / name)
