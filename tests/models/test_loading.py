"""`load_model`: the sources that it loads, the state that it leaves alone, and the input that it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import BACKENDS, SHAPES, VOCAB, hook_state
from transformers import GPT2Config, GPT2Model, OPTConfig, OPTForCausalLM, T5Config

from mechedit.errors import InputError
from mechedit.models import EMBED, Model, Patch, Site, Tokens, load_model
from mechedit.models import backend as backend_module
from mechedit.models.run_plan import Write


@pytest.fixture
def tokens() -> Tokens:
    ids = torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    return Tokens(ids, torch.ones_like(ids))


def one_patch(model: Any) -> Patch:
    value = torch.randn(2, 1, model.d_model, generator=torch.Generator().manual_seed(1))
    return Patch(Site(1, "attn_out"), torch.tensor([[2], [3]]), value)


def test_a_model_says_what_it_is(family_model: Any, backend: str, tokenizer: Any) -> None:
    assert isinstance(family_model, Model)
    assert family_model.backend == backend
    assert (family_model.d_model, family_model.max_positions) == (32, 64)
    assert (family_model.vocab_size, family_model.n_heads, family_model.end_tokens) == (VOCAB, 4, [0])
    assert family_model.checkpoint == ""
    assert family_model.dtype == torch.float32
    assert family_model.device.type == "cpu"
    provenance = family_model.provenance()
    assert provenance["weights_hash"] == family_model.weights_hash()
    assert provenance["backend"] == backend
    # Padding leaves settings behind in a fast tokenizer; it is the same tokenizer all the same.
    tokenizer(["a", "a b c"], padding=True)
    assert family_model.provenance() == provenance


def test_loading_leaves_model_and_tokenizer_alone(make_hf: Any, tokenizer: Any, backend: str, tokens: Tokens) -> None:
    hf = make_hf("gpt2")
    hf.train()
    state, settings, side = hook_state(hf), hf.config.to_dict(), tokenizer.padding_side
    kinds = [type(module) for module in hf.modules()]
    model = load_model(hf, tokenizer=tokenizer, backend=backend)
    model.run(tokens, [one_patch(model)], [EMBED], stop_after=1)
    assert (hook_state(hf), hf.config.to_dict(), tokenizer.padding_side) == (state, settings, side)
    assert [type(module) for module in hf.modules()] == kinds
    assert model.tokenizer is tokenizer
    assert model.hf is hf
    # The copy is in evaluation mode whatever the caller's model is.
    assert hf.training
    first, second = model.run(tokens).logits, model.run(tokens).logits
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_a_folder_loads_in_the_dtype_asked_for(make_hf: Any, tokenizer: Any, backend: str, tmp_path: Any) -> None:
    make_hf("gpt_neo").half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path, backend=backend, device="cpu")
    assert (model.dtype, model.name, model.checkpoint) == (torch.float32, str(tmp_path), str(tmp_path))
    assert model.tokenizer("The mother tongue")["input_ids"] == tokenizer("The mother tongue")["input_ids"]
    low = load_model(str(tmp_path), backend=backend, device="cpu", dtype="bfloat16")
    assert low.dtype == torch.bfloat16
    assert low.weights_hash() != model.weights_hash()
    assert low.provenance()["dtype"] == "bfloat16"


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("family", "backend", "dtype"),
    [
        (family, backend, HALVES[(number + place) % 2])
        for number, family in enumerate(SHAPES)
        for place, backend in enumerate(BACKENDS)
    ],
)
def test_low_precision_passes_the_self_check(
    make_hf: Any, tokenizer: Any, family: str, backend: str, dtype: torch.dtype, tokens: Tokens
) -> None:
    """Every family on both backends, in one dtype on each."""
    model = load_model(make_hf(family).to(dtype), tokenizer=tokenizer, backend=backend)
    run = model.run(tokens, [one_patch(model)], [Site(1, "resid")])
    assert run[Site(1, "resid")].dtype == dtype


@pytest.mark.parametrize(
    ("change", "backends", "check"),
    [
        ({"down": "mlp.c_fc"}, BACKENDS, "the down-projection of layer 0 is found"),
        # TransformerLens has a path of its own for this.
        ({"attn": "ln_1"}, BACKENDS[1:], "adds up at layer 0"),
    ],
)
def test_a_wrong_entry_fails_the_self_check(
    make_hf: Any,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
    backends: tuple[str, ...],
    check: str,
) -> None:
    right = backend_module.family_of
    monkeypatch.setattr(backend_module, "family_of", lambda hf: dataclasses.replace(right(hf), **change))
    for backend in backends:
        with pytest.raises(InputError, match=check):
            load_model(make_hf("gpt2_square"), tokenizer=tokenizer, backend=backend)


def test_a_write_that_is_lost_fails_the_self_check(
    make_hf: Any, tokenizer: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Write, "__call__", lambda self, activation: activation)
    with pytest.raises(InputError, match="a write at embed changes the logits"):
        load_model(make_hf("gpt2"), tokenizer=tokenizer, backend=backend)


def test_a_model_whose_parts_do_not_add_up_is_refused(make_hf: Any, tokenizer: Any, backend: str) -> None:
    hf = make_hf("gpt2")
    hf.transformer.h[1].register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(InputError, match=r"adds up at layer [12]"):
        load_model(hf, tokenizer=tokenizer, backend=backend)
    hf = make_hf("gpt2")
    hf.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="finite logits"):
        load_model(hf, tokenizer=tokenizer, backend=backend)


def test_what_cannot_be_vouched_for_is_refused(make_hf: Any, tokenizer: Any, tmp_path: Any) -> None:
    hf = make_hf("gpt2")
    small: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "ffn_dim": 8, "num_attention_heads": 2}
    sizes = {"vocab_size": VOCAB, "word_embed_proj_dim": 8, "do_layer_norm_before": False}
    post_norm = OPTForCausalLM(OPTConfig(**sizes, **small))
    quantized = make_hf("gpt2")
    quantized.config.quantization_config = {"quant_method": "gptq"}
    T5Config().save_pretrained(tmp_path / "pairs")
    (tmp_path / "empty").mkdir()
    hf.config.save_pretrained(tmp_path / "weightless")
    hf.save_pretrained(tmp_path / "tokenless")
    hf.save_pretrained(tmp_path / "partial", state_dict={"transformer.wte.weight": hf.transformer.wte.weight})
    hf.save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"nothing")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (
            hf,
            {"tokenizer": tokenizer, "backend": "torch"},
            "the backend is 'torch', expected one of transformer_lens, nnsight",
        ),
        (hf, {}, "without its tokenizer"),
        (hf, {"tokenizer": object()}, "character offsets"),
        (hf, {"tokenizer": tokenizer, "dtype": "int8"}, "the dtype is 'int8', expected one of float32, bfloat16"),
        (hf, {"tokenizer": tokenizer, "dtype": "float16"}, r"call \.to"),
        (hf, {"tokenizer": tokenizer, "device": "nowhere"}, "device 'nowhere'"),
        (make_hf("gpt2").to("meta"), {"tokenizer": tokenizer}, "without data"),
        (post_norm, {"tokenizer": tokenizer}, "'opt' is not known.*its blocks end with the norm 'final_layer_norm'"),
        (GPT2Model(GPT2Config(n_embd=8, n_head=1, n_layer=1)), {"tokenizer": tokenizer}, "GPT2LMHeadModel"),
        (torch.nn.Linear(2, 2), {"tokenizer": tokenizer}, "is a Linear"),
        (quantized, {"tokenizer": tokenizer}, "quantized"),
        (tmp_path / "pairs", {}, "'t5' has no causal language model"),
        (tmp_path / "absent", {}, "no model folder"),
        ("./absent", {}, "no model folder"),
        (Path("tiny"), {}, "no model folder"),
        ("not a name", {}, "cannot load the model 'not a name'"),
        (tmp_path / "empty", {}, "no config.json"),
        (tmp_path / "weightless", {}, "has no weights in safetensors"),
        (tmp_path / "tokenless", {}, "into no tokens"),
        (tmp_path / "partial", {"tokenizer": tokenizer}, "lacks .* of its weights"),
        (tmp_path / "cut", {"tokenizer": tokenizer}, "cannot load"),
    ]
    for source, arguments, match in cases:
        with pytest.raises(InputError, match=match) as caught:
            load_model(source, **arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [None, 5, [], ""])
def test_what_is_no_model_is_refused(source: Any) -> None:
    with pytest.raises(InputError, match=r"expected .*a hub name|expected a name, a folder"):
        load_model(source)
