"""Where weights lie, who looks on, inference mode: no result changes, or it is said; loading makes no second copy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from helpers.edits import logits
from helpers.models import BACKENDS
from helpers.placement import every_step, tiny_hf, tiny_tokenizer

from mechedit.errors import InputError
from mechedit.models import load_model

TESTS = Path(__file__).parents[1]


def dispatched() -> Any:
    """As accelerate spreads a model: each part's forward is replaced by one that moves its inputs."""
    parts = ["transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"]
    parts += [f"transformer.h.{layer}" for layer in range(len(tiny_hf().transformer.h))]
    hf = dispatch_model(tiny_hf(), dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
    assert "forward" in hf.transformer.h[0].__dict__
    return hf


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return every_step(tiny_hf(), "transformer_lens", tmp_path_factory.mktemp("plain") / "out")


@pytest.mark.parametrize(
    ("make", "backend"),
    [*((dispatched, backend) for backend in BACKENDS), (lambda: tiny_hf(device_map="auto"), BACKENDS[0])],
    ids=[*(f"dispatched-{backend}" for backend in BACKENDS), "auto"],
)
def test_a_model_spread_by_accelerate_passes_every_step(
    make: Any, backend: str, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert_equal(every_step(make(), backend, tmp_path / "out"), expected)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        bound = 1e-4 * float(value.abs().max().clamp_min(1))
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_layers_on_two_devices_pass_every_step(expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """One is a fake, and computing with tensors of both fails as it does between a GPU and a CPU."""
    # A process of its own, as torch takes a new device only before its first gradient. Both backends would take long.
    code = f"from pathlib import *\nfrom helpers.placement import *\nsave_numbers({tmp_path!r}, 'transformer_lens')"
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(torch.load(tmp_path / "numbers.pt"), expected)


def test_weights_that_are_not_in_memory_are_refused(tmp_path: Path) -> None:
    parts = {name: "cpu" for name in ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head")}
    parts |= {
        f"transformer.h.{layer}": "disk" if layer == 3 else "cpu" for layer in range(len(tiny_hf().transformer.h))
    }
    hf = dispatch_model(tiny_hf(), parts, main_device="cpu", offload_dir=tmp_path)
    with pytest.raises(InputError, match="weights without data"):
        load_model(hf, tokenizer=tiny_tokenizer())


def test_auto_is_the_cpu_where_there_is_nothing_else() -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    assert load_model("tiny", device="auto").device.type == "cpu"
    assert load_model(tiny_hf(), tokenizer=tiny_tokenizer(), device="auto").device.type == "cpu"


@pytest.fixture
def _inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.usefixtures("_inference_mode")
def test_every_step_in_inference_mode(backend: str, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with torch.inference_mode(False):
        hf = tiny_hf()
    assert_equal(every_step(hf, backend, tmp_path / "out"), expected)


def test_a_model_made_in_inference_mode_is_refused_or_loaded_by_name(make_hf: Any, tokenizer: Any) -> None:
    with torch.inference_mode():
        with pytest.raises(InputError, match=r"was made under torch\.inference_mode"):
            load_model(make_hf("llama"), tokenizer=tokenizer)
        model = load_model("tiny")
    assert not any(parameter.is_inference() for _, parameter in model.named_parameters())


def scaling(module: Any, arguments: Any, output: Any) -> Any:
    return output * 1.01


class Doubling:
    def __call__(self, module: Any, arguments: Any) -> Any:
        return (arguments[0] * 2, *arguments[1:])


def test_a_users_hook_is_named(make_hf: Any, tokenizer: Any, backend: str) -> None:
    hf = make_hf("llama")
    handle = hf.model.layers[1].register_forward_hook(scaling)
    with pytest.raises(InputError, match=rf"module 'model.layers.1' has a forward hook scaling \(of {__file__}, line"):
        load_model(hf, tokenizer=tokenizer, backend=backend)
    handle.remove()
    hf.model.layers[2].register_forward_pre_hook(Doubling())
    with pytest.raises(InputError, match=r"module 'model.layers.2' has a forward pre-hook Doubling"):
        load_model(hf, tokenizer=tokenizer, backend=backend)
    patched = make_hf("llama")
    forward = patched.model.layers[2].forward
    patched.model.layers[2].forward = lambda *arguments, **named: forward(*arguments, **named) * 1.01
    with pytest.raises(InputError, match=r"module 'model.layers.2' has a replaced forward .*<lambda>"):
        load_model(patched, tokenizer=tokenizer, backend=backend)


def test_a_hook_that_only_looks_is_let_be(make_hf: Any, tokenizer: Any, backend: str) -> None:
    hf, seen = make_hf("llama"), []
    hf.model.layers[1].register_forward_hook(lambda module, arguments, output: seen.append(1))
    model = load_model(hf, tokenizer=tokenizer, backend=backend)
    assert seen
    torch.testing.assert_close(logits(model), logits(load_model(make_hf("llama"), tokenizer=tokenizer)))


PEAK = """
import gc, sys, threading, time
import torch
from mechedit.models import load_model

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def watch():
    while watching:
        peaks.append(anonymous())
        time.sleep(0.002)

load_model("tiny", device="cpu")  # imports what a load imports
gc.collect()
peaks, watching, start = [], True, anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load_model(sys.argv[1], device="cpu")
model.weights_hash()
model.cast_hashes()
watching = False
thread.join()
size = sum(weight.nbytes for _, weight in model.named_parameters())
print((max(peaks) - start) / size, size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the operating system does not say")
def test_loading_takes_little_more_than_the_weights(make_hf: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Converted from bfloat16 to float32, which leaves no second copy; hashing takes none either."""
    hf = make_hf("llama", hidden_size=512, intermediate_size=12288, num_hidden_layers=8)
    hf.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    printed = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, size = map(float, printed.stdout.split())
    assert size > 600e6
    assert 0.9 < peak < 1.2, "below, the weights themselves would not have been seen"
