"""Moments in the published code's files: read as its formula says, refused when they are of something else."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechedit as me
from mechedit.errors import InputError
from mechedit.moments.key_energy import TEXTS, energy_match, least_correlation, measured_energies
from mechedit.moments.npz_file import module_name

LAYERS = [0, 1, 2]


def published_sum(model: Any, layer: int, texts: tuple[str, ...] | list[str]) -> tuple[np.ndarray, int]:
    """The published collector, written naively: keys of all tokens, special ones too, added up in float32."""
    caught: list[Tensor] = []
    module = model.hf.get_submodule(module_name(model, layer))
    handle = module.register_forward_pre_hook(lambda module, args: caught.append(args[0][0]))
    total, count = torch.zeros(model.d_mlp, model.d_mlp), 0
    for text in texts:
        with torch.no_grad():
            ids = model.tokenizer(text, truncation=True, max_length=model.max_positions)["input_ids"]
            model.hf(torch.tensor([ids]))
        keys = caught.pop()
        total, count = total + keys.T @ keys, count + len(keys)
    handle.remove()
    return total.numpy(), count


def published_moment(path: Path, samples: int = 100_000) -> Tensor:
    """What the published reader makes of a file: it is refused unless it states the number of samples asked for."""
    state = dict(np.load(path))
    if state["sample_size"] != samples:
        raise FileNotFoundError("the published code would collect anew")
    statistic = {key.removeprefix("mom2."): value for key, value in state.items() if key.startswith("mom2.")}
    assert set(statistic) == {"constructor", "count", "mom2"}
    return torch.from_numpy(statistic["mom2"]) / int(statistic["count"])


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model("gpt2")


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EasyEdit's folders: data/stats/MODEL/wikipedia_stats."""
    stats = tmp_path_factory.mktemp("data") / "stats" / "gpt2" / "wikipedia_stats"
    stats.mkdir(parents=True)
    for layer in LAYERS:
        total, count = published_sum(model, layer, TEXTS)
        write_published(stats, layer, total, count)
    return stats


def write_published(stats: Path, layer: int, total: np.ndarray, count: int, **changes: Any) -> Path:
    path = stats / f"transformer.h.{layer}.mlp.c_proj_float32_mom2_100000.npz"
    arrays = {
        "mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": count, "mom2.mom2": total,
        "sample_size": 100_000,
    }  # fmt: skip
    np.savez(path, **{name: value for name, value in {**arrays, **changes}.items() if value is not None})
    return path


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() < 1e-6 * expected.norm())


def test_published_files_are_read_as_their_formula_says(model: Any, folder: Path) -> None:
    pattern = folder / "transformer.h.{}.mlp.c_proj_float32_mom2_100000.npz"
    for source in (folder, folder.parents[1], pattern, str(pattern)):
        moments = me.load_moments(source, LAYERS, model)
        for layer in LAYERS:
            total, count = published_sum(model, layer, TEXTS)
            assert moments[layer].count == count
            assert moments[layer].matrix.dtype == torch.float64
            assert close(moments[layer].matrix, torch.from_numpy(total).double() / count)
    assert torch.equal(me.load_moments(str(pattern).format(1), [1], model)[1].matrix, moments[1].matrix)
    record = moments[1].provenance["published"]
    assert record["samples"] == 100_000
    assert record["correlation"] > 2 * least_correlation(model.d_mlp)


def test_a_method_edits_with_published_moments(model: Any, folder: Path) -> None:
    request = me.EditRequest(id="1", subject="Miles Davis", prompt="{} plays the", target_new="guitar")
    moments = me.load_moments(folder, [1], model)
    config = me.MemitConfig(covariance_weight=1.0, steps=2)
    edit = me.memit(model, [request], [1], moments, ["{}"], config)
    bare = me.memit(model, [request], [1], {1: moments[1].matrix}, ["{}"], config)
    torch.testing.assert_close(edit.delta(1), bare.delta(1))
    other = me.memit(model, [request], [1], {1: torch.eye(model.d_mlp).double()}, ["{}"], config)
    assert not torch.allclose(edit.delta(1), other.delta(1))


def test_our_moments_are_read_by_the_published_reader(model: Any, tmp_path: Path) -> None:
    collected = me.collect_moments(model, list(TEXTS), [1])[1]
    path = me.write_npz(collected, model, tmp_path / "stats")
    assert path == tmp_path / "stats" / "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz"
    assert close(published_moment(path).double(), collected.matrix)
    assert published_moment(path).dtype == torch.float32
    assert list(path.parent.iterdir()) == [path]
    back = me.load_moments(path, [1], model)[1]
    assert close(back.matrix, collected.matrix)
    assert back.count == collected.count
    fewer = me.write_npz(collected, model, tmp_path, samples=24)
    assert fewer.name.endswith("_mom2_24.npz")
    assert close(published_moment(fewer, 24).double(), collected.matrix)
    with pytest.raises(FileNotFoundError):
        published_moment(fewer)


def test_moments_of_another_model_are_not_written_in_this_models_name(
    model: Any, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    moment = me.collect_moments(model, list(TEXTS), [1])[1]
    with pytest.raises(InputError, match="weights_hash"):
        me.write_npz(moment, make_model("gpt2", seed=1), tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_busy_units_tell_layers_and_models_apart(family: str, make_model: Callable[..., Any]) -> None:
    """The check's claim: right layers are far above its bound, other layers and models far below."""
    first, second = make_model(family, seed=0), make_model(family, seed=1)
    width = first.d_mlp
    moments = me.collect_moments(first, [f"{n} {text}" for n in range(4) for text in TEXTS], LAYERS)
    energies = {seed: measured_energies(model, LAYERS) for seed, model in enumerate((first, second))}
    for layer in LAYERS:
        predicted = moments[layer].matrix.diagonal()
        right = energy_match(predicted, energies[0][layer])
        assert right.correlation > 0.6 > 1.5 * least_correlation(width)
        assert 0.5 < right.ratio < 2
        wrong = [energies[0][other] for other in LAYERS if other != layer] + [energies[1][layer]]
        assert all(energy_match(predicted, measured).correlation < least_correlation(width) for measured in wrong)


def test_moments_of_another_layer_or_model_are_refused(
    model: Any, folder: Path, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    total, count = published_sum(model, 0, TEXTS)
    write_published(tmp_path, 1, total, count)
    with pytest.raises(InputError, match=r"is not of layer 1 of .* correlate by -?0\.\d\d, expected at least 0\.31"):
        me.load_moments(tmp_path, [1], model)
    with pytest.raises(InputError, match="is not of layer 0"):
        me.load_moments(folder, [0], make_model("gpt2", seed=1))
    with pytest.raises(InputError, match=r"by its name of layer 0, expected layer 2; .*\{\}"):
        me.load_moments(folder / "transformer.h.0.mlp.c_proj_float32_mom2_100000.npz", [2], model)
    assert me.load_moments(folder, [0], model)


def test_a_matrix_of_another_size_is_refused_with_the_shapes(
    folder: Path, make_model: Callable[..., Any], tmp_path: Path, model: Any
) -> None:
    wide = make_model("gpt2", n_inner=104)
    with pytest.raises(InputError, match=r"holds a matrix of shape \[96, 96\], expected \[104, 104\]"):
        me.load_moments(folder, [1], wide)
    with pytest.raises(InputError, match=r"of shape \[96, 96\], expected \[32, 32\]"):
        me.load_moments(folder, [1], model.writing("attn"))
    write_published(tmp_path, 1, np.zeros((96, 95), np.float32), 500)
    with pytest.raises(InputError, match=r"of shape \[96, 95\], expected \[96, 96\]"):
        me.load_moments(tmp_path, [1], model)


def test_a_sum_that_is_not_what_it_says_is_refused(model: Any, tmp_path: Path) -> None:
    total, count = published_sum(model, 1, TEXTS)
    for changes, message in (
        ({"mom2.count": 50}, "is the mean over 50 tokens and thus singular"),
        ({"mom2.count": 50 * count}, r"predicts other sizes .* is (49\.\d|50\.?\d?) times"),
        ({"mom2.mom2": total / count}, "predicts other sizes"),
        ({"mom2.mom2": np.triu(total)}, "is not symmetric"),
        ({"mom2.mom2": np.full_like(total, np.inf)}, "not finite"),
        ({"mom2.mom2": None, "mom2.cmom2": total}, r"holds mom2.constructor, .*expected mom2.mom2 \(the sum of k kᵀ\)"),
        ({"mom2.count": None}, "expected mom2.mom2"),
    ):
        write_published(tmp_path, 1, total, count, **changes)
        with pytest.raises(InputError, match=message):
            me.load_moments(tmp_path, [1], model)
    path = write_published(tmp_path, 1, total, count)
    assert me.load_moments(tmp_path, [1], model)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match="cannot be read as a NumPy file"):
        me.load_moments(tmp_path, [1], model)


def test_a_statistic_stored_alone_and_one_without_samples_are_read(model: Any, tmp_path: Path) -> None:
    total, count = published_sum(model, 1, TEXTS)
    path = tmp_path / "layer.1.npz"
    np.savez(path, mom2=total, count=count)
    moment = me.load_moments(path, [1], model)[1]
    assert close(moment.matrix, torch.from_numpy(total).double() / count)
    assert moment.provenance["published"]["samples"] is None
    # A missing number is a NaN of its own in these files.
    write_published(tmp_path, 2, *published_sum(model, 2, TEXTS), sample_size=np.float64("nan"))
    assert me.load_moments(tmp_path, [2], model)[2].provenance["published"]["samples"] is None


def test_nothing_is_unpickled(model: Any, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (print, ("unpickled",))

    path = tmp_path / "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz"
    np.savez(path, **{"mom2.mom2": np.array([Trap()], dtype=object), "mom2.count": 500})
    with pytest.raises(InputError, match="cannot be read as a NumPy file"):
        me.load_moments(tmp_path, [1], model)
    buffer = io.BytesIO()
    pickle.dump(Trap(), buffer)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="cannot be read as a NumPy file"):
        me.load_moments(tmp_path, [1], model)


def test_one_file_per_layer_must_be_there(model: Any, folder: Path, tmp_path: Path) -> None:
    write_published(tmp_path, 1, *published_sum(model, 1, TEXTS))
    with pytest.raises(InputError, match=r"holds moments of the layers 1, expected layer 2, in a file such as"):
        me.load_moments(tmp_path, [1, 2], model)
    with pytest.raises(InputError, match=r"there is no file '.*h\.2.*npz', expected the second moment of layer 2"):
        me.load_moments(tmp_path / "transformer.h.{}.mlp.c_proj_float32_mom2_100000.npz", [1, 2], model)
    # Attention's moment beside the MLP's is no ambiguity; another precision of the same module is.
    (tmp_path / "transformer.h.1.attn.c_proj_float32_mom2_100000.npz").write_bytes(b"not looked at")
    assert me.load_moments(tmp_path, [1], model)
    (tmp_path / "transformer.h.1.mlp.c_proj_float64_mom2_100000.npz").write_bytes(b"not looked at")
    with pytest.raises(
        InputError, match=r"holds 2 moments of layer 1 \(transformer.*float32.*float64.*\), expected one"
    ):
        me.load_moments(tmp_path, [1], model)
    with pytest.raises(InputError, match="pass it: load_moments"):
        me.load_moments(folder, [1])
    with pytest.raises(InputError, match=r"or give the path of published moments \(.npz\)"):
        me.load_moments(tmp_path / "none", [1], model)
