"""What the papers' text asks for: the token that is written at, Eq. 16 and 19 alone, ROME's prefixes, BLUE's layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers.spreading import PREFIXES, REQUESTS
from torch import Tensor

from mechedit.batching import pad
from mechedit.cli import method_config
from mechedit.data import EditRequest
from mechedit.edit import edited
from mechedit.errors import InputError
from mechedit.evaluation.likelihood import score_targets
from mechedit.methods import KeyExtractor, MemitConfig, RomeConfig, SpreadConfig, edit_keys, memit, prefix_mean, rome
from mechedit.methods.spread import share_divisor
from mechedit.models import Site
from mechedit.prefixes import BARE, prefixed_prompts
from mechedit.prompt_tokens import TOKENS
from mechedit.targets import TargetConfig, find_targets

MOMENTS = {layer: 0.01 * torch.eye(96) for layer in range(3)}
LONG = EditRequest(id="b", subject="Leon Blum", prompt="We heard that {} is", target_new="in Paris")
FEW: dict[str, Any] = {"steps": 3, "lr": 0.5, "clamp": 2.0}


@pytest.fixture(scope="module")
def lively(make_model: Any) -> Any:
    """A model with larger weights, in which one state has much to say."""
    return make_model("gpt2", initializer_range=0.05)


def at(model: Any, request: EditRequest, site: Site, position: int, template: str = BARE) -> Tensor:
    """An activation at one position, from a full pass over the whole prompt."""
    (prompt,) = prefixed_prompts(model, request, [template])
    with torch.no_grad():
        return model.run(pad([prompt.ids], model.tokenizer), read=[site])[site][0, position]


def positions(model: Any, request: EditRequest, template: str = BARE) -> dict[str, int]:
    """Where the tokens are, from the text alone: the number of tokens of what comes before them."""
    before, after = template.replace("{}", request.prompt).split("{}")

    def count(text: str) -> int:
        return len(model.tokenizer(text)["input_ids"])

    first, end = count(before.rstrip()), count(before + request.subject)
    last = count(before + request.subject + after) - 1
    return {"subject_first": first, "subject_last": end - 1, "after": end, "last": last, "-2": last - 1}


@pytest.mark.parametrize("token", [*TOKENS, "-2"])
def test_z_and_keys_are_at_the_token_that_is_asked_for(lively: Any, token: str) -> None:
    config = TargetConfig(token=token, joint=False, steps=5, lr=0.05, clamp=2.0, kl_weight=0.0, weight_decay=0.0)
    targets = find_targets(lively, [LONG], 1, PREFIXES, config)
    where = positions(lively, LONG)
    for name, position in where.items():
        same = torch.allclose(targets.initial[0], at(lively, LONG, Site(1, "resid"), position), atol=1e-5)
        assert same == (position == where[token]), name
    keys = KeyExtractor(lively, [LONG], PREFIXES, token=token).keys(1)[0]
    for key, prefix in zip(keys, PREFIXES, strict=True):
        position = positions(lively, LONG, prefix)[token]
        assert torch.allclose(key, at(lively, LONG, Site(1, "mlp_key"), position, prefix), atol=1e-5)
    assert targets.losses.nll.iloc[-1] < targets.losses.nll.iloc[0]


@pytest.mark.parametrize("method", [memit, rome])
@pytest.mark.parametrize("token", ["subject_first", "last"])
def test_methods_write_at_the_token(lively: Any, method: Any, token: str) -> None:
    extra = {"covariance_weight": 1e-7} if method is memit else {}
    config = method.config(token=token, **FEW, **extra)
    edit = method(lively, [LONG], [1], MOMENTS, prefixes=["{}"], config=config)
    targets = find_targets(lively, [LONG], 1, ["{}"], config.targets)
    site, where = Site(1, targets.part), positions(lively, LONG)
    with edited(lively, edit):
        moved = {name: at(lively, LONG, site, position) for name, position in where.items()}
    assert torch.allclose(moved[token], targets.z[0], atol=1e-3)
    rest = [name for name in moved if where[name] != where[token]]
    assert all(not torch.allclose(moved[name], targets.z[0], atol=0.1) for name in rest), "the control: there alone"
    assert edit.manifest["settings"]["token"] == token
    if method is memit:
        earlier = edit_keys(lively, [LONG], edit)[1]
        assert torch.allclose(earlier[:, 0].float(), at(lively, LONG, Site(1, "mlp_key"), where[token]), atol=1e-5)


def test_a_token_that_a_prompt_lacks_is_refused(lively: Any) -> None:
    ending = dataclasses.replace(LONG, prompt="They met {}")
    with pytest.raises(InputError, match=r"whose subject ends at the .* has no token 'after', expected one"):
        find_targets(lively, [ending], 1, ["{}"], TargetConfig(token="after"))
    with pytest.raises(InputError, match="has no token '-40'"):
        find_targets(lively, [ending], 1, ["{}"], TargetConfig(token="-40"))
    for token in ("subject_middle", "3", "", "--1"):
        with pytest.raises(InputError, match="expected one of subject_last, subject_first, after, last, or a negative"):
            MemitConfig(token=token)
    assert method_config("rome", lively, 0, ["token=-3"]).token == "-3"


def test_facts_about_one_subject_share_their_target_only_where_they_share_a_key() -> None:
    assert TargetConfig(token="subject_first").joins_subjects
    assert not TargetConfig(token="last").joins_subjects
    assert not TargetConfig(convention="paper").joins_subjects


def test_a_fact_without_a_subject_is_written_at_its_last_token(lively: Any) -> None:
    sentence = EditRequest(id="s", subject="The capital of the north is", prompt="{}", target_new="Paris")
    config = MemitConfig(token="last", covariance_weight=1e-7, steps=20, lr=0.5, clamp=4.0, kl_prompt="{}")
    edit = memit(lively, [sentence], [1], MOMENTS, prefixes=["{}"], config=config)
    assert edit.manifest["left"][0] < 0.05
    pair = (sentence.text, "Paris")
    before = score_targets(lively, [pair])[pair].log_prob
    with edited(lively, edit):
        assert score_targets(lively, [pair])[pair].log_prob > before + 1


def test_the_papers_convention_is_eq_16_alone(lively: Any) -> None:
    many = dataclasses.replace(LONG, target_new="in Paris and Seattle")
    by_text = find_targets(lively, [many], 1, PREFIXES, TargetConfig(convention="paper", steps=3))
    default = find_targets(lively, [many], 1, PREFIXES, TargetConfig(lr=0.5, steps=3))
    first, usual = by_text.losses.iloc[0], default.losses.iloc[0]
    tokens = round(first.nll / usual.nll)
    assert tokens > 2
    assert first.nll == pytest.approx(tokens * usual.nll, rel=1e-5), "a sum over the object's tokens, not their mean"
    assert (by_text.losses[["kl", "decay"]] == 0).all(axis=None)
    assert (default.losses[["kl", "decay"]].iloc[-1] > 0).all(), "the control: terms that the paper does not have"
    assert by_text.losses.loss.equals(by_text.losses.nll)
    config = MemitConfig(convention="paper")
    assert (config.lr, config.covariance_weight, config.steps, config.targets.updates) == (0.5, 15_000, 25, 25)
    with pytest.raises(InputError, match=r"kl_weight is 0\.5, expected 0\.0 with the convention 'paper'"):
        MemitConfig(convention="paper", kl_weight=0.5)
    assert dataclasses.replace(config, steps=3).kl_weight == 0


def test_the_papers_keys_are_of_prefix_and_subject_alone(lively: Any) -> None:
    alone = dataclasses.replace(LONG, prompt="{}")
    actual = KeyExtractor(lively, [LONG], PREFIXES, subject_alone=True)
    expected, whole = (KeyExtractor(lively, [request], PREFIXES) for request in (alone, LONG))
    assert torch.allclose(actual.keys(1), expected.keys(1), atol=1e-6)
    assert (actual.keys(1) - whole.keys(1)).norm() > 0.01 * whole.keys(1).norm(), "the control: words before count"
    site = Site(1, "resid")
    assert torch.allclose(actual.states([site])[site], whole.states([site])[site], atol=1e-6), "residuals are as ever"
    config = MemitConfig(convention="paper", **FEW, covariance_weight=1.0)
    edit = memit(lively, [LONG], [1], MOMENTS, prefixes=PREFIXES, config=config)
    fitted = prefix_mean(KeyExtractor(lively, [alone], PREFIXES).keys(1))
    assert torch.allclose(edit_keys(lively, [LONG], edit)[1], fitted, atol=1e-6)
    # Of rank one, ΔW reads along M⁻¹ k, and M is a multiple of I.
    left = edit.factors[1].left[:, 0].double()
    assert abs(torch.cosine_similarity(left, fitted[:, 0], dim=0)) > 1 - 1e-5


@pytest.mark.parametrize("prefixes", [["The first thing. {}"], ["The first thing. {}", "{}"]])
def test_h_is_the_bare_prompts_whatever_comes_first(lively: Any, prefixes: list[str]) -> None:
    targets = find_targets(lively, REQUESTS, 1, prefixes, TargetConfig(steps=1))
    for index, request in enumerate(REQUESTS):
        position = positions(lively, request)["subject_last"]
        bare = at(lively, request, Site(1, "resid"), position)
        assert torch.allclose(targets.initial[index], bare, atol=1e-5)
        behind = at(
            lively, request, Site(1, "resid"), positions(lively, request, prefixes[0])["subject_last"], prefixes[0]
        )
        assert not torch.allclose(behind, bare, atol=1e-2), "the control: a prefix moves h"


def test_without_a_change_nothing_is_left_to_write(lively: Any) -> None:
    """With δ = 0 the residual is 0, since z and the state that it is held against are of one prompt."""
    config = MemitConfig(steps=1, lr=1e-12, covariance_weight=1e-7)
    edit = memit(lively, REQUESTS, [1], MOMENTS, prefixes=["The first thing. {}"], config=config)
    assert edit.delta(1).norm() < 1e-4 * lively.projection(1).norm()


def test_romes_prefixes_are_ten_of_five_and_ten_of_ten_tokens(lively: Any) -> None:
    prefixes = RomeConfig().default_prefixes(lively)
    assert prefixes == RomeConfig().default_prefixes(lively) != RomeConfig(seed=1).default_prefixes(lively)
    assert (prefixes[0], len(prefixes)) == (BARE, 21)
    texts = [prefix.removesuffix(f". {BARE}") for prefix in prefixes[1:]]
    lengths = [len(text) for text in texts]
    assert sum(lengths[0::2]) < sum(lengths[1::2]), "the two lengths take turns"
    assert len(RomeConfig(generated_prefixes=4).default_prefixes(lively)) == 5
    assert len(MemitConfig().default_prefixes(lively)) == 6


def test_boundary_writes_into_the_first_and_the_last_layer(make_model: Any) -> None:
    config = SpreadConfig(strategy="boundary")
    assert config.edited_layers([1, 2, 3, 4]) == [1, 4]
    assert config.edited_layers([2]) == [2]
    assert config.target_layer([1, 2, 3]) == 3
    assert [share_divisor([1, 4], index, config) for index in (0, 1)] == [2, 1], "half, then all that is left"
    uniform = SpreadConfig()
    assert [share_divisor([1, 4], index, uniform) for index in (0, 1)] == [4, 1], "the control: Eq. 20's distance"
    deep = make_model("gpt2", n_layer=4)  # a state after the last block is read by no other token
    edits = {
        strategy: memit(
            deep, REQUESTS, [0, 1, 2], MOMENTS, prefixes=["{}"],
            config=MemitConfig(strategy=strategy, covariance_weight=1e-7, **FEW),
        )
        for strategy in ("boundary", "uniform")
    }  # fmt: skip
    assert (edits["boundary"].layers, edits["uniform"].layers) == ([0, 2], [0, 1, 2])
    for edit in edits.values():
        assert max(edit.manifest["left"]) < 1e-2
