"""An edit goes onto copies of its model in other dtypes, and onto no other weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.edits import identical, logits, random_edit, weights

from mechedit.data import load_requests
from mechedit.edit import Edit, apply_, edited, undo_
from mechedit.errors import InputError
from mechedit.methods import METHODS
from mechedit.models import DTYPES, load_model
from mechedit.provenance import CAST_HASHES


@pytest.fixture(scope="module", params=DTYPES)
def source(
    request: pytest.FixtureRequest, make_hf: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint in each of the dtypes; its weights have digits that the other ones do not hold."""
    folder = tmp_path_factory.mktemp("source") / request.param
    make_hf("llama").to(DTYPES[request.param]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def load(source: Path) -> Callable[..., Any]:
    """Loads the checkpoint in a dtype, each copy once: tests leave them as they were."""
    return functools.cache(lambda dtype, copy=0: load_model(source, device="cpu", dtype=dtype))


def recorded(model: Any) -> Edit:
    """A random edit with the manifest that methods write."""
    edit = random_edit(model)
    manifest = {"model": {**edit.manifest["model"], CAST_HASHES: model.cast_hashes()}}
    return Edit(factors=edit.factors, manifest=manifest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("made_in", DTYPES)
def test_it_goes_onto_every_copy(source: Path, load: Any, tmp_path: Path, made_in: str, dtype: str) -> None:
    """However the copies were rounded: each is the checkpoint, rounded once, as people load it."""
    model, copy = load(made_in), load(dtype, copy=1)
    edit, before = recorded(model), weights(copy)
    if source.name == "float32" and {made_in, dtype} == {"bfloat16", "float16"}:
        # Neither of two half precisions can tell what the other was rounded from.
        with pytest.raises(InputError, match=f"in {made_in}, found .* in {dtype};"):
            apply_(copy, edit)
        return
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    with edited(model, edit):
        expected = logits(model).float()
    clean = logits(copy).float()
    apply_(copy, loaded)
    reached = logits(copy).float()
    undo_(copy, loaded)
    assert identical(copy, before)
    assert (expected - clean).norm() > 0.2 * clean.norm()
    assert (reached - expected).norm() < 0.05 * (expected - clean).norm()


def test_not_onto_other_weights(source: Path, load: Any) -> None:
    model = load("float32")
    edit = recorded(model)
    for dtype in DTYPES:
        copy = load_model(source, device="cpu", dtype=dtype)
        with torch.no_grad():
            copy.hf.model.norm.weight[3] *= 1.01
        before = weights(copy)
        with pytest.raises(InputError, match=f"in float32, found .* with weights {copy.weights_hash()} in {dtype};"):
            apply_(copy, edit)
        assert identical(copy, before)


def test_an_older_edit_goes_where_rounding_tells(source: Path, load: Any) -> None:
    """Edits without hashes in other dtypes: from a half precision to a wider one of the same weights, and back."""
    full, half = load("float32"), load("bfloat16")
    with edited(full, random_edit(half)):
        pass
    if source.name == "bfloat16":
        with edited(half, random_edit(full)):
            pass
    else:
        with pytest.raises(InputError, match="in float32, found"), edited(half, random_edit(full)):
            pass


def test_methods_record_the_hashes() -> None:
    model = load_model("tiny")
    edit = METHODS["ft"](model, load_requests("tiny")[:1], [2])
    assert edit.manifest["model"][CAST_HASHES] == {
        dtype: load_model("tiny", dtype=dtype, device="cpu").weights_hash() for dtype in ("bfloat16", "float16")
    }
    assert model.cast_hashes(["float16", "float32"]) == {"float16": load_model("tiny", dtype="float16").weights_hash()}
