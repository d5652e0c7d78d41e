"""The search for z lowers the loss it names, for each fact independently, and reports its course."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.patches import column
from torch import Tensor

from mechedit.batching import pad
from mechedit.data import EditRequest
from mechedit.errors import InputError, check_choice
from mechedit.models import Patch, Site
from mechedit.prefixes import make_prefixes
from mechedit.prompt_tokens import continuation_ids, tokenize_prompt
from mechedit.targets import TargetConfig, Targets, find_targets

PREFIXES = ["{}", "The first thing. {}", "Because he said so many things. {}"]
# Prompts that end near the subject: in a random model its state matters little further away.
REQUESTS = [
    EditRequest(id="a", subject="Danielle Darrieux", prompt="The mother tongue of {}", target_new="Korean"),
    EditRequest(id="b", subject="Leon Blum", prompt="{} is", target_new="in Paris"),
    EditRequest(id="c", subject="Toko Yasuda", prompt="We heard that {}", target_new="plays"),
    EditRequest(id="d", subject="Leon Blum", prompt="They all met {}", target_new="French"),
]
# Apart, because a random model has no room for two facts about one subject in one state.
BRISK = TargetConfig(lr=0.5, clamp=2.0, joint=False)


@pytest.fixture(scope="module")
def lively(make_model: Any) -> Any:
    """A model with larger weights, in which one state has much to say."""
    return make_model("gpt2", initializer_range=0.05)


def distance(states: Tensor, expected: Tensor) -> float:
    return float((states - expected).norm() / expected.norm())


def probability(model: Any, request: EditRequest, layer: int, z: Tensor | None) -> float:
    """Probability of the whole object after the bare prompt, with z (if any) at the subject's last token."""
    prompt = tokenize_prompt(model.tokenizer, request.prompt, request.subject)
    object_ids = continuation_ids(model.tokenizer, request.target_new)
    tokens = pad([[*prompt.ids, *object_ids]], model.tokenizer)
    patches = []
    if z is not None:
        patches = [Patch(Site(layer, "resid"), column([prompt.last_subject]), z[None, None])]
    with torch.no_grad():
        logits = model.run(tokens, patches).logits[0]
    scored = torch.arange(len(prompt.ids) - 1, len(prompt.ids) - 1 + len(object_ids))
    return float(logits[scored].log_softmax(-1)[range(len(object_ids)), object_ids].sum().exp())


def curve(targets: Targets, name: str, column: str = "nll") -> Any:
    return targets.losses.query("id == @name").set_index("step")[column].sort_index()


@pytest.mark.parametrize("layer", [0, 2])
def test_z_makes_the_new_object_likelier(lively: Any, layer: int) -> None:
    targets = find_targets(lively, REQUESTS, layer, ["{}"], BRISK)
    for z, stated, request in zip(targets.z, targets.summary.probability, REQUESTS, strict=True):
        after = probability(lively, request, layer, z)
        # A prompt that goes on after the subject cannot feel the last block's state there.
        hopeless = layer == 2 and request.id == "b"
        assert after == pytest.approx(stated, rel=1e-4)
        assert hopeless or after > 3 * probability(lively, request, layer, None)


def test_starts_from_the_clean_state(small_model: Any) -> None:
    targets = find_targets(small_model, REQUESTS, 1, PREFIXES[1:], TargetConfig(steps=1))
    caught: list[Tensor] = []
    handle = small_model.hf.transformer.h[1].register_forward_hook(lambda m, a, out: caught.append(out))
    for request, initial in zip(REQUESTS, targets.initial, strict=True):
        # The bare prompt's, though no context template is bare: residuals are measured there.
        prompt = tokenize_prompt(small_model.tokenizer, request.prompt, request.subject)
        with torch.no_grad():
            small_model.hf(torch.tensor([prompt.ids]))
        clean = caught.pop()
        clean = clean[0] if isinstance(clean, tuple) else clean
        assert torch.allclose(initial, clean[0, prompt.last_subject], atol=1e-5)
    handle.remove()
    distances = (targets.z - targets.initial).norm(dim=1)
    ratio = distances / targets.initial.norm(dim=1)
    assert ratio.tolist() == pytest.approx(list(targets.summary.norm_ratio), rel=1e-5)
    assert ratio.min() > 0


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("convention", ["default", "memit-2022"])
def test_a_fact_is_not_affected_by_its_batch(lively: Any, convention: Any, layer: int) -> None:
    config = dataclasses.replace(BRISK, convention=convention, threshold=3.5)
    # The last block's state matters at its own position only; without a gradient Adam would follow rounding.
    requests = [request for request in REQUESTS if layer < 2 or request.prompt.endswith("{}")]
    batched = find_targets(lively, requests, layer, PREFIXES, config)
    split = find_targets(lively, requests, layer, PREFIXES, dataclasses.replace(config, batch_size=2))
    # Some stop early and leave the batch: the others must not notice.
    assert batched.summary.updates.nunique() > 1
    assert distance(split.z, batched.z) < 1e-3
    for fact, request in enumerate(requests):
        alone = find_targets(lively, [request], layer, PREFIXES, config)
        assert distance(alone.z[0], batched.z[fact]) < 1e-3
        assert distance(batched.z[fact - 1], batched.z[fact]) > 0.1
        assert int(alone.summary.updates[0]) == batched.summary.updates[fact]


def test_backends_agree(make_model: Any) -> None:
    lens, nn = (
        find_targets(
            make_model("gpt_neo", backend, initializer_range=0.05),
            REQUESTS,
            1,
            PREFIXES,
            BRISK,
        )
        for backend in ("transformer_lens", "nnsight")
    )
    assert distance(lens.z, nn.z) < 1e-3
    assert distance(lens.z, lens.initial) > 0.1


def test_the_ball_holds_delta(lively: Any) -> None:
    tight = find_targets(lively, REQUESTS, 1, PREFIXES, dataclasses.replace(BRISK, clamp=0.3)).summary
    loose = find_targets(lively, REQUESTS, 1, PREFIXES, dataclasses.replace(BRISK, clamp=50.0)).summary
    assert tight.norm_ratio.max() <= 0.3 + 1e-6
    assert tight.norm_ratio.min() == pytest.approx(0.3)
    assert loose.norm_ratio.max() > 0.3


def test_number_of_updates(lively: Any) -> None:
    for config, updates in ((TargetConfig(steps=4), 4), (TargetConfig(convention="memit-2022", steps=4), 3)):
        targets = find_targets(lively, REQUESTS[:2], 1, PREFIXES, config)
        assert list(targets.summary.updates) == [updates, updates]
        assert list(curve(targets, "a").index) == list(range(updates + 1))
        assert targets.unconverged == ("a", "b")
    still = find_targets(lively, REQUESTS, 1, PREFIXES, TargetConfig(convention="memit-2022", steps=1))
    assert torch.equal(still.z, still.initial)


def test_a_fact_stops_below_the_threshold(lively: Any) -> None:
    free = find_targets(lively, REQUESTS, 1, PREFIXES, BRISK)
    nll = curve(free, "a")
    threshold = float(nll[:10].min()) + 1e-4
    expected = int((nll < threshold).argmax())
    config = dataclasses.replace(BRISK, threshold=threshold)
    targets = find_targets(lively, REQUESTS, 1, PREFIXES, config)
    row = targets.summary.set_index("id").loc["a"]
    assert 0 < expected <= 10
    assert row.updates == expected
    assert row.stopped == "threshold"
    assert row.nll < threshold
    assert set(free.summary.stopped) == {"steps"}


def test_the_published_code_stops_by_the_whole_loss(lively: Any) -> None:
    config = dataclasses.replace(BRISK, convention="memit-2022", kl_weight=1.0)
    free = find_targets(lively, REQUESTS[:1], 1, PREFIXES, config)
    threshold = float(curve(free, "a", "loss").min()) + 1e-4
    by_loss, by_nll = (int((curve(free, "a", term) < threshold).argmax()) for term in ("loss", "nll"))
    stopping = dataclasses.replace(config, threshold=threshold)
    targets = find_targets(lively, REQUESTS[:1], 1, PREFIXES, stopping)
    assert 0 < by_nll < by_loss
    assert targets.summary.updates[0] == by_loss
    assert targets.summary.stopped[0] == "threshold"


def test_terms_of_the_loss_by_convention(lively: Any) -> None:
    config = dataclasses.replace(BRISK, steps=3, kl_weight=1.0, weight_decay=1.0)
    for convention in ("default", "memit-2022"):
        targets = find_targets(lively, REQUESTS[:1], 1, ["{}"], dataclasses.replace(config, convention=convention))
        size, before = (targets.z - targets.initial).norm(), targets.initial.norm()
        row = targets.summary.iloc[0]
        assert row.decay == pytest.approx(
            float((size / before) ** 2 if convention == "default" else size / before**2), rel=1e-4
        )
        kl = {at: drift(lively, REQUESTS[0], 1, targets.z[0] - targets.initial[0], at) for at in ("end", "subject")}
        assert row.kl == pytest.approx(kl["end" if convention == "default" else "subject"], rel=1e-3)
        assert kl["end"] != pytest.approx(kl["subject"], rel=0.1)
        assert row.loss == pytest.approx(row.nll + row.kl + row.decay, rel=1e-5)


def drift(model: Any, request: EditRequest, layer: int, delta: Tensor, at: str) -> float:
    """KL(edited ‖ clean) of the next token on "… is a", by its definition."""
    prompt = tokenize_prompt(model.tokenizer, "{} is a", request.subject)
    tokens, site = pad([prompt.ids], model.tokenizer), Site(layer, "resid")
    with torch.no_grad():
        clean = model.run(tokens, read=[site])
        value = clean[site][:, [prompt.last_subject]] + delta
        edited = model.run(tokens, [Patch(site, column([prompt.last_subject]), value)])
    position = -1 if at == "end" else prompt.last_subject
    new, old = (run.logits[0, position].log_softmax(-1) for run in (edited, clean))
    return float((new.exp() * (new - old)).sum())


def test_leaves_the_model_alone(lively: Any) -> None:
    before = lively.weights_hash()
    find_targets(lively, REQUESTS, 1, PREFIXES, TargetConfig(steps=2))
    assert lively.weights_hash() == before
    assert all(parameter.grad is None for parameter in lively.hf.parameters())


def test_works_where_gradients_are_off(lively: Any) -> None:
    with torch.no_grad():
        targets = find_targets(lively, REQUESTS[:1], 1, PREFIXES, BRISK)
    assert curve(targets, "a").iloc[-1] < curve(targets, "a").iloc[0] - 0.5
    assert not targets.z.requires_grad


def test_a_fact_whose_loss_is_not_finite_is_named(make_model: Any) -> None:
    model = make_model("gpt2", seed=3)
    with torch.no_grad():
        model.hf.transformer.ln_f.bias[0] = torch.nan
    targets = find_targets(model, REQUESTS[:2], 1, PREFIXES)
    assert list(targets.summary.stopped) == ["not finite", "not finite"]
    assert targets.unconverged == ("a", "b")
    assert torch.equal(targets.z, targets.initial)


def test_default_prefixes_depend_on_the_seed_alone(lively: Any) -> None:
    state = torch.get_rng_state()
    prefixes = make_prefixes(lively, seed=1)
    assert prefixes == make_prefixes(lively, seed=1) != make_prefixes(lively, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert prefixes[0] == "{}"
    assert [prefix.split()[0][:1] for prefix in prefixes[1:]] == ["T", "T", "B", "I", "Y"]
    assert all(prefix.count("{}") == 1 and prefix.endswith(". {}") for prefix in prefixes[1:])
    quick = TargetConfig(steps=1, seed=1)
    assert find_targets(lively, REQUESTS[:1], 1, config=quick).prefixes == prefixes


def test_braces_made_up_by_the_model_are_removed(lively: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(lively.tokenizer), "decode", lambda self, ids, skip_special_tokens: "The {x} and {}\nso")
    assert make_prefixes(lively, seed=11)[1] == "The x and so. {}"


def test_prefixes_are_generated_once_and_anew_for_other_weights(
    make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = make_model("gpt2", seed=3), make_model("gpt2", seed=3)
    runs: list[Any] = []
    run = type(model).run
    monkeypatch.setattr(
        type(model), "run", lambda self, *args, **kwargs: runs.append(self) or run(self, *args, **kwargs)
    )
    prefixes = make_prefixes(model)
    assert (generated := len(runs)) > 0
    assert make_prefixes(model) == prefixes
    assert len(runs) == generated, "the same call on the same weights runs the model again"
    assert make_prefixes(model, count=1) == prefixes[:2]
    with torch.no_grad():
        next(model.hf.parameters()).mul_(-1)
        next(twin.hf.parameters()).mul_(-1)
    changed = make_prefixes(model)
    assert changed == make_prefixes(twin) != prefixes, "prefixes of other weights are remembered"


def test_results_carry_their_provenance(lively: Any) -> None:
    targets = find_targets(lively, REQUESTS, 1, PREFIXES, BRISK)
    assert targets.provenance["model"]["weights_hash"] == lively.weights_hash()
    assert targets.provenance["settings"] == dataclasses.asdict(BRISK)
    assert targets.ids == ("a", "b", "c", "d")
    assert list(targets.summary.id) == list(targets.ids)
    assert targets.prefixes == tuple(PREFIXES)


def test_bad_input_is_refused(lively: Any) -> None:
    rival = dataclasses.replace(REQUESTS[0], id="x", target_new="English")
    with pytest.raises(InputError, match="conflict"):
        find_targets(lively, [REQUESTS[0], rival], 1, PREFIXES)
    with pytest.raises(InputError, match="the layer is 3, expected one of 0 … 2"):
        find_targets(lively, REQUESTS, 3, PREFIXES)
    with pytest.raises(InputError, match="prefix: the prompt 'Then' holds 0 times"):
        find_targets(lively, REQUESTS, 1, ["{}", "Then"])
    with pytest.raises(InputError, match="expected a list"):
        find_targets(lively, REQUESTS, 1, "{}")
    with pytest.raises(InputError, match=r"request 'a' takes \d+ tokens .* at most 64"):
        find_targets(lively, REQUESTS, 1, ["{}", "so " * 60 + "{}"])


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="convention is 'memit', expected one of default, memit-2022; choose"):
        check_choice("convention", "memit", ("default", "memit-2022"))
    with pytest.raises(InputError, match="steps is 0"):
        TargetConfig(steps=0)
    with pytest.raises(InputError, match="kl_prompt"):
        TargetConfig(kl_prompt="is a")
