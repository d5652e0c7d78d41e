"""Every method does what its paper says, and all keep the same contract."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mechedit.methods.method
from mechedit.cli import method_config
from mechedit.data import EditRequest
from mechedit.edit import Edit, edited
from mechedit.errors import InputError
from mechedit.methods import (
    METHODS,
    KeyExtractor,
    SearchConfig,
    alphaedit,
    edit_keys,
    emmet,
    pmet,
    prefix_mean,
    recommended,
    rome,
)
from mechedit.methods.post_norm import nearest_output
from mechedit.methods.rules import Equality
from mechedit.models import Site
from mechedit.moments import MomentAccumulator, SecondMoment, collect_moments
from mechedit.solve import null_space
from mechedit.sweep import sweep_windows
from mechedit.targets import Targets, find_targets

PREFIXES = ["{}", "The first thing. {}", "Because he said so many things. {}"]
REQUESTS = [
    EditRequest(id="a", subject="Danielle Darrieux", prompt="The mother tongue of {}", target_new="Korean"),
    EditRequest(id="b", subject="Leon Blum", prompt="{} is", target_new="in Paris"),
    EditRequest(id="c", subject="Toko Yasuda", prompt="We heard that {}", target_new="plays"),
]
TEXTS = [
    "The mother tongue of Leon Blum is French, and that of Go Hyeon-jeong is Korean.",
    "Apple A5 was created by Apple. Windows Media Player was created by Microsoft.",
    "The Space Needle is in downtown Seattle; LeBron James plays the sport of basketball in town.",
    "Toko Yasuda plays the instrument guitar, while Miles Davis plays the trumpet.",
]
BRISK: dict[str, Any] = {"steps": 4, "lr": 0.5, "clamp": 2.0, "kl_weight": 0.0, "weight_decay": 0.0}
# Settings under which new facts count far more than old keys.
EAGER: dict[str, dict[str, Any]] = {
    "memit": {"covariance_weight": 1e-6},
    "rome": {},
    "emmet": {"slack": 0.0},
    "alphaedit": {"ridge": 1e-6, "null_threshold": 0.9},
    "pmet": {"covariance_weight": 1e-6},
}
SEARCHING = list(EAGER)
"""The methods that search for z; fine-tuning has its own tests."""

# The package's attribute `rome` is the function, so the module is taken from where modules are kept.
ROME = sys.modules["mechedit.methods.rome"]


@pytest.fixture(scope="module")
def lively(make_model: Any) -> Any:
    """A model with larger weights, in which one state has much to say."""
    return make_model("gpt2", initializer_range=0.05)


@pytest.fixture(scope="module")
def moments(lively: Any) -> dict[int, SecondMoment]:
    return collect_moments(lively, TEXTS, [0, 1, 2])


def config_of(method: str, model: Any, **changes: Any) -> Any:
    config = recommended(method, model)
    assert isinstance(config, SearchConfig)
    return dataclasses.replace(config, **{**BRISK, **EAGER[method], **changes})


def states(model: Any, layer: int, part: Any, requests: list[EditRequest] = REQUESTS) -> Tensor:
    site = Site(layer, part)
    return KeyExtractor(model, requests, PREFIXES).states([site])[site]


@pytest.mark.parametrize("method", SEARCHING)
def test_one_layer_without_old_keys_reaches_the_targets(lively: Any, moments: Any, method: str) -> None:
    config = config_of(method, lively)
    # ROME's facts move each other's values: the constraint is that of one fact.
    requests = REQUESTS[:1] if method == "rome" else REQUESTS
    targets = find_targets(lively, requests, 1, ["{}"], config.targets)
    before = states(lively, 1, targets.part, requests)
    edit = METHODS[method](lively, requests, [1], moments, ["{}"], config, targets)
    with edited(lively, edit):
        after = states(lively, 1, targets.part, requests)
    # AlphaEdit moves keys only within its null space: what they have there must suffice.
    assert (after - targets.z).norm() < 1e-2 * (before - targets.z).norm()
    assert (before - targets.z).norm(dim=1).min() > 0.1
    assert max(edit.manifest["left"]) < 1e-2


@pytest.mark.parametrize("method", SEARCHING)
def test_all_keep_one_contract(lively: Any, moments: Any, method: str, tmp_path: Path) -> None:
    config, before = config_of(method, lively), lively.weights_hash()
    edit = METHODS[method](lively, REQUESTS, [1], moments, PREFIXES, config=config)
    assert lively.weights_hash() == before
    edit.save(tmp_path / "edit.safetensors")
    manifest = json.loads(json.dumps(Edit.load(tmp_path / "edit.safetensors").manifest))
    assert manifest == json.loads(json.dumps(edit.manifest))
    assert manifest["method"] == method
    assert manifest["layers"] == edit.layers == [1]
    assert manifest["settings"] == dataclasses.asdict(config)
    assert manifest["requests"] == ["a", "b", "c"]
    assert manifest["facts"][1] == "Leon Blum is → in Paris"
    assert manifest["prefixes"] == PREFIXES
    assert len(manifest["left"]) == 3
    (record,) = manifest["residuals"]
    assert record["before"] == 1
    assert 0 < record["after"] < 1
    assert record["error"] < 1e-6 < 1 <= record["condition"]
    again = METHODS[method](lively, REQUESTS, [1], moments, PREFIXES, config=config)
    assert torch.equal(again.delta(1), edit.delta(1))
    assert edit_keys(lively, REQUESTS, edit)[1].shape == (96, 3)


@pytest.mark.parametrize("method", SEARCHING)
def test_earlier_keys_are_preserved(lively: Any, moments: Any, method: str) -> None:
    """With many copies of an earlier key to preserve, the later edit leaves its value alone."""
    config = config_of(method, lively, **({"slack": 0.5} if method == "emmet" else {}))
    earlier, later = REQUESTS[:1], REQUESTS[1:]
    targets = find_targets(lively, later, 1, PREFIXES, config.targets)
    keys = prefix_mean(KeyExtractor(lively, earlier, PREFIXES).keys(1))
    change_at_earlier = {}
    for count in (0, 10_000):
        previous = {1: count**0.5 * keys} if count else None
        edit = METHODS[method](lively, later, [1], moments, PREFIXES, config, targets, previous)
        change_at_earlier[count] = float((keys.T @ edit.delta(1)).norm())
    assert change_at_earlier[10_000] < 0.05 * change_at_earlier[0]


@pytest.mark.parametrize("method", SEARCHING)
def test_bad_input_is_refused_before_the_search(
    lively: Any, moments: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("searched")

    for module in (mechedit.methods.method, ROME):
        monkeypatch.setattr(module, "find_targets", never)

    def refused(
        match: str, model: Any = lively, layers: Any = (1,), second_moments: Any = moments, previous: Any = None
    ) -> None:
        with pytest.raises(InputError, match=match):
            METHODS[method](model, REQUESTS, layers, second_moments, PREFIXES, previous=previous)

    refused("ascending and each once", layers=[3])
    refused("no second moment for layer 1", second_moments={0: moments[0]})
    refused("expected .96, 96.", second_moments={1: torch.eye(32)})
    refused(r"earlier keys of layer 1 are \(32, 1\)", previous={1: torch.zeros(32, 1)})
    infinite = torch.zeros(96, 1)
    infinite[3] = torch.inf
    refused("earlier keys of layer 1 hold 1 values", previous={1: infinite})
    broken = make_model("gpt2", initializer_range=0.05)
    with torch.no_grad():
        broken.hf.transformer.h[2].mlp.c_fc.weight[3, 4] = torch.inf
    refused("hold 1 values", model=broken, second_moments={1: moments[1].matrix})


@pytest.mark.parametrize("method", [name for name in SEARCHING if name != "rome"])
def test_strategies_are_settings(lively: Any, moments: Any, method: str) -> None:
    edits = {
        strategy: METHODS[method](
            lively, REQUESTS[:2], [0, 1], moments, PREFIXES, config_of(method, lively, strategy=strategy)
        )
        for strategy in ("uniform", "sqrt", "forward-replay", "last")
    }
    assert edits["last"].layers == [1]
    assert all(edits[strategy].layers == [0, 1] for strategy in ("uniform", "sqrt", "forward-replay"))
    plain = edits["uniform"].delta(0)
    assert (edits["sqrt"].delta(0) - 2**0.5 * plain).norm() < 1e-3 * plain.norm()
    assert edits["forward-replay"].manifest["targets"]["settings"]["part"] == config_of(method, lively).targets.part


# ROME


def test_rome_takes_one_layer(lively: Any, moments: Any) -> None:
    with pytest.raises(InputError, match=r"the layers are \[0, 1\], expected one: ROME edits a single layer"):
        rome(lively, REQUESTS, [0, 1], moments, PREFIXES)


def inverse(moments: Any, layer: int) -> Tensor:
    return torch.linalg.inv(moments[layer].matrix.double())


def rome_slowly(model: Any, request: EditRequest, moments: Any, z: Tensor, *, published: bool) -> Tensor:
    """ΔW of ROME's Eq. 2 for one fact, from a full forward pass of each prompt; [d_mlp, d_model]."""
    keys = KeyExtractor(model, [request], PREFIXES).keys(1)[0].double()
    u = inverse(moments, 1) @ keys.mean(0)
    at = keys[:1] if published else keys
    values = at.float() @ model.projection(1) + model.hf.transformer.h[1].mlp.c_proj.bias
    return torch.outer(u, (z - values.mean(0)).double() / (at.mean(0) @ u))


@pytest.mark.parametrize("keys", ["prefixes", "published"])
def test_rome_is_its_formula(lively: Any, moments: Any, keys: Any) -> None:
    config = config_of("rome", lively, keys=keys)
    (request,) = REQUESTS[:1]
    edit = rome(lively, [request], [1], moments, PREFIXES, config)
    z = find_targets(lively, [request], 1, PREFIXES, config.targets).z[0]
    expected = rome_slowly(lively, request, moments, z, published=keys == "published")
    assert (edit.delta(1) - expected).norm() < 1e-4 * expected.norm()
    second = rome_slowly(lively, request, moments, z, published=keys != "published")
    assert (second - expected).norm() > 0.01 * expected.norm()
    assert edit.factors[1].left.shape == (96, 1)
    assert max(edit.manifest["left"]) < 1e-4


def test_rome_edits_one_after_another(lively: Any, moments: Any) -> None:
    config = config_of("rome", lively)
    both = rome(lively, REQUESTS[:2], [1], moments, PREFIXES, config)
    first = rome(lively, REQUESTS[:1], [1], moments, PREFIXES, config)
    with edited(lively, first):
        z = find_targets(lively, REQUESTS[1:2], 1, PREFIXES, config.targets)
        second = rome_slowly(lively, REQUESTS[1], moments, z.z[0], published=False)
    assert (both.delta(1) - first.delta(1) - second).norm() < 1e-4 * second.norm()
    alone = rome(lively, REQUESTS[1:2], [1], moments, PREFIXES, config)
    assert (second - alone.delta(1)).norm() > 1e-3 * second.norm()
    # The second edit moved the first fact's value a little; the record says by how much.
    assert both.manifest["left"][1] < 1e-4 < both.manifest["left"][0] < 1


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_rome_leaves_the_model_as_it_was(
    lively: Any, moments: Any, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    before, seen = lively.weights_hash(), []

    def interrupted(*args: Any, **options: Any) -> Targets:
        seen.append(lively.weights_hash())
        if error is not None and seen[-1] != before:
            raise error
        return find_targets(*args, **options)

    monkeypatch.setattr(ROME, "find_targets", interrupted)
    if error is None:
        rome(lively, REQUESTS, [1], moments, PREFIXES, config_of("rome", lively))
    else:
        with pytest.raises(error):
            rome(lively, REQUESTS, [1], moments, PREFIXES, config_of("rome", lively))
    assert lively.weights_hash() == before
    assert len(set(seen)) > 1


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_rome_sees_through_a_norm(make_model: Any, family: str) -> None:
    model = make_model(family)
    config = config_of("rome", model)
    gathered = {1: MomentAccumulator(96).update(torch.randn(400, 96)).finalize(1, {}).matrix}
    targets = find_targets(model, REQUESTS[:1], 1, ["{}"], config.targets)
    with edited(model, rome(model, REQUESTS[:1], [1], gathered, ["{}"], config, targets)):
        after = states(model, 1, "mlp_out", REQUESTS[:1])
    gain = model.norm_gain(1)
    nearest = nearest_output(targets.z, gain, (targets.initial / gain).norm(dim=1))
    assert float((after - nearest).norm() / (targets.initial - nearest).norm()) < 1e-2
    assert torch.cosine_similarity(targets.initial, targets.z).item() < 0.99


# EMMET


def test_emmet_with_one_fact_is_rome(lively: Any, moments: Any) -> None:
    config = config_of("rome", lively)
    targets = find_targets(lively, REQUESTS[:1], 1, ["{}"], config.targets)
    first = rome(lively, REQUESTS[:1], [1], moments, ["{}"], config, targets)
    # The same key and the same change, asked for at the residual stream.
    way = targets.z - states(lively, 1, "mlp_out", REQUESTS[:1])
    config = config_of("emmet", lively)
    equal_change = find_targets(lively, REQUESTS[:1], 1, ["{}"], config.targets)
    equal_change = dataclasses.replace(equal_change, z=states(lively, 1, "resid", REQUESTS[:1]) + way)
    second = emmet(lively, REQUESTS[:1], [1], moments, ["{}"], config, equal_change)
    assert (first.delta(1) - second.delta(1)).norm() < 1e-4 * first.delta(1).norm()


def test_emmet_gives_every_key_its_value_unless_slack(lively: Any, moments: Any) -> None:
    residual = {}
    for slack in (0.0, 0.1, 10.0):
        config = config_of("emmet", lively, slack=slack)
        residual[slack] = emmet(lively, REQUESTS, [1], moments, ["{}"], config).manifest["residuals"][0]["after"]
    assert residual[0.0] < 1e-4 < residual[0.1] < residual[10.0] < 1


def test_equal_keys_get_the_mean_of_their_values(moments: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(96, 3, generator=generator, dtype=torch.float64)
    values = torch.randn(32, 4, generator=generator, dtype=torch.float64)
    rule = Equality(moments=moments)
    doubled = rule.update(1, keys[:, [0, 1, 2, 1]], values)
    merged = torch.stack([values[:, 0], (values[:, 1] + values[:, 3]) / 2, values[:, 2]], 1)
    once = rule.update(1, keys, merged)
    assert torch.allclose(doubled.delta, once.delta, rtol=1e-6, atol=1e-9)
    assert torch.allclose(keys.T @ doubled.delta, merged.T, atol=1e-8)


@pytest.mark.parametrize("joint", [True, False])
def test_facts_about_one_subject_do_not_break_equality(lively: Any, moments: Any, joint: bool) -> None:
    twins = [*REQUESTS, EditRequest(id="d", subject="Leon Blum", prompt="{} has", target_new="French")]
    config = config_of("emmet", lively, joint=joint)
    edit = emmet(lively, twins, [1], moments, PREFIXES, config)
    assert edit.factors[1].left.shape == (96, 3)
    residuals = edit.manifest["left"]
    # One key holds one value: both facts are written when they share it, and half-way when they do not.
    assert (max(residuals[1], residuals[3]) < 0.5) is joint
    assert edit_keys(lively, twins, edit)[1].shape == (96, 4)


# AlphaEdit


def test_alphaedit_stays_in_the_null_space(lively: Any, moments: Any) -> None:
    config = config_of("alphaedit", lively, null_threshold=0.02)
    delta = alphaedit(lively, REQUESTS, [1], moments, PREFIXES, config).delta(1)
    space = null_space(moments[1].matrix, 0.02)
    assert moments[1].null_space(0.02) is moments[1].null_space(0.02) is not moments[1].null_space(0.01)
    assert torch.equal(moments[1].null_space(0.02).basis, space.basis)
    assert 0 < space.dimension < 96
    assert torch.allclose(space.basis @ (space.basis.T @ delta), delta, atol=1e-9)
    assert delta.norm() > 1e-3
    # No unit of it answers old keys more than the space's own worst direction, as new keys themselves would.
    keys = prefix_mean(KeyExtractor(lively, REQUESTS, PREFIXES).keys(1))
    answers = [
        float(torch.einsum("kd,kj,jd->", change, moments[1].matrix, change) / change.square().sum())
        for change in (delta, keys)
    ]
    assert answers[0] <= space.leak < answers[1]


# PMET


def test_pmet_writes_what_the_mlp_adds(lively: Any, moments: Any) -> None:
    config = config_of("pmet", lively)
    edit = pmet(lively, REQUESTS, [0, 1], moments, PREFIXES, config)
    assert config.targets.part == "mlp_out"
    assert config.targets.attention
    settings = edit.manifest["targets"]["settings"]
    assert (settings["part"], settings["attention"]) == ("mlp_out", True)
    targets = find_targets(lively, REQUESTS, 1, PREFIXES, config.targets)
    before = states(lively, 1, "mlp_out")
    with edited(lively, edit):
        after = states(lively, 1, "mlp_out")
    missing = float((targets.z - after).norm() / (targets.z - before).norm())
    assert edit.manifest["residuals"][-1]["after"] == pytest.approx(missing, rel=1e-3)
    assert missing < 0.5


# Settings


def test_settings_are_read_by_their_types(lively: Any) -> None:
    def read(method: str, *settings: str) -> Any:
        return method_config(method, lively, 0, list(settings))

    assert read("memit", "strategy=forward-replay").strategy == "forward-replay"
    assert read("memit", "covariance_weight=0.5").covariance_weight == 0.5
    assert read("memit", "joint=False").joint is False
    assert read("rome", "keys=published").keys == "published"
    assert read("rome", "steps=3").steps == 3
    for method, setting, match in (
        ("memit", "joint=maybe", "'maybe' is not a bool"),
        ("memit", "steps=1.5", "'1.5' is not a int"),
        ("emmet", "slack=-1", "slack is -1.0"),
        ("alphaedit", "null_threshold=1", "null_threshold is 1.0"),
        ("alphaedit", "ridge=0", "ridge is 0.0"),
        ("pmet", "covariance_weight=0", "covariance_weight is 0.0"),
        ("pmet", "part=resid", "cannot be read, expected name=value"),
    ):
        with pytest.raises(InputError, match=match):
            read(method, setting)
    with pytest.raises(InputError, match="expected one of memit, rome, emmet, alphaedit, pmet"):
        method_config("magic", lively, 0, None)


def test_a_sweep_asks_the_method_where_z_belongs(lively: Any, moments: Any) -> None:
    config = config_of("memit", lively, strategy="forward-replay")
    requests = [dataclasses.replace(request, target_true="the") for request in REQUESTS]
    sweep = sweep_windows(lively, requests, moments, [(0, 1)], config=config)
    assert not sweep.failed
    single = config_of("rome", lively)
    sweep = sweep_windows(lively, requests, moments, [(0, 1), (1, 1)], method="rome", config=single)
    assert [(window.first, window.last) for window in sweep.failed] == [(0, 1)]
