"""A method is a config and an algorithm: whatever is common to all methods is done by `Method`."""

from __future__ import annotations

import copy
import inspect
import pickle
import pydoc
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.mend import identity_editor
from helpers.spreading import PREFIXES, REQUESTS
from torch import Tensor

import mechedit as me
import mechedit.methods.method
from mechedit.cli import method_config
from mechedit.cli.describe import describe_edit, format_description
from mechedit.edit import Edit
from mechedit.errors import InputError
from mechedit.methods import (
    METHODS,
    EditTask,
    MemitConfig,
    MendConfig,
    Method,
    Ridge,
    RomeConfig,
    SpreadMethodConfig,
    edit_method,
    memit,
    recommended,
    spread_over_layers,
    targets_for,
)
from mechedit.moments import SecondMoment, collect_moments
from mechedit.pipeline import edit_step
from mechedit.run_folder import RunFolder
from mechedit.sweep import sweep_windows
from mechedit.targets import TargetConfig, TargetSettings, find_targets

TEXTS = [
    "The mother tongue of Leon Blum is French, and that of Go Hyeon-jeong is Korean.",
    "Apple A5 was created by Apple. Windows Media Player was created by Microsoft.",
    "The Space Needle is in downtown Seattle; LeBron James plays the sport of basketball in town.",
    "Toko Yasuda plays the instrument guitar, while Miles Davis plays the trumpet.",
]


@dataclass(frozen=True, kw_only=True)
class DoubledConfig(SpreadMethodConfig):
    """Settings of the toy method."""

    covariance_weight: float | int = 0.5
    """λ, which is doubled."""


@edit_method(DoubledConfig)
def doubled(task: EditTask[DoubledConfig]) -> Edit:
    """Ridge with twice the weight of old keys."""
    rule = Ridge(moments=task.moments, weight=2 * task.config.covariance_weight, previous=task.previous)
    return spread_over_layers(task, targets_for(task), rule)


@pytest.fixture(scope="module")
def moments(small_gpt2: Any) -> dict[int, SecondMoment]:
    return collect_moments(small_gpt2, TEXTS, [0, 1])


@pytest.fixture(scope="module")
def small_gpt2(make_model: Any) -> Any:
    return make_model("gpt2", initializer_range=0.05)


def deltas(edit: Edit) -> list[Tensor]:
    return [edit.delta(layer) for layer in edit.layers]


def equal(first: Edit, second: Edit) -> bool:
    return all(torch.equal(*pair) for pair in zip(deltas(first), deltas(second), strict=True))


def test_a_new_method_is_its_rule_and_its_config(small_gpt2: Any, moments: Any) -> None:
    config = DoubledConfig(steps=3)
    edit = doubled(small_gpt2, REQUESTS, [0, 1], moments, PREFIXES, config)
    weights = {
        weight: memit(small_gpt2, REQUESTS, [0, 1], moments, PREFIXES, MemitConfig(steps=3, covariance_weight=weight))
        for weight in (0.5, 1.0)
    }
    assert equal(edit, weights[1.0])
    assert not equal(edit, weights[0.5])
    assert edit.manifest["method"] == "doubled"
    assert edit.manifest["settings"] == asdict(config)
    assert edit.manifest["unconverged"] == weights[1.0].manifest["unconverged"]
    with pytest.raises(InputError, match="no second moment for layer 1"):
        doubled(small_gpt2, REQUESTS, [1], None, PREFIXES)
    with pytest.raises(InputError, match="ascending and each once"):
        doubled(small_gpt2, REQUESTS, [1, 0], moments, PREFIXES)


def test_a_new_method_is_known_by_its_name(
    small_gpt2: Any, moments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline, `--set`, `edit --show` and sweeps look it up."""
    monkeypatch.setitem(METHODS, "doubled", doubled)  # type: ignore[arg-type]
    assert recommended("doubled", small_gpt2) == DoubledConfig()
    config = method_config("doubled", small_gpt2, 0, ["covariance_weight=0.25", "steps=3"])
    assert config == DoubledConfig(covariance_weight=0.25, steps=3)
    edit = edit_step(RunFolder(tmp_path), small_gpt2, REQUESTS, [0, 1], moments, "doubled", config)
    assert equal(edit, doubled(small_gpt2, REQUESTS, [0, 1], moments, config=config))
    assert any((tmp_path / "targets").iterdir()), "the search is cached"
    shown = format_description(Path("edit.safetensors"), describe_edit(edit))
    settings = next(line for line in shown.splitlines() if line.startswith("settings"))
    assert sorted(settings.removeprefix("settings  ").split(", ")) == ["covariance_weight = 0.25", "steps = 3"]
    requests = [replace(request, target_true="the") for request in REQUESTS]
    assert not sweep_windows(small_gpt2, requests, moments, [(0, 1)], method="doubled", config=config).failed


@pytest.mark.parametrize("method", list(METHODS))
def test_the_weights_are_scanned_once_per_edit(
    small_gpt2: Any, moments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    scanned, plain = [], mechedit.methods.method.check_input

    def counted(*args: Any) -> list[int]:
        scanned.append(args)
        return plain(*args)

    monkeypatch.setattr(mechedit.methods.method, "check_input", counted)
    changes = {"null_threshold": 0.9} if method == "alphaedit" else {}
    if method == "mend":
        identity_editor(small_gpt2, (1,)).save(tmp_path / "mend.safetensors")
        config = MendConfig(editor=str(tmp_path / "mend.safetensors"))
    else:
        config = replace(recommended(method, small_gpt2), steps=2, **changes)
    requests = [replace(request, target_true="the") for request in REQUESTS]
    edit_step(RunFolder(tmp_path), small_gpt2, requests, [1], moments, method, config)
    assert len(scanned) == 1


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_help_shows_purpose_arguments_and_settings(method: Method[Any]) -> None:
    assert getattr(me, method.name) is method
    shown = pydoc.plain(pydoc.render_doc(method))
    assert f"{method.name}(model: 'Model', requests: " in shown
    for text in (
        f"config: settings, a `{method.config.__name__}`",
        "Args:",
        "requests: what it should say",
        "Returns:",
        "Raises:",
    ):
        assert text in shown
    doc = inspect.getdoc(method.algorithm)
    assert doc
    assert doc.splitlines()[0] in shown
    assert method.__doc__ != Method.__doc__
    signature = inspect.signature(method)
    names = ["model", "requests", "layers", "moments", "prefixes", "config", "targets", "previous", "cache"]
    names += ["chat", "joint"]
    assert list(signature.parameters) == names
    assert signature.parameters["config"].annotation == f"{method.config.__name__} | None"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("memit", ["MEMIT", "ΔW = R Kᵀ (λ E[k kᵀ] + K Kᵀ)⁻¹", "Eq. 16", "Eq. 19", "Eq. 20", "Eq. 14", "Example:"]),
        ("rome", ["ROME", "ΔW = (z − W k) (M⁻¹ k)ᵀ / kᵀ M⁻¹ k", "Eq. 2"]),
        ("emmet", ["EMMET", "ΔW = R (Kᵀ M⁻¹ K + α I)⁻¹ Kᵀ M⁻¹"]),
        ("alphaedit", ["AlphaEdit", "ΔW = R Kᵀ P (K Kᵀ P + Kₚ Kₚᵀ P + L2·I)⁻¹"]),
        ("pmet", ["PMET", "1/√(L − l + 1)"]),
        ("ft", ["log P(o_t"]),
        ("ft_l", ["±ε"]),
        ("ft_w", ["weight decay"]),
        ("kn", ["KN", "ΔWᵢ = scale · (e_new − e_true)"]),
        ("mend", ["MEND", "ΔW = −α Σ_t ũ_t δ̃_tᵀ"]),
    ],
)
def test_help_shows_the_equation(name: str, words: list[str]) -> None:
    doc = METHODS[name].__doc__ or ""
    assert [word for word in words if word not in doc] == []


def test_a_method_is_named_once() -> None:
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in METHODS}
    assert repr(METHODS["memit"]).startswith("memit(model: ")


def test_settings_of_another_method_are_refused(small_gpt2: Any, moments: Any) -> None:
    with pytest.raises(
        InputError, match="the settings are a RomeConfig, expected a MemitConfig for the method 'memit'"
    ):
        METHODS["memit"](small_gpt2, REQUESTS, [1], moments, PREFIXES, RomeConfig())


def test_given_targets_that_no_search_uses_are_refused(small_gpt2: Any) -> None:
    targets = find_targets(small_gpt2, REQUESTS, 1, PREFIXES, TargetConfig(steps=2))
    with pytest.raises(InputError, match="ft was given targets, expected none"):
        METHODS["ft"](small_gpt2, REQUESTS, [1], targets=targets)


def test_settings_of_the_search_are_written_once() -> None:
    """A method has every setting of the search, but for those by which it is defined."""
    fixed = {"part", "attention", "pass_tokens"}
    for config in (MemitConfig, RomeConfig):
        assert issubclass(config, TargetSettings)
        assert set(asdict(TargetConfig())) - set(asdict(config())) == fixed


def test_a_method_is_pickled_and_copied_as_a_function_is() -> None:
    for name, method in METHODS.items():
        assert pickle.loads(pickle.dumps(method)) is method, name
        assert copy.deepcopy(method) is copy.copy(method) is method
