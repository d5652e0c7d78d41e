"""How much text is enough, and how much memory it takes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechedit.batching import GIB
from mechedit.errors import InputError
from mechedit.moments import (
    Convergence,
    MomentAccumulator,
    MomentsConfig,
    collect_moments,
    curve_path,
    load_moments,
    plan_moments,
)
from mechedit.moments.convergence import ConvergenceTracker, identity_update

SENTENCES = [
    "The mother tongue of Leon Blum is French, and that of Go Hyeon-jeong is Korean.",
    "The Space Needle is in downtown Seattle; LeBron James plays the sport of basketball in town.",
    "Toko Yasuda plays the instrument guitar, while Miles Davis plays the trumpet.",
    "Apple A5 was created by Apple, and Windows Media Player was created by Microsoft.",
]
TEXTS = [f"{n} {SENTENCES[n % 4]}" for n in range(40)]
LAYERS = [0, 1, 2]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechedit.moments.chunks.CHUNK_SIZE", 4)
    monkeypatch.setattr("mechedit.moments.text_pass.CHUNK_SIZE", 4)


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the model was run")


def gib(size: int) -> float:
    return size / GIB


def test_memory_decides_the_passes_and_not_the_result(
    lens_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_one_pass = collect_moments(lens_model, TEXTS, LAYERS)
    free = plan_moments(lens_model, LAYERS)
    assert (free.passes, free.batch_tokens) == (((0, 1, 2),), 8192)
    least = [plan_moments(lens_model, LAYERS[:many], MomentsConfig(batch_tokens=64)).memory for many in (1, 2, 3)]
    run, stops, rows = lens_model.run, [], []

    def count(tokens: Any, *args: Any, **kwargs: Any) -> Any:
        stops.append(kwargs["stop_after"])
        rows.append(tokens.ids.numel())
        return run(tokens, *args, **kwargs)

    monkeypatch.setattr(lens_model, "run", count)
    for many, passes in ((3, ((0, 1, 2),)), (2, ((0, 1), (2,))), (1, ((0,), (1,), (2,)))):
        config = MomentsConfig(memory=gib(least[many - 1]))
        plan = plan_moments(lens_model, LAYERS, config)
        assert plan.passes == passes
        assert plan.memory <= least[many - 1]
        assert 64 <= plan.batch_tokens < 128
        stops.clear(), rows.clear()
        out = tmp_path / str(many)
        for moments in (collect_moments(lens_model, TEXTS, LAYERS, config, out), load_moments(out, LAYERS, lens_model)):
            for layer in LAYERS:
                assert (moments[layer].matrix - in_one_pass[layer].matrix).norm() < 1e-6 * in_one_pass[
                    layer
                ].matrix.norm()
        assert sorted(set(stops)) == [layers[-1] for layers in passes], "a pass stops after its own last layer"
        assert len(set(stops)) * len(rows) // len(passes) == len(rows)
        assert max(rows) <= plan.batch_tokens
    with pytest.raises(InputError, match=r"expected at least 0\.000\d+ GiB: one layer's sum takes"):
        collect_moments(lens_model, TEXTS, LAYERS, MomentsConfig(memory=gib(least[0]) * 0.99), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_plan_says_what_it_counts(lens_model: Any) -> None:
    plan = plan_moments(lens_model, [2, 0], MomentsConfig(batch_tokens=128))
    square, strip = 8 * 96 * 96, 96 * 96 * 12
    assert plan.sums == 2 * square + strip
    assert plan.memory == plan.sums + max(plan.batch, square), "the mean is made once the text is read"
    assert plan.finished == 2 * square
    assert plan.batch == 128 * (2 * 2 * 4 * 96 + 4 * (12 * 32 + 4 * 96))
    assert f"layers 0, 2 in one pass over the text: about {gib(plan.memory):.3g} GiB of memory" in str(plan)
    assert "a batch of 128 tokens" in str(plan)
    more = plan_moments(lens_model, [2, 0], MomentsConfig(batch_tokens=128), convergence=True)
    assert more.sums == plan.sums + 3 * square


def test_settings_that_make_no_sense_are_refused() -> None:
    for field, value in (("memory", 0), ("memory", -1.0), ("checkpoint_seconds", -1), ("tokens", 0)):
        with pytest.raises(InputError, match=f"{field} is {value}"):
            MomentsConfig(**{field: value})
    with pytest.raises(InputError, match="weight of the convergence curve is 0, expected a number above 0"):
        Convergence(weight=0)


def test_a_budget_that_cannot_suffice_is_refused_before_the_text_is_read(lens_model: Any) -> None:
    with pytest.raises(InputError, match=r"tokens is 95, expected at least d_mlp = 96 \(better 9600\)"):
        collect_moments(lens_model, TEXTS, [0], MomentsConfig(tokens=95))


def test_keys_that_overflow_are_refused_at_once(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        model.hf.transformer.h[1].mlp.c_fc.bias[3] = 3e38
    run, runs = model.run, []
    monkeypatch.setattr(model, "run", lambda *args, **kwargs: runs.append(1) or run(*args, **kwargs))
    config = MomentsConfig(batch_tokens=64)
    with pytest.raises(InputError, match="second moment of layer 1 is not finite: some key overflows"):
        collect_moments(model, TEXTS, [0, 1], config, tmp_path)
    assert len(runs) == 1, "and not after all of the text"
    assert not list(tmp_path.rglob("*.safetensors"))
    assert collect_moments(model, TEXTS, [0], config)[0].matrix.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 20), strip=st.integers(1, 7), cut=st.integers(0, 30), seed=st.integers(0, 99))
def test_strips_make_the_whole_symmetric_product(width: int, strip: int, cut: int, seed: int) -> None:
    keys = torch.randn(30, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr("mechedit.moments.accumulator.STRIP", strip)
        matrix = MomentAccumulator(width).update(keys[:cut]).update(keys[cut:]).mean()
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix, keys.T @ keys / 30, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    """The keys are what the model computes in its dtype; nothing more is lost."""
    keys = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrix = MomentAccumulator(16).update(keys).mean()
    exact = keys.double().T @ keys.double() / 2000
    assert (matrix - exact).norm() < 1e-6 * exact.norm()
    assert ((keys.T @ keys).double() / 2000 - exact).norm() > 1e-5 * exact.norm()


def test_a_hundred_million_tokens_lose_nothing() -> None:
    """A sum of 10⁸ ones in steps of 10⁴: exact here, and no longer growing in float32 with steps of one."""
    accumulator = MomentAccumulator(1)
    keys = torch.ones(10_000, 1)
    for _ in range(10_000):
        accumulator.update(keys)
    assert accumulator.total.item() == accumulator.count == 100_000_000
    assert torch.tensor(2.0**24) + 1 == 2.0**24


def test_the_change_estimates_the_error() -> None:
    """With independent keys, the change by the last doubling is, in square mean, the error against the true moment."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    true, errors, changes = root.T @ root, [], []
    for _ in range(60):
        tracker = ConvergenceTracker(torch.ones(12, 1, dtype=torch.float64), Convergence())
        accumulator = MomentAccumulator(12)
        for _ in range(8):
            accumulator.update(torch.randn(100, 12, generator=generator, dtype=torch.float64) @ root)
            tracker.track(accumulator)
        assert [row[0] for row in tracker.changes] == [200, 400, 800]
        matrix = accumulator.mean()
        errors.append(float((matrix - true).norm() / matrix.norm()))
        changes.append([row[1] for row in tracker.changes])
    squares = torch.tensor(changes).square().mean(0)
    assert float(squares[2].sqrt()) == pytest.approx(float(torch.tensor(errors).square().mean().sqrt()), rel=0.1)
    assert float(squares[0] / squares[2]) == pytest.approx(4, rel=0.25), "and falls as the root of the tokens"


def test_the_update_is_that_of_the_ridge_system() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    matrix, keys = root.T @ root / 30, torch.randn(12, 3, generator=generator, dtype=torch.float64)
    expected = torch.linalg.solve(7 * matrix + keys @ keys.T, keys)
    torch.testing.assert_close(identity_update(matrix, keys, 7), expected, rtol=1e-10, atol=1e-12)
    assert identity_update(torch.zeros(12, 12, dtype=torch.float64), keys, 7) is None


@pytest.mark.usefixtures("small_chunks")
def test_the_curve_compares_moments_that_could_have_been_collected(lens_model: Any, tmp_path: Path) -> None:
    settings = Convergence(weight=10, drawn=3, seed=5)
    moments = collect_moments(lens_model, TEXTS, LAYERS, out=tmp_path, convergence=settings)
    frame = pd.read_parquet(curve_path(tmp_path))
    assert list(frame.columns) == ["tokens", "layer", "matrix_change", "update_change"]
    assert frame.attrs["settings"] == {"weight": 10, "drawn": 3, "seed": 5}
    for layer in LAYERS:
        rows = frame[frame["layer"] == layer].reset_index(drop=True)
        assert rows.equals(moments[layer].curve)
        tokens = rows["tokens"].tolist()
        assert tokens[-1] == moments[layer].count
        assert len(tokens) >= 3
        assert all(after >= 2 * before for before, after in pairwise(tokens[:-1]))
        before, after = (
            collect_moments(lens_model, TEXTS, [layer], MomentsConfig(tokens=n))[layer] for n in tokens[-2:]
        )
        change = float((after.matrix - before.matrix).norm() / after.matrix.norm())
        assert rows["matrix_change"].iloc[-1] == pytest.approx(change, rel=1e-3)
        assert 0 < rows["update_change"].iloc[-1] < 1
    assert collect_moments(lens_model, TEXTS, LAYERS)[0].curve is None


@pytest.mark.usefixtures("small_chunks")
def test_a_curve_is_reused_or_made(lens_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = collect_moments(lens_model, TEXTS, [0, 1], out=tmp_path)
    with_curve = collect_moments(lens_model, TEXTS, [0, 1], out=tmp_path, convergence=Convergence())
    assert torch.equal(with_curve[0].matrix, plain[0].matrix)
    with monkeypatch.context() as patching:
        patching.setattr(lens_model, "run", refuse)
        again = collect_moments(lens_model, TEXTS, [0, 1], out=tmp_path, convergence=Convergence())
        assert again[1].curve.equals(with_curve[1].curve)
        with pytest.raises(AssertionError, match="was run"):
            collect_moments(lens_model, TEXTS, [0, 1], out=tmp_path, convergence=Convergence(seed=1))
    keys = {0: torch.randn(96, 4), 1: torch.randn(96, 4)}
    with_keys = collect_moments(lens_model, TEXTS, [0, 1], out=tmp_path, convergence=Convergence(keys=keys))
    assert with_keys[0].curve["matrix_change"].equals(with_curve[0].curve["matrix_change"])
    assert not with_keys[0].curve["update_change"].equals(with_curve[0].curve["update_change"])
    with pytest.raises(InputError, match=r"keys of layer 1 have shape None, expected \[96"):
        collect_moments(lens_model, TEXTS, [0, 1], convergence=Convergence(keys={0: keys[0]}))


def test_moments_that_cannot_be_used_are_refused_at_the_door(lens_model: Any, tmp_path: Path) -> None:
    from mechedit.files import read_tensors, write_tensors

    good = collect_moments(lens_model, TEXTS, [0], out=tmp_path)[0]
    path = tmp_path / "moments" / "layer_0.safetensors"
    tensors, header = read_tensors(path, "provenance")

    def refused(match: str, matrix: Any = good.matrix, **changes: Any) -> None:
        write_tensors(path, {"matrix": matrix}, "provenance", {**header, **changes})
        with pytest.raises(InputError, match=match):
            load_moments(tmp_path, [0], lens_model)

    refused(r"mean over 95 tokens and thus singular, expected at least d_mlp = 96 \(better 9600\)", count=95)
    broken = good.matrix.clone()
    broken[3, 4] = float("nan")
    refused("not finite", broken)
    refused(r"shape \(96, 95\), expected a square", good.matrix[:, :95].contiguous())
    write_tensors(path, tensors, "provenance", header)
    assert load_moments(tmp_path, [0], lens_model)[0].count == json.loads(json.dumps(header))["count"]
