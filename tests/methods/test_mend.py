"""MEND: factors that are the gradient, an editor that begins as the identity, a training that goes on as it would."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers.edits import identical, logits, weights
from helpers.mend import editor_of, identity_editor
from helpers.spreading import REQUESTS
from torch import Tensor

import mechedit.methods.block_inputs as block_inputs_module
import mechedit.methods.mend_training as training_module
from mechedit.data import EditRequest, Neighbor
from mechedit.edit import apply_, edited, export_lora, undo_
from mechedit.errors import InputError
from mechedit.methods import MendConfig, MendEditor, MendTrainingConfig, mend, recommended, train_mend
from mechedit.methods.block_inputs import RecentBlockInputs
from mechedit.methods.gradient_factors import gradient_factors
from mechedit.methods.mend_editor import EditorNetwork
from mechedit.methods.training import projection_gradients, run_rows, trainable, training_rows

TEXTS = [
    "The mother tongue of Leon Blum is French, and that of Go Hyeon-jeong is Korean.",
    "The Space Needle is in downtown Seattle; LeBron James plays the sport of basketball in town.",
    "",
]
TARGETS = {
    "Danielle Darrieux": "Korean", "Leon Blum": "French", "Toko Yasuda": "Paris", "Miles Davis": "Seattle",
    "Edwin": "England", "LeBron James": "guitar",
}  # fmt: skip
NEIGHBOR = Neighbor(prompt="The mother tongue of Apple is", object="French")
FACTS = [
    EditRequest(
        id=name, subject=name, prompt="The mother tongue of {} is", target_new=target,
        paraphrases=(f"They say that {name} speaks",), neighbors=(NEIGHBOR,),
    )
    for name, target in TARGETS.items()
]  # fmt: skip
QUICK = MendTrainingConfig(
    steps=4, batch_size=2, rank=4, lr=1e-2, rate=1e-2, rate_lr=1e-3, text_tokens=8, validation=2, validate_every=2,
    neighbors=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def lively(make_model: Any) -> Any:
    return make_model("gpt2", initializer_range=0.05)


def gradients_of(model: Any, layers: list[int], requests: list[EditRequest]) -> dict[int, Tensor]:
    """∂/∂W of the sum of the requests' losses, by torch."""
    rows = training_rows(model, requests, ["{}"])
    with trainable(model, layers) as parameters, torch.enable_grad():
        return projection_gradients(run_rows(model, rows)[0].sum(), parameters)


def test_the_factors_are_the_gradient_in_every_family(family_model: Any) -> None:
    """Σ_t u_t δ_tᵀ = ∂L/∂W, also through a norm that follows the projection."""
    layers = [0, family_model.n_layers - 1]
    expected = gradients_of(family_model, layers, REQUESTS)
    factors = gradient_factors(family_model, training_rows(family_model, REQUESTS, ["{}"]), layers, 2)
    for layer in layers:
        total = sum((row[layer].keys.T @ row[layer].gradients for row in factors), torch.zeros(()))
        assert torch.allclose(total, expected[layer], rtol=1e-3, atol=1e-4 * float(expected[layer].abs().max()))
    ranks = [len(row[0].keys) for row in factors]
    assert len(set(ranks)) > 1, "the control: padding has no factors"


def test_an_editor_is_the_identity_at_first(lively: Any, tmp_path: Path) -> None:
    """The edit is then a plain step along the gradient, of the rate of each layer."""
    network = EditorNetwork(lively.d_key, lively.d_model, 2, 4, rate=0.5)
    with torch.no_grad():
        network.rates[1] = 0.25
    path = tmp_path / "mend.safetensors"
    editor_of(lively, network, (0, 2)).save(path)
    edit = mend(lively, REQUESTS, [0, 2], config=MendConfig(editor=str(path)))
    expected = gradients_of(lively, [0, 2], REQUESTS)
    for layer, rate in ((0, 0.5), (2, 0.25)):
        step = -rate * expected[layer]
        assert torch.allclose(edit.delta(layer).float(), step, atol=1e-4 * float(step.abs().max()))
    half = mend(lively, REQUESTS, [0, 2], config=MendConfig(editor=str(path), scale=0.5))
    assert torch.allclose(2 * half.delta(0), edit.delta(0))
    with torch.no_grad():
        network.blocks[0].left += 0.1  # type: ignore[operator]
    editor_of(lively, network, (0, 2)).save(path)
    other = mend(lively, REQUESTS, [0, 2], config=MendConfig(editor=str(path)))
    assert not torch.allclose(other.delta(0), edit.delta(0), rtol=0.1), "the control: then it is not"


def test_the_network_is_the_papers_equation() -> None:
    """Eq. 3 for one token, in plain sums, beside shapes."""
    network = EditorNetwork(3, 2, 2, 4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in [*network.parameters(), network.mean, network.deviation]:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    keys, gradients = torch.randn(5, 3, generator=generator), torch.randn(5, 2, generator=generator)
    pseudo_keys, pseudo_gradients = network(1, keys, gradients)
    assert (pseudo_keys.shape, pseudo_gradients.shape) == ((5, 3), (5, 2))
    value = (torch.cat([keys[4], gradients[4]]) - network.mean[1]) / network.deviation[1]
    for block in network.blocks:
        inner = block.left @ (block.right @ value) + block.bias  # type: ignore[operator]
        value = value + torch.relu(block.scale[1] * inner + block.shift[1])  # type: ignore[index]
    assert torch.allclose(torch.cat([pseudo_keys[4], pseudo_gradients[4]]), value, atol=1e-5)
    factors = network.factors(1, keys, gradients)
    assert (factors.left.shape, factors.right.shape) == ((3, 5), (5, 2))
    assert torch.allclose(factors.right, -network.rates[1] * pseudo_gradients)
    assert not torch.allclose(network(0, keys, gradients)[0], pseudo_keys), "the control: layers differ"


def test_units_are_means_and_deviations_of_what_goes_in() -> None:
    network = EditorNetwork(3, 2, 1, 4)
    keys, gradients = 5 + 3 * torch.randn(500, 3), 1e-4 * torch.randn(500, 2)
    keys[:, 0] = 2.0
    network.fit_units(0, keys, gradients)
    pseudo_keys, pseudo_gradients = network(0, keys, gradients)
    for value in (pseudo_keys[:, 1:], pseudo_gradients):
        assert torch.allclose(value.mean(0), torch.zeros(2), atol=1e-3)
        assert torch.allclose(value.std(0), torch.ones(2), atol=1e-2)
    assert torch.equal(pseudo_keys[:, 0], torch.zeros(500)), "a coordinate that does not vary says nothing"


def test_the_gradient_through_the_edit_is_a_finite_difference(lively: Any) -> None:
    """dL/d(editor), by way of ∂L/∂W̃, against L at two editors."""
    config = dataclasses.replace(QUICK, clip=1e9)
    training = training_module._Training(lively, FACTS, TEXTS[:1], [0, 1], config, {}, lambda line: None)
    training.begin()
    # Away from the identity, where the loss has a kink.
    with torch.no_grad():
        for value in training.network.parameters():
            value += 0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))

    def loss() -> float:
        """The loss of the step's examples, as it is defined."""
        draw = Random(f"{QUICK.seed} 0")
        total = 0.0
        for example, factors, texts, log_probs in training._prepared(draw.sample(training.examples, 2), draw):
            with torch.no_grad(), training._written(training._changes(factors)):
                edit, locality, _ = training._losses(example, texts, log_probs)
            total += float(QUICK.edit_weight * edit + locality) / 2
        return total

    gradients: dict[str, Tensor] = {}

    def keep() -> None:
        gradients.update({name: value.grad.clone() for name, value in training.network.named_parameters()})

    training.optimizer.step = keep  # type: ignore[method-assign,assignment]
    with trainable(lively, [0, 1]) as parameters:
        training._take_step(parameters)
    for name in ("rates", "blocks.0.left", "blocks.1.right", "blocks.1.scale", "blocks.0.shift"):
        value, gradient = dict(training.network.named_parameters())[name], gradients[name]
        direction = gradient / gradient.norm()
        size = 1e-4 if name == "rates" else 1e-2 * float(value.detach().norm())
        sides = []
        for step in (size, -2 * size):
            with torch.no_grad():
                value += step * direction
            sides.append(loss())
        with torch.no_grad():
            value += size * direction
        assert (sides[0] - sides[1]) / (2 * size) == pytest.approx(float(gradient.norm()), rel=0.05), name
    assert float(gradients["blocks.0.left"].norm()) > 0


def test_a_training_lowers_the_loss_and_the_best_editor_stays(lively: Any, tmp_path: Path) -> None:
    before, lines = weights(lively), []
    path = tmp_path / "mend.safetensors"
    config = dataclasses.replace(QUICK, steps=30, validate_every=10)
    editor = train_mend(lively, FACTS, TEXTS, [0, 1], config, path, notify=lines.append)
    assert identical(lively, before)
    curve = editor.record["curve"]
    assert [row["step"] for row in curve] == [0, 10, 20, 30]
    best = min(curve, key=lambda row: row["loss"])
    assert best["loss"] < 0.9 * curve[0]["loss"]
    assert editor.record["steps"] == best["step"]
    assert "5 requests to train with and 1 to validate with" in lines[0]
    assert not list(tmp_path.glob("*.training*")), "its checkpoint is gone"
    assert train_mend(lively, FACTS, TEXTS, [0, 1], config, path).record == MendEditor.load(path).record
    for change, field in (({"lr": 1e-3}, "made_with"), ({"steps": 40}, "trained")):
        with pytest.raises(InputError, match=rf"{field} = .*pass --overwrite to train anew"):
            train_mend(lively, FACTS, TEXTS, [0, 1], dataclasses.replace(config, **change), path)


def test_an_interrupted_training_ends_as_it_would_have(
    lively: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the training that was interrupted was to take more steps."""
    uninterrupted = train_mend(lively, FACTS, TEXTS, [0, 1], QUICK, tmp_path / "uninterrupted.safetensors")
    monkeypatch.setattr(training_module, "SECONDS", 0.0)
    plain, steps = training_module._Training._take_step, []

    def interrupted(training: Any, parameters: Any) -> None:
        if training.step == 3:
            raise KeyboardInterrupt
        plain(training, parameters)

    def counted(training: Any, parameters: Any) -> None:
        steps.append(training.step)
        plain(training, parameters)

    before, path = weights(lively), tmp_path / "mend.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(training_module._Training, "_take_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_mend(lively, FACTS, TEXTS, [0, 1], dataclasses.replace(QUICK, steps=6), path)
    assert identical(lively, before)
    assert not path.exists()
    assert (tmp_path / "mend.training.safetensors").exists()
    with pytest.raises(InputError, match=r"the training .* was made with settings"):
        train_mend(lively, FACTS, TEXTS, [0, 1], dataclasses.replace(QUICK, lr=1e-3), path)
    with pytest.raises(InputError, match="has come to step 3, expected at most 2"):
        train_mend(lively, FACTS, TEXTS, [0, 1], dataclasses.replace(QUICK, steps=2), path)
    monkeypatch.setattr(training_module._Training, "_take_step", counted)
    again = train_mend(lively, FACTS, TEXTS, [0, 1], QUICK, path)
    assert steps == [3], "it goes on from its checkpoint"
    assert again.record == uninterrupted.record
    assert path.read_bytes() == (tmp_path / "uninterrupted.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_training_that_starts_at_the_lowest_edited_block_is_that_from_the_tokens(
    make_model: Any, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is kept of the streams below; and those blocks run once for each text and example that is kept."""
    model = make_model(family)
    lowest, runs = model.n_layers - 2, []
    layers = [lowest, lowest + 1]
    plain = block_inputs_module.block_inputs

    def counted(*arguments: Any) -> Any:
        runs.append(arguments[1])
        return plain(*arguments)

    monkeypatch.setattr(block_inputs_module, "block_inputs", counted)
    config = dataclasses.replace(QUICK, steps=8)
    kept = train_mend(model, FACTS, TEXTS[:2], layers, config, tmp_path / "kept.safetensors")
    few, groups = len(runs), {str(rows) for rows in runs}
    assert few == len(groups), "each once"
    monkeypatch.setattr(training_module, "RecentBlockInputs", lambda model, layer: RecentBlockInputs(model, layer, 0))
    train_mend(model, FACTS, TEXTS[:2], layers, config, tmp_path / "dropped.safetensors")
    assert len(runs) > 3 * few, "the control: without what is kept they run again"
    assert (tmp_path / "kept.safetensors").read_bytes() == (tmp_path / "dropped.safetensors").read_bytes()
    monkeypatch.setattr(RecentBlockInputs, "of", lambda self, groups: None)
    whole = train_mend(model, FACTS, TEXTS[:2], layers, config, tmp_path / "whole.safetensors")
    for row, expected in zip(kept.record["curve"], whole.record["curve"], strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    losses = [row["loss"] for row in whole.record["curve"]]
    assert max(losses) - min(losses) > 1e-3, "the control: the training changes it"


def test_streams_that_were_asked_for_last_stay(lively: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one_row = 5 * lively.d_model * 4
    recent = RecentBlockInputs(lively, 1, most=2 * one_row)
    runs = []
    plain = block_inputs_module.block_inputs
    monkeypatch.setattr(block_inputs_module, "block_inputs", lambda *arguments: runs.append(1) or plain(*arguments))
    rows = [[index] * 5 for index in (1, 2, 3)]
    for row, expected in (((0, 1)), ((1, 2)), ((0, 2)), ((2, 3)), ((0, 3)), ((1, 4))):
        (stream,) = recent.of([[rows[row]]]) or []
        assert len(runs) == expected, row
        torch.testing.assert_close(stream, (plain(lively, [rows[row]], 1, 1) or [])[0])
    assert recent.of([[rows[0]], [rows[2], rows[1]]]) is not None
    assert RecentBlockInputs(lively, 0).of([[rows[0]]]) is None


def test_an_edit_is_undone_saved_and_goes_into_lora(lively: Any, tmp_path: Path) -> None:
    path = tmp_path / "mend.safetensors"
    train_mend(lively, FACTS, TEXTS, [0, 1], QUICK, path)
    edit = mend(lively, REQUESTS, [0, 1], config=MendConfig(editor=str(path)))
    assert set(edit.manifest["unconverged"]) <= {"a", "b", "c"}
    assert edit.manifest["editor"]["hash"] == edit.manifest["settings"]["editor_hash"]
    assert "editor" not in edit.manifest["settings"], "its path says nothing to others"
    before, unedited = weights(lively), logits(lively)
    apply_(lively, edit)
    assert not torch.equal(logits(lively), unedited)
    undo_(lively, edit)
    assert identical(lively, before)
    edit.save(tmp_path / "edit.safetensors")
    singles = [mend(lively, [request], [0, 1], config=MendConfig(editor=str(path))) for request in REQUESTS]
    total = sum((single.delta(0) for single in singles), torch.zeros(()))
    assert torch.allclose(total, edit.delta(0), atol=1e-5 * float(total.abs().max()))
    export_lora(lively, edit, tmp_path / "lora")
    with edited(lively, edit):
        assert not torch.equal(logits(lively), unedited)


def test_a_file_of_another_model_or_other_layers_is_refused(lively: Any, lens_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "mend.safetensors"
    editor = identity_editor(lively, (1,))
    editor.save(path)
    config = MendConfig(editor=str(path))
    with pytest.raises(InputError, match=r"the editor .* was made with weights_hash .*mechedit train-mend"):
        mend(lens_model, REQUESTS, [1], config=config)
    with pytest.raises(InputError, match=r"trained for the layers \[1\], expected \[0, 1\]"):
        mend(lively, REQUESTS, [0, 1], config=config)
    with pytest.raises(InputError, match=r"there is no editor of MEND for .*mechedit train-mend"):
        mend(lively, REQUESTS, [1], config=MendConfig())
    with pytest.raises(InputError, match="cannot read the file"):
        MendConfig(editor=str(tmp_path / "absent.safetensors"))
    dataclasses.replace(editor, record={**editor.record, "rank": 5}).save(path)
    with pytest.raises(InputError, match="is no editor of its record"):
        MendEditor.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"layers": []}, {"layers": [2, 1]}, {"layers": "1"}, {"layers": None}, {"curve": [{"step": 1}]}, {"rank": -1},
        {"weights_hash_as": ["ab"]},
    ],
    ids=str,
)  # fmt: skip
def test_an_editor_whose_record_is_damaged_is_refused_by_all_that_read_it(
    lively: Any, tmp_path: Path, damage: dict[str, Any]
) -> None:
    path, editor = tmp_path / "mend.safetensors", identity_editor(lively, (1,))
    editor.save(path)
    assert MendConfig(editor=str(path)).suited(lively)[1] == (1,)  # the control
    dataclasses.replace(editor, record={**editor.record, **damage}).save(path)
    for read in (
        lambda: MendConfig(editor=str(path)),
        lambda: MendEditor.load(path),
        lambda: train_mend(lively, FACTS, TEXTS, [1], QUICK, path),
    ):
        with pytest.raises(InputError, match=r"mend\.safetensors"):
            read()


def test_the_editor_beside_a_checkpoint_is_taken_by_itself(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("gpt2", seed=3)
    monkeypatch.setattr(type(model), "checkpoint", str(tmp_path), raising=False)
    assert recommended("mend", model) == MendConfig()
    identity_editor(model, (0, 1)).save(tmp_path / "mend.safetensors")
    recommendation = mend.recommendation(model)
    assert recommendation.layers == (0, 1)
    assert recommendation.config.editor == str(tmp_path / "mend.safetensors")
    assert mend(model, REQUESTS, [0, 1]).layers == [0, 1]
    other = make_model("gpt2", seed=4)
    with pytest.warns(UserWarning, match="was trained for another model, and is left out"):
        assert mend.recommendation(other).layers is None


@pytest.mark.parametrize(
    ("requests", "texts", "message"),
    [
        (FACTS[:1], TEXTS, "there are 1 subjects among the 1 requests, expected two at least"),
        (FACTS, ["", " "], "a thousand texts that were drawn are empty"),
    ],
)
def test_too_little_to_train_with_is_refused(
    lively: Any, tmp_path: Path, requests: list[EditRequest], texts: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train_mend(lively, requests, texts, [0], QUICK, tmp_path / "mend.safetensors")
    assert not list(tmp_path.iterdir())
