"""GGUF files load as plain models with the weights that transformers dequantizes, and are converted once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers.utils.import_utils
from helpers.edits import identical, random_edit, weights
from transformers import AutoModelForCausalLM

from mechedit.edit import edited, export
from mechedit.errors import InputError
from mechedit.models import gguf as gguf_module
from mechedit.models import load_model

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensor_name(name: str) -> str:
    """A weight's name in GGUF."""
    path = name.removesuffix(".weight")
    if path in OUTER:
        return f"{OUTER[path]}.weight"
    _, _, layer, module = path.split(".", 3)
    return f"blk.{layer}.{NAMES[module]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys in llama.cpp's order of rotary pairs."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(hf: Any, tokenizer: Any, path: Path) -> None:
    """A Llama in GGUF: matrices quantized to 8 bits, norms in float32, and a byte-level tokenizer."""
    config, writer = hf.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = tokenizer.backend_tokenizer.to_str()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3 if index < 2 else 1 for index in range(len(vocab))])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(merges)["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    for name, parameter in hf.named_parameters():
        weight = parameter.detach().float().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = interleaved(weight, heads)
        if weight.ndim == 1:
            writer.add_tensor(tensor_name(name), weight)
        else:
            quantized = gguf.quants.quantize(np.ascontiguousarray(weight), gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(tensor_name(name), quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(make_hf: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file in a folder of its own, and a cache that is empty."""
    monkeypatch.setenv("MECHEDIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "models" / "small.Q8_0.gguf"
    path.parent.mkdir()
    write_gguf(make_hf("llama"), tokenizer, path)
    return path


def cached(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache" / "gguf").iterdir() if not path.name.startswith("."))


def test_the_weights_are_those_that_transformers_dequantizes(
    file: Path, make_hf: Any, tokenizer: Any, backend: str, tmp_path: Path
) -> None:
    model = load_model(str(file), backend=backend, device="cpu")
    direct = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert identical(model, {name: value.detach().clone() for name, value in direct.named_parameters()})
    # Quantized they were, and rightly named and turned they are.
    original = weights(load_model(make_hf("llama"), tokenizer=tokenizer))
    assert not identical(model, original)
    for name, value in weights(model).items():
        assert (value - original[name]).norm() < 0.01 * original[name].norm()
    text = "The mother tongue of Leon Blum is"
    assert model.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert model.name == str(file)
    edit = random_edit(model)
    with edited(model, edit):
        changed = weights(model)
    export(model, edit, tmp_path / "out")
    assert identical(load_model(tmp_path / "out", device="cpu"), changed)


def test_it_is_converted_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_model(file, device="cpu")
    convert, converted = gguf_module._convert, []

    def counting(path: Path, folder: Path, dtype: torch.dtype) -> None:
        converted.append(dtype)
        convert(path, folder, dtype)

    monkeypatch.setattr(gguf_module, "_convert", counting)
    assert load_model(file.parent, device="cpu").weights_hash() == first.weights_hash()
    assert (converted, len(cached(tmp_path))) == ([], 1)
    half = load_model(file, device="cpu", dtype="bfloat16")
    assert (half.dtype, half.weights_hash()) == (torch.bfloat16, first.cast_hashes()["bfloat16"])
    os.utime(file, (1, 1))
    load_model(file, device="cpu")
    assert converted == [torch.bfloat16, torch.float32], "another dtype, then another file"


def test_what_breaks_off_is_not_used(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = gguf_module._convert

    def interrupted(path: Path, folder: Path, dtype: torch.dtype) -> None:
        convert(path, folder, dtype)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_module, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model(file, device="cpu")
    assert cached(tmp_path) == []
    monkeypatch.undo()
    monkeypatch.setenv("MECHEDIT_CACHE", str(tmp_path / "cache"))
    assert load_model(file, device="cpu").n_layers == 3


def test_what_cannot_be_read_is_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(file, file.parent / "another.gguf")
    with pytest.raises(InputError, match=r"holds 2 GGUF files \(another.gguf, small.Q8_0.gguf"):
        load_model(file.parent)
    (file.parent / "another.gguf").write_bytes(b"GGUF, cut short")
    with pytest.raises(InputError, match="cannot read the GGUF file"):
        load_model(file.parent / "another.gguf")
    with pytest.raises(InputError, match="no model folder"):
        load_model(file.parent / "absent.gguf")
    monkeypatch.setattr(transformers.utils.import_utils, "is_gguf_available", lambda: False)
    with pytest.raises(InputError, match=r"needs the package gguf.*pip install 'mechedit\[gguf\]'"):
        load_model(file)
    assert cached(tmp_path) == []
