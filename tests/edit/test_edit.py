"""An edit is applied exactly, taken back bit for bit, kept in a file, and made for one model."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.edits import LAYERS, identical, logits, random_edit, weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mechedit.edit.applied_edits
import mechedit.edit.apply_undo
from mechedit.edit import Edit, Factors, apply_, copy_weights, edited, export, restore_, undo_
from mechedit.errors import InputError
from mechedit.models import load_model
from mechedit.models.model_lock import Region


def test_delta_is_the_product_of_its_factors(lens_model: Any) -> None:
    edit = random_edit(lens_model)
    factors = edit.factors[2]
    assert torch.equal(edit.delta(2), factors.left @ factors.right)
    assert edit.delta(2).shape == (96, 32)
    assert edit.layers == [0, 2]
    assert repr(edit).endswith(f"layers=[0, 2], rank={factors.rank})"), "not all of its numbers"
    with pytest.raises(InputError, match=r"no layer 1, expected one of \[0, 2\]"):
        edit.delta(1)


def test_edited_changes_the_model_and_restores_it(family_model: Any) -> None:
    edit, before, clean = random_edit(family_model), weights(family_model), logits(family_model)
    start = {layer: family_model.projection(layer).clone() for layer in LAYERS}
    with edited(family_model, edit):
        for layer in LAYERS:
            expected = (start[layer].double() + edit.delta(layer)).float()
            assert torch.equal(family_model.projection(layer), expected)
        assert not torch.allclose(logits(family_model), clean, atol=0.01)
        changed = [name for name, value in family_model.hf.named_parameters() if not torch.equal(value, before[name])]
        assert len(changed) == len(LAYERS)
    assert identical(family_model, before)
    assert torch.equal(logits(family_model), clean)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_edited_restores_on_errors(lens_model: Any, error: type[BaseException]) -> None:
    before, edit = weights(lens_model), random_edit(lens_model)

    def fail() -> None:
        with edited(lens_model, edit):
            assert not identical(lens_model, before)
            raise error

    with pytest.raises(error):
        fail()
    assert identical(lens_model, before)


def test_undo_is_bit_exact(make_model: Any, family: str) -> None:
    model = make_model(family)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        model.hf.to(dtype)
        assert model.projection(0).dtype == dtype
        before, edit = weights(model), random_edit(model)
        apply_(model, edit)
        assert not identical(model, before)
        undo_(model, edit)
        assert identical(model, before)
        # Subtracting what was added would not do.
        with torch.no_grad():
            for sign in (1, -1):
                model.projection(0).add_(sign * edit.delta(0).to(dtype))
        assert not identical(model, before)


def test_weights_are_summed_in_float64_and_rounded_once(make_model: Any) -> None:
    model = make_model("gpt2")
    edit, start = random_edit(model), model.projection(0).double()
    with edited(model, edit):
        assert torch.equal(model.projection(0), (start + edit.delta(0)).float())
        assert not torch.equal(model.projection(0), start.float() + edit.delta(0).float())


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """A process that is started in the background may have been told to ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("change", [apply_, undo_, export, lambda model, edit: edited(model, edit).__enter__()])
def test_ctrl_c_between_two_layers_leaves_everything_as_it_was(
    lens_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Any
) -> None:
    """A real signal, as the terminal sends it, after the first of two layers is written."""
    edit, written = random_edit(lens_model), []
    if change is undo_:
        apply_(lens_model, edit)
    before, write = weights(lens_model), mechedit.edit.apply_undo._write_

    def interrupted(model: Any, layer: int, weight: Tensor) -> None:
        write(model, layer, weight)
        written.append(identical(model, before))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(mechedit.edit.apply_undo, "_write_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        change(lens_model, edit, tmp_path / "out") if change is export else change(lens_model, edit)
    assert written == [False]
    assert identical(lens_model, before)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    if change is undo_:
        undo_(lens_model, edit)
    with pytest.raises(InputError, match="not applied"):
        undo_(lens_model, edit)


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_waits_until_all_layers_are_back(lens_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, originals = weights(lens_model), copy_weights(lens_model, LAYERS)
    with torch.no_grad():
        for layer in LAYERS:
            lens_model.projection(layer).zero_()
    find, handler = lens_model.projection, signal.getsignal(signal.SIGINT)

    def interrupting(layer: int) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return find(layer)

    monkeypatch.setattr(lens_model, "projection", interrupting)
    with pytest.raises(KeyboardInterrupt):
        interrupting(0)
    with pytest.raises(KeyboardInterrupt):
        restore_(lens_model, originals)
    assert identical(lens_model, before)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("place", ["settle", "restore_"])
@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_again_while_the_weights_come_back_leaves_them_whole(
    lens_model: Any, monkeypatch: pytest.MonkeyPatch, place: str, times: int
) -> None:
    """The second press of who is impatient: as threads are waited for, or before signals are held back."""
    before, edit, presses = weights(lens_model), random_edit(lens_model), []
    owner: Any = Region if place == "settle" else mechedit.edit.applied_edits
    original = getattr(owner, place)

    def interrupted(*arguments: Any) -> None:
        presses.append(place)
        if len(presses) <= times:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(owner, place, interrupted)
    with pytest.raises(KeyboardInterrupt), edited(lens_model, edit):
        assert not identical(lens_model, before)
    assert presses
    assert identical(lens_model, before)
    monkeypatch.undo()
    with ThreadPoolExecutor(1) as pool:  # who would wait for a region that nobody ends
        assert pool.submit(logits, lens_model).result().isfinite().all()


def test_other_threads_edit_too(lens_model: Any) -> None:
    """Signal handlers can be set in the main thread alone."""
    before, edit = weights(lens_model), random_edit(lens_model)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(apply_, lens_model, edit).result()
        assert not identical(lens_model, before)
        pool.submit(undo_, lens_model, edit).result()
    assert identical(lens_model, before)


def test_edits_are_undone_last_first(make_model: Any) -> None:
    model = make_model("gpt2")
    before, first = weights(model), random_edit(model, 0)
    apply_(model, first)
    second = random_edit(model, 1, (0, 1))
    apply_(model, second)
    with pytest.raises(InputError, match="1 edits were applied after"):
        undo_(model, first)
    undo_(model, second)
    with pytest.raises(InputError, match="not applied"):
        undo_(model, second)
    undo_(model, first)
    assert identical(model, before)
    with pytest.raises(InputError, match="not applied"):
        undo_(model, first)


def test_what_is_applied_is_known_by_the_model_alone(make_model: Any, tmp_path: Path) -> None:
    first, second = make_model("gpt2"), make_model("gpt2")
    before, edit = weights(first), random_edit(first)
    apply_(first, edit)
    with pytest.raises(InputError, match="not applied"):
        undo_(second, edit)
    edit.save(tmp_path / "edit.safetensors")
    undo_(first, Edit.load(tmp_path / "edit.safetensors"))
    assert identical(first, before)


def test_an_edit_for_other_weights_is_refused(lens_model: Any, make_model: Any) -> None:
    edit, second = random_edit(lens_model), make_model("gpt2", seed=1)
    before = weights(second)
    both = f"{lens_model.weights_hash()}.*{second.weights_hash()}"
    with pytest.raises(InputError, match=both), edited(second, edit):
        pass
    with pytest.raises(InputError, match=both):
        apply_(second, edit)
    assert identical(second, before)
    with edited(lens_model, edit), pytest.raises(InputError, match="undo other edits"):
        apply_(lens_model, edit)


def test_an_edit_that_names_no_weights_is_refused(lens_model: Any) -> None:
    with pytest.raises(InputError, match="made for None with weights None"):
        apply_(lens_model, Edit(factors=random_edit(lens_model).factors, manifest={"method": "test"}))


def test_factors_that_are_not_finite_are_refused(lens_model: Any, tmp_path: Path) -> None:
    edit, before = random_edit(lens_model), weights(lens_model)
    edit.factors[2].right[1, 3] = torch.nan
    edit.factors[2].right[0, 0] = torch.inf
    message = "layer 2: the values of its right factor hold 2 values of 64 that are not finite"
    with pytest.raises(InputError, match=message):
        apply_(lens_model, edit)
    edit.save(tmp_path / "edit.safetensors")
    with pytest.raises(InputError, match=message):
        Edit.load(tmp_path / "edit.safetensors")
    assert identical(lens_model, before)


def test_factors_that_do_not_fit_the_model_are_refused(lens_model: Any) -> None:
    square = Factors(left=torch.ones(32, 1), right=torch.ones(1, 96))
    for layer, actual in ((0, r"\(96, 32\)"), (7, "absent")):
        edit = Edit(factors={layer: square}, manifest={"model": lens_model.provenance()})
        with pytest.raises(InputError, match=rf"layer {layer} is \(32, 96\), but the model's is {actual}"):
            apply_(lens_model, edit)


def test_save_and_load(lens_model: Any, tmp_path: Path) -> None:
    edit, path = random_edit(lens_model), tmp_path / "deep" / "edit.safetensors"
    edit.save(path)
    loaded = Edit.load(path)
    assert loaded.manifest == edit.manifest
    for layer in LAYERS:
        assert torch.equal(loaded.delta(layer), edit.delta(layer))
    assert {name: tuple(value.shape) for name, value in load_file(path).items()} == {
        "layer.0.left": (96, 2),
        "layer.0.right": (2, 32),
        "layer.2.left": (96, 2),
        "layer.2.right": (2, 32),
    }
    assert [item.name for item in path.parent.iterdir()] == ["edit.safetensors"]


def test_damaged_and_foreign_files_are_refused(lens_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    with pytest.raises(InputError, match="cannot read"):
        Edit.load(path)
    random_edit(lens_model).save(path)
    content, tensors = path.read_bytes(), {name: value.clone() for name, value in load_file(path).items()}
    loaded = Edit.load(path)
    path.write_bytes(bytes(len(content)))
    # What was loaded lives in memory, not in the file.
    assert torch.equal(loaded.factors[2].left, tensors["layer.2.left"])
    for length in (len(content) - 8, 100, 3, 0):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="cut short"):
            Edit.load(path)
    save_file(tensors, path)
    with pytest.raises(InputError, match="no 'manifest' in its header"):
        Edit.load(path)
    save_file(tensors, path, metadata={"manifest": "{"})
    with pytest.raises(InputError, match="not JSON"):
        Edit.load(path)
    for wrong in (
        {name: value for name, value in tensors.items() if name != "layer.2.left"},
        {**tensors, "layer.2.left": tensors["layer.2.left"][:, :1].contiguous()},
        {**tensors, "layer.2.left": tensors["layer.2.left"].flatten()},
        {**tensors, "layer.02.left": tensors["layer.2.left"].clone(), "layer.02.right": torch.ones(2, 32)},
        {**tensors, "wte.weight": tensors["layer.2.left"].clone()},
        {},
    ):
        save_file(wrong, path, metadata={"manifest": "{}"})
        with pytest.raises(InputError, match="not an edit"):
            Edit.load(path)
    save_file({**tensors, "layer.2.left": tensors["layer.2.left"].long()}, path, metadata={"manifest": "{}"})
    with pytest.raises(InputError, match="int64"):
        Edit.load(path)
    for manifest, message in {
        "{}": "does not say which model",
        '{"model": {"model": "tiny"}}': "does not say which model",
        "[]": "cannot be read",
        '{"model": "tiny"}': "cannot be read: 'model' is 'tiny'",
    }.items():
        save_file(tensors, path, metadata={"manifest": manifest})
        with pytest.raises(InputError, match=message):
            Edit.load(path)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_half_precision_and_tied_embeddings_survive_the_export(
    make_hf: Any, tokenizer: Any, tmp_path: Path, name: str
) -> None:
    model = load_model(make_hf(name).bfloat16(), tokenizer=tokenizer)
    assert model.hf.config.tie_word_embeddings
    edit, before = random_edit(model), weights(model)
    export(model, edit, tmp_path / "out")
    assert identical(model, before)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight
    with edited(model, edit):
        changed = weights(model)
        assert identical(load_model(reloaded, tokenizer=tokenizer), changed)
    assert not identical(model, changed)


def test_an_exported_edit_cannot_be_undone_and_it_is_said_why(lens_model: Any, tmp_path: Path) -> None:
    edit = random_edit(lens_model)
    export(lens_model, edit, tmp_path / "out")
    with pytest.raises(InputError, match="neither an edit file nor an exported checkpoint holds them, so load the"):
        undo_(load_model(tmp_path / "out"), edit)


def test_export_reloads_to_the_edited_model(small_model: Any, tmp_path: Path) -> None:
    edit, before = random_edit(small_model), weights(small_model)
    with edited(small_model, edit):
        expected = logits(small_model)
    export(small_model, edit, tmp_path / "out")
    assert identical(small_model, before)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("The mother tongue of Leon Blum is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        actual = reloaded(ids).logits
    assert torch.allclose(actual, expected, atol=1e-5)
    assert not torch.allclose(actual, logits(small_model), atol=0.01)
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_export_is_whole_or_absent(
    lens_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    edit, before = random_edit(lens_model), weights(lens_model)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export(lens_model, edit, taken)

    def fail(folder: Path, **settings: Any) -> None:
        (Path(folder) / "half").write_text("half")
        raise error("disk full")

    monkeypatch.setattr(lens_model.hf, "save_pretrained", fail)
    with pytest.raises(error, match="disk full"):
        export(lens_model, edit, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["taken"]
    assert identical(lens_model, before)
