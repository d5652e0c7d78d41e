"""Every step on a tiny model whose weights lie somewhere, and the numbers that come out."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook_on_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

import mechedit as me
import mechedit.models
import mechedit.models.weights_hash
from helpers.edits import identical, weights
from helpers.fake_devices import DEVICE, FakeDevice, register
from mechedit.evaluation import EvaluationConfig

TINY = Path(mechedit.models.__file__).parent / "tiny"


@functools.cache
def tiny_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def tiny_hf(**settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, **settings).eval()


def every_step(hf: Any, backend: str, folder: Path | None = None) -> dict[str, torch.Tensor]:
    """Trace, moments, targets, an edit, its evaluation, apply and undo; export where there is a folder."""
    model = me.load_model(hf, tokenizer=tiny_tokenizer(), backend=backend)
    requests, layers, before = me.load_requests("tiny")[:1], [2, 4], weights(model)
    config = me.TraceConfig(samples=1, kinds=("state", "mlp"), roles=("subject_last",), sever=("nothing", "attn"))
    effects = me.trace_facts(model, me.load_facts("known")[:1], config)
    moments = me.collect_moments(model, me.load_texts("tiny")[:15], layers)
    targets = me.find_targets(model, requests, layers[-1], ["{}"], me.TargetConfig(steps=2))
    edit = me.memit(model, requests, layers, moments, ["{}"], me.MemitConfig(steps=2, damping=0.01), targets)
    me.apply_(model, edit)
    assert not identical(model, before)
    me.undo_(model, edit)
    assert identical(model, before)
    with me.edited(model, edit):
        scores = me.evaluate(model, requests, EvaluationConfig(generation_tokens=3, generation_prompts=1, resamples=10))
    if folder is not None:
        me.export(model, edit, folder)
    numbers = {
        "effects": torch.as_tensor(effects["score"]), "moment": moments[4].matrix, "z": targets.z,
        "delta": edit.delta(4), "scores": torch.as_tensor(scores.table["value"]),
    }  # fmt: skip
    return {name: value.cpu().double() for name, value in numbers.items()}


def over_two_devices() -> Any:
    """The tiny model with its embeddings and first layers on a fake device, and the others on the CPU."""
    hf = tiny_hf()
    blocks = hf.transformer.h
    places = dict.fromkeys(("transformer.wte", "transformer.wpe", "lm_head"), DEVICE) | {"transformer.ln_f": "cpu"}
    places |= {f"transformer.h.{layer}": DEVICE if layer < len(blocks) // 2 else "cpu" for layer in range(len(blocks))}
    for name, place in places.items():
        hf.get_submodule(name).to(place)
    hf.tie_weights()
    # As `accelerate.dispatch_model`, which takes a CPU beside another device for a place to store weights.
    attach_align_device_hook_on_blocks(hf, execution_device=places, offload=dict.fromkeys(places, False))
    add_hook_to_module(hf, AlignDevicesHook(DEVICE, io_same_device=True), append=True)
    return hf


def save_numbers(folder: Path, backend: str) -> None:
    """Save what every step gives on two devices."""
    register()
    torch.set_num_threads(1)
    # A mode is one of a thread.
    pool = functools.partial(ThreadPoolExecutor, initializer=lambda: FakeDevice().__enter__())
    vars(mechedit.models.weights_hash)["ThreadPoolExecutor"] = pool
    with FakeDevice():
        with pytest.raises(RuntimeError, match="expected all tensors on the same device, found cpu and fake:0"):
            torch.ones(3) + torch.ones(3, device=DEVICE)
        torch.save(every_step(over_two_devices(), backend), folder / "numbers.pt")
