"""Tiny random models of every family, and a small fast tokenizer, both made in code.

Fixtures for all test files:

- `tokenizer`: byte-level BPE with offsets, pad and eos, behaves like any fast transformers tokenizer.
- `family`, `backend`: parametrized names; a test that takes both runs on every combination.
- `make_hf(family, seed=0, **config)`: a fresh transformers model.
- `make_model(family, backend, seed=0, **config)`: a fresh `Model` around one.
- `small_model`: a GPT-2-shaped `Model`, on both backends. `lens_model`: the same on TransformerLens only.
- `neo_model`: GPT-Neo with local and global attention, on both backends.
- `family_model`: every family on both backends.
- `zygote`: a process that forks commands, so that none of them has to import and load what it needs.

Models are made once per session, on TransformerLens without the fast engine, on nnsight with it; the weights of the
four are put back after each test, so tests may edit them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import typechecks
from fontTools import subset
from helpers.models import BACKENDS, SHAPES, random_hf, small_tokenizer
from helpers.zygote import Zygote
from transformers import (
    PreTrainedTokenizerFast,
)

from mechedit.cli import parsing
from mechedit.models import load_model

# Settings that the user tuned for a model would change what is tested.
os.environ["MECHEDIT_TUNED"] = os.path.join(os.devnull, "tuned")

# One thread: models this small only lose by waiting for a second, above all on a busy machine.
torch.set_num_threads(1)

# matplotlib lays text out itself: fonts in PDF files need no tables for it, and to cut these takes most of the time.
subset.Options._drop_tables_default = [*subset.Options._drop_tables_default, "GSUB", "GPOS", "GDEF"]


@pytest.fixture(autouse=True)
def _types_checked_anew() -> None:
    """The first calls of each function are checked in every test."""
    typechecks.SAMPLING.begin()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return small_tokenizer()


@pytest.fixture(params=list(SHAPES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def make_hf() -> Callable[..., Any]:
    return random_hf


@pytest.fixture(scope="session")
def make_model(tokenizer: Any) -> Callable[..., Any]:
    def make(family: str = "gpt2", backend: str = "transformer_lens", seed: int = 0, **changes: Any) -> Any:
        return load_model(random_hf(family, seed, **changes), tokenizer=tokenizer, backend=backend)

    return make


@pytest.fixture(scope="session")
def _made(make_model: Callable[..., Any]) -> Callable[[str, str], Any]:
    models_by_name: dict[tuple[str, str], Any] = {}

    def get(family: str, backend: str) -> Any:
        if (family, backend) not in models_by_name:
            models_by_name[family, backend] = make_model(family, backend)
            if backend == "transformer_lens":
                # The other backend's models run in the fast engine.
                models_by_name[family, backend].fast_engine.prepare("off")
        return models_by_name[family, backend]

    return get


def _lend(model: Any) -> Iterator[Any]:
    """Yield a shared model and put its weights back afterwards."""
    before = {name: parameter.detach().clone() for name, parameter in model.hf.named_parameters()}
    yield model
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            parameter.copy_(before[name])


@pytest.fixture
def small_model(_made: Callable[[str, str], Any], backend: str) -> Iterator[Any]:
    yield from _lend(_made("gpt2", backend))


@pytest.fixture
def lens_model(_made: Callable[[str, str], Any]) -> Iterator[Any]:
    yield from _lend(_made("gpt2", "transformer_lens"))


@pytest.fixture
def neo_model(_made: Callable[[str, str], Any], backend: str) -> Iterator[Any]:
    yield from _lend(_made("gpt_neo", backend))


@pytest.fixture
def family_model(_made: Callable[[str, str], Any], family: str, backend: str) -> Iterator[Any]:
    yield from _lend(_made(family, backend))


@pytest.fixture(scope="session", autouse=True)
def _tiny_loaded_once() -> Iterator[None]:
    """Commands and scripts called in process get the same tiny model, while its weights are those it had."""
    loaded: dict[tuple[tuple[str, Any], ...], tuple[Any, str]] = {}

    def load(name: str, **options: Any) -> Any:
        if name != "tiny":
            return load_model(name, **options)
        key = tuple(sorted(options.items()))
        model, weights = loaded.get(key, (None, ""))
        if model is None or model.weights_hash() != weights:
            model = load_model(name, **options)
            loaded[key] = model, model.weights_hash()
        return model

    with mock.patch.object(parsing, "load_model", load):
        yield


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()
