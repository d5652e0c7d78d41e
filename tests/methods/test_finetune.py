"""Fine-tuning learns what the loss says, keeps its bounds, and leaves the model as it was."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.edits import identical, weights
from helpers.models import random_hf
from tokenizers import processors
from torch import Tensor

import mechedit.methods.training as training
from mechedit.cli.describe import describe_edit, format_description
from mechedit.data import EditRequest
from mechedit.edit import Edit, apply_, edited, undo_
from mechedit.errors import InputError
from mechedit.evaluation import score_targets
from mechedit.methods import (
    METHODS,
    FineTuneBallConfig,
    FineTuneConfig,
    FineTuneDecayConfig,
    ft,
    ft_l,
    ft_w,
    recommended,
)
from mechedit.methods.block_inputs import block_inputs
from mechedit.models import load_model
from mechedit.session import EditSession, StopRule
from mechedit.sweep import sweep_windows

REQUESTS = [
    EditRequest(id="a", subject="Danielle Darrieux", prompt="The mother tongue of {}", target_new="Korean"),
    EditRequest(id="b", subject="Leon Blum", prompt="{} is", target_new="in Paris"),
    EditRequest(id="c", subject="Toko Yasuda", prompt="We heard that {}", target_new="plays the guitar"),
]
QUICK = FineTuneConfig(steps=40, lr=5e-3)


@pytest.fixture(scope="module")
def lively(make_model: Any) -> Any:
    return make_model("gpt2", initializer_range=0.05)


def double(tokenizer: Any, family: str = "gpt2") -> Any:
    """In float64, so that a plain loop in torch agrees to many digits."""
    model = load_model(random_hf(family), tokenizer=tokenizer)
    model.hf.double()
    return model


def hf_loss(model: Any, request: EditRequest) -> Tensor:
    """What transformers makes of `labels`: −100 on the prompt, the object's ids after it."""
    prompt = model.tokenizer(request.text)["input_ids"]
    object_ids = model.tokenizer(f" {request.target_new}", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + object_ids])
    labels = torch.tensor([[-100] * len(prompt) + object_ids])
    return model.hf(input_ids=ids, labels=labels).loss


def losses(model: Any, requests: list[EditRequest], entries: Any = None, first: int = 0) -> Tensor:
    rows = training.training_rows(model, requests, ["{}"])
    return training._loss(model, rows, entries, range(len(rows)), first)[0]


def three_tokens(tokenizer: Any) -> str:
    text = "is French and"
    assert len(tokenizer(" " + text, add_special_tokens=False)["input_ids"]) == 3
    return text


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "pythia", "gemma2"])
def test_the_loss_is_that_of_labels_in_transformers(make_model: Any, backend: str, family: str) -> None:
    model = make_model(family, backend)
    requests = [*REQUESTS, dataclasses.replace(REQUESTS[0], id="d", target_new=three_tokens(model.tokenizer))]
    with torch.no_grad():
        expected = torch.stack([hf_loss(model, request) for request in requests])
        actual = losses(model, requests)
        # The same from the stream at a later block, where rows are cut to their own lengths and padded again.
        rows = training.training_rows(model, requests, ["{}"])
        resumed = losses(model, requests, block_inputs(model, [row.ids[:-1] for row in rows], 2, batch_size=3), 2)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(resumed, expected, rtol=1e-5, atol=1e-5)
    assert expected.diff().abs().min() > 1e-2, "they differ, so that rows cannot be confused"


def test_a_token_at_the_start_and_objects_that_pad_do_not_shift_the_loss(tokenizer: Any) -> None:
    begun = copy.deepcopy(tokenizer)
    begun.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    model = load_model(random_hf("llama"), tokenizer=begun)
    assert model.tokenizer("a")["input_ids"][0] == 0
    # The filler of shorter rows is a token of the longest object: told by its id, that token would not count.
    begun.pad_token = begun.convert_ids_to_tokens(begun(" plays", add_special_tokens=False)["input_ids"])[0]
    with torch.no_grad():
        expected = torch.stack([hf_loss(model, request) for request in REQUESTS])
        torch.testing.assert_close(losses(model, REQUESTS), expected, rtol=1e-5, atol=1e-5)
    first = training.training_rows(model, REQUESTS, ["{}"])[2]
    assert begun.pad_token_id in first.ids[first.start :]


def slowly(
    model: Any, layers: list[int], *, steps: int, lr: float, decay: float = 0.0, bound: float | None = None
) -> dict[int, Tensor]:
    """ΔW of the whole set of requests as one batch, by torch's own Adam on the parameters themselves."""
    mlps = [getattr(block.mlp, "c_proj", None) or block.mlp.down_proj for block in blocks(model)]
    chosen = {layer: mlps[layer].weight for layer in layers}
    before = {layer: weight.detach().clone() for layer, weight in chosen.items()}
    for weight in chosen.values():
        weight.requires_grad_(True)
    optimizer = torch.optim.Adam(list(chosen.values()), lr=lr, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack([hf_loss(model, request) for request in REQUESTS]).mean().backward()
        optimizer.step()
        for layer, weight in chosen.items():
            if bound is not None:
                weight.data = torch.clamp(weight.data, before[layer] - bound, before[layer] + bound)
    deltas = {layer: (chosen[layer] - before[layer]).detach() for layer in layers}
    for layer, weight in chosen.items():
        weight.requires_grad_(False).copy_(before[layer])
        weight.grad = None
    return {layer: delta if delta.shape == (96, 32) else delta.T for layer, delta in deltas.items()}


def blocks(model: Any) -> Any:
    return model.hf.transformer.h if hasattr(model.hf, "transformer") else model.hf.model.layers


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("method", "config", "options"),
    [
        (ft, FineTuneConfig(steps=5, lr=1e-3), {}),
        (ft_l, FineTuneBallConfig(steps=5, lr=1e-3, norm_bound=2e-3), {"bound": 2e-3}),
        (ft_w, FineTuneDecayConfig(steps=5, lr=1e-3, weight_decay=0.5), {"decay": 0.5}),
    ],
)
def test_it_is_adam_of_torch_on_the_same_loss(
    tokenizer: Any, family: str, method: Any, config: Any, options: dict[str, float]
) -> None:
    model = double(tokenizer, family)
    edit = method(model, REQUESTS, [0, 2], config=config)
    expected = slowly(model, [0, 2], steps=5, lr=1e-3, **options)
    for layer in (0, 2):
        torch.testing.assert_close(edit.delta(layer), expected[layer], rtol=1e-5, atol=1e-7)
    if options:
        free = slowly(model, [0, 2], steps=5, lr=1e-3)
        assert (free[0] - expected[0]).norm() > 0.1 * free[0].norm(), "the constraint has an effect"


def test_the_backends_agree_also_where_they_run_their_own_modules(
    make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = []
    for backend in ("transformer_lens", "nnsight"):
        for unhooked in (True, False):
            model = make_model("gemma2", backend)
            if not unhooked:
                # Only the backend's own engine is left, and no module of it is bypassed.
                hooked = model._engines[-1]
                monkeypatch.setattr(hooked, "unhooked", None)
                monkeypatch.setattr(model, "_engines", (hooked,))
            deltas.append(ft(model, REQUESTS, [1], config=dataclasses.replace(QUICK, steps=3)).delta(1))
    assert deltas[0].norm() > 1e-2
    for delta in deltas[1:]:
        assert (delta - deltas[0]).norm() < 1e-3 * deltas[0].norm()


@pytest.mark.parametrize("family", ["gpt2", "gpt2_square", "pythia", "gemma3"])
def test_the_edited_model_says_the_new_objects(make_model: Any, family: str, tmp_path: Path) -> None:
    model = make_model(family)
    pairs = [(request.text, request.target_new) for request in REQUESTS]
    before = weights(model)
    assert not any(score.greedy for score in score_targets(model, pairs).values())
    edit = ft(model, REQUESTS, [1, 2], config=dataclasses.replace(QUICK, steps=100))
    assert identical(model, before)
    assert edit.manifest["unconverged"] == []
    with edited(model, edit):
        actual = score_targets(model, pairs)
        assert all(score.greedy for score in actual.values())
        reached = -sum(score.log_prob / score.tokens for score in actual.values()) / 3
    assert edit.manifest["training"]["final_loss"] == pytest.approx(reached, rel=1e-3, abs=1e-6)
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    apply_(model, loaded)
    assert not identical(model, before)
    undo_(model, loaded)
    assert identical(model, before)


def test_the_factors_are_the_thinner_ones_and_give_the_update_to_the_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    for shape, rank in (((96, 32), 32), ((32, 96), 32)):
        delta = torch.randn(shape, generator=draw)
        factors = training.dense_factors(delta)
        assert factors.rank == rank
        assert torch.equal(factors.left @ factors.right, delta)
        assert torch.equal(Edit(factors={0: factors}, manifest={}).delta(0), delta.double())


def test_ft_l_stays_in_the_ball_and_reaches_its_side(lively: Any) -> None:
    config = FineTuneBallConfig(steps=20, lr=5e-3, norm_bound=2e-2)
    delta = ft_l(lively, REQUESTS, [1], config=config).delta(1)
    assert delta.abs().max() == torch.tensor(2e-2, dtype=torch.float32).double()
    assert (delta.abs() == delta.abs().max()).double().mean() > 0.1
    free = ft(lively, REQUESTS, [1], config=FineTuneConfig(steps=20, lr=5e-3)).delta(1)
    assert free.abs().max() > 3e-2


def test_ft_w_decays_the_weights_and_its_default_is_not_none(lively: Any) -> None:
    weight = lively.projection(1).double()
    assert recommended("ft_w", lively) == FineTuneDecayConfig(weight_decay=5e-4)
    free, light, heavy = (
        edit(lively, REQUESTS, [1], config=config).delta(1)
        for edit, config in (
            (ft, FineTuneConfig()),
            (ft_w, FineTuneDecayConfig()),
            (ft_w, FineTuneDecayConfig(weight_decay=1.0)),
        )
    )
    assert (free - light).norm() > 1e-3 * free.norm(), "even the published decay has an effect"
    assert (weight + heavy).norm() < (weight + light).norm()
    assert (weight + heavy).norm() < weight.norm() < (weight + free).norm()


def test_training_stops_early_and_says_how_it_went(lively: Any) -> None:
    edit = ft(lively, REQUESTS, [1], config=dataclasses.replace(QUICK, steps=100, stop_loss=0.5))
    record = edit.manifest["training"]
    assert record["stopped_early"]
    assert record["losses"][-1] < 0.5 <= min(record["losses"][:-1])
    # One batch per pass, of which the last, already below, is left alone.
    assert record["updates"] == len(record["losses"]) - 1 < 99
    assert record["losses"][0] == pytest.approx(float(losses(lively, REQUESTS).mean()), rel=1e-5)
    all_passes = ft(lively, REQUESTS, [1], config=dataclasses.replace(QUICK, steps=3, batch_size=2, lr=1e-6))
    record = all_passes.manifest["training"]
    assert (len(record["losses"]), record["updates"], record["stopped_early"]) == (3, 6, False)
    assert all_passes.manifest["unconverged"] == ["a", "b", "c"]


def test_seeds_shuffle_and_reproduce(lively: Any) -> None:
    config = FineTuneConfig(steps=3, lr=1e-3, batch_size=1)
    first, again, second = (
        ft(lively, REQUESTS, [1], config=dataclasses.replace(config, seed=seed)).delta(1) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert (first - second).norm() > 1e-3 * first.norm()


def test_prefixes_are_learned_in_when_they_are_given(lively: Any) -> None:
    prefix = "Because he said so many things. {}"
    edit = ft(lively, REQUESTS, [1], prefixes=["{}", prefix], config=dataclasses.replace(QUICK, steps=60))
    pairs = [(prefix.replace("{}", request.text), request.target_new) for request in REQUESTS]
    assert edit.manifest["prefixes"] == ["{}", prefix]
    assert ft(lively, REQUESTS, [1], config=dataclasses.replace(QUICK, steps=1)).manifest["prefixes"] == ["{}"]
    with edited(lively, edit):
        assert all(score.greedy for score in score_targets(lively, pairs).values())


def test_half_precision_keeps_what_rounding_would_lose(tokenizer: Any) -> None:
    """A step that changes next to no weight when it is rounded is all there in ΔW."""
    model = load_model(random_hf("gpt2").bfloat16(), tokenizer=tokenizer)
    before = weights(model)
    edit = ft(model, REQUESTS, [1], config=FineTuneConfig(steps=1, lr=1e-6))
    assert edit.factors[1].left.dtype == torch.float32
    assert 0 < edit.delta(1).abs().max() < 2e-6
    after = (model.projection(1).float() + edit.factors[1].left).bfloat16()
    assert (after != model.projection(1)).double().mean() < 0.05
    learned = ft(model, REQUESTS, [1], config=dataclasses.replace(QUICK, steps=100))
    assert learned.manifest["unconverged"] == []
    assert identical(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_model_is_left_as_it_was_when_training_breaks_off(
    lively: Any, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before, flags, seen = weights(lively), requires(lively), []
    plain = training.projection_gradients

    def broken(*args: Any) -> dict[int, Tensor]:
        seen.append((identical(lively, before), requires(lively)))
        if len(seen) == 3:
            raise error
        return plain(*args)

    monkeypatch.setattr(training, "projection_gradients", broken)
    with pytest.raises(error):
        ft(lively, REQUESTS, [1], config=QUICK)
    assert [same for same, _ in seen] == [True, False, False]
    (names,) = {tuple(name for name, wants in flagged.items() if wants) for _, flagged in seen}
    assert names == ("transformer.h.1.mlp.c_proj.weight",)
    assert identical(lively, before)
    assert requires(lively) == flags
    assert all(parameter.grad is None for parameter in lively.hf.parameters())


def requires(model: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.hf.named_parameters()}


def test_bad_input_is_refused(lively: Any) -> None:
    for kind, changes in (
        (FineTuneConfig, {"steps": 0}),
        (FineTuneConfig, {"lr": 0.0}),
        (FineTuneConfig, {"batch_size": 0}),
        (FineTuneConfig, {"stop_loss": -1.0}),
        (FineTuneBallConfig, {"norm_bound": 0.0}),
        (FineTuneDecayConfig, {"weight_decay": 0.0}),
        (FineTuneDecayConfig, {"weight_decay": float("nan")}),
    ):
        (name,) = changes
        with pytest.raises(InputError, match=f"{name} is"):
            kind(**changes)
    with pytest.raises(InputError, match="ft_w was given keys of earlier edits"):
        ft_w(lively, REQUESTS, [1], previous={1: torch.zeros(96, 1)})
    with pytest.raises(InputError, match="ascending and each once"):
        ft(lively, REQUESTS, [3])
    with pytest.raises(InputError, match=r"takes \d+ tokens"):
        ft(lively, [dataclasses.replace(REQUESTS[0], prompt="{} " + "so " * 80)], [1])
    with pytest.raises(InputError, match="conflict"):
        ft(lively, [REQUESTS[0], dataclasses.replace(REQUESTS[0], id="x", target_new="French")], [1])
    before = weights(lively)
    with pytest.raises(InputError, match="the loss of the training is nan in pass"):
        ft(lively, REQUESTS, [1], config=FineTuneConfig(lr=1e30))
    assert identical(lively, before)


@pytest.mark.parametrize("method", ["ft", "ft_l", "ft_w"])
def test_every_kind_is_called_and_recorded_like_other_methods(lively: Any, method: str) -> None:
    config = dataclasses.replace(recommended(method, lively), steps=2)
    # A registry's caller passes moments; they are not looked at.
    edit = METHODS[method](lively, REQUESTS, [1], {}, config=config, targets=None, previous={})
    manifest = json.loads(json.dumps(edit.manifest))
    assert manifest["method"] == method
    assert manifest["settings"] == dataclasses.asdict(config)
    assert manifest["requests"] == ["a", "b", "c"]
    assert manifest["facts"][1] == "Leon Blum is → in Paris"
    assert set(manifest["model"].pop("weights_hash_as")) == {"bfloat16", "float16"}
    assert manifest["model"] == lively.provenance()
    shown = format_description(Path("edit.safetensors"), describe_edit(edit, lively))
    assert f"method    {method} (mechedit" in shown
    assert "settings  steps = 2\n" in shown
    assert "training  loss " in shown
    assert "3 new objects are not yet the answer" in shown


def test_sweeps_and_sessions_need_no_moments(lively: Any, tmp_path: Path) -> None:
    requests = [dataclasses.replace(request, target_true="the") for request in REQUESTS]
    sweep = sweep_windows(lively, requests, {}, [(0, 0), (1, 2)], method="ft", config=QUICK, parts=tmp_path)
    assert not sweep.failed
    assert set(sweep.cases.loc[sweep.cases["measure"] == "converged", "value"]) == {100.0}
    before = weights(lively)
    rule = StopRule(perplexity=None)
    with EditSession(lively, [1], {}, "ft", QUICK, rule=rule, folder=tmp_path / "session") as session:
        for request in requests[:2]:
            session.write([request])
        # The second edit was made on the model that the first had left.
        assert session.batches[1].edit.manifest["model"]["weights_hash"] == session.batches[0].weights_hash
    assert session.edit.manifest["prefixes"] == ["{}"]
    assert identical(lively, before)
