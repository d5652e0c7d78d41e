"""What the steps give on a model, to be compared between one whose weights are whole and one that is split."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mechedit as me
from helpers.edits import logits
from helpers.models import SENTENCES
from mechedit.edit.weights import copy_weights
from mechedit.errors import InputError
from mechedit.solve.row_blocks import plus_identity
from mechedit.split_tensors import whole
from mechedit.trace.cells import trace_group
from mechedit.trace.traced_fact import tokenize_fact

LAYERS = [0, 1]
FACT = me.Fact(id="f", subject="Leon Blum", prompt="The mother tongue of {} is the", object="Korean")
REQUESTS = [
    me.EditRequest(id="a", subject="Danielle Darrieux", prompt="The mother tongue of {}", target_new="Korean"),
    me.EditRequest(id="b", subject="Toko Yasuda", prompt="We heard that {}", target_new="plays"),
]
PREFIXES = ["{}", "The first thing. {}"]
TRACE = me.TraceConfig(
    metrics=("log_probability",), kinds=("mlp",), sever=("nothing", "mlp"), roles=("subject_last", "last"), samples=1
)
SETTINGS: dict[str, Any] = {"lr": 0.5, "clamp": 2.0, "steps": 2}
WORDS = " ".join(SENTENCES).split()
TEXTS = [" ".join(random.Random(seed).sample(WORDS, 12)) for seed in range(40)]
"""Enough for second moments that are not singular."""


class LargestDouble(TorchDispatchMode):
    """Numbers in the largest float64 tensor that this process makes: moments and linear systems alone are such."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # its parts come by once it has taken itself apart
            return NotImplemented
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            is_real = isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor)  # by which shapes are found
            if is_real and tensor.dtype == torch.float64:
                self.numbers = max(self.numbers, tensor.numel())
        return made


def results(model: Any, layers: Sequence[int] = LAYERS, texts: Sequence[str] = TEXTS) -> dict[str, Tensor]:
    """Logits, effects, moments, keys, z, ΔW, and logits under the edit, applied and undone."""
    before = model.weights_hash()
    effects = trace_group(model, [tokenize_fact(model, FACT)], 1.0, TRACE)["effect"]
    found = {"logits": logits(model), "effects": torch.tensor(effects.to_numpy())}
    with LargestDouble() as largest:
        moments = me.collect_moments(model, texts, layers, config=me.MomentsConfig(max_length=16))
    found |= {f"moment {layer}": whole(moment.matrix) for layer, moment in moments.items()}
    targets = me.find_targets(model, REQUESTS, layers[-1], PREFIXES, me.TargetConfig(**SETTINGS))
    found["z"] = targets.z
    # A large condition number would enlarge the rounding.
    regular = {
        layer: dataclasses.replace(moment, matrix=plus_identity(moment.matrix, 1.0))
        for layer, moment in moments.items()
    }
    config = me.MemitConfig(covariance_weight=1.0, **SETTINGS)
    with largest:
        edit = me.memit(model, REQUESTS, layers, regular, config=config, prefixes=PREFIXES)
    found["largest float64"] = torch.tensor(largest.numbers)
    found |= {f"delta {layer}": edit.delta(layer) for layer in layers}
    weights = copy_weights(model, layers)
    me.apply_(model, edit)
    found["edited logits"] = logits(model)
    me.undo_(model, edit)
    assert all(torch.equal(model.projection(layer), weight) for layer, weight in weights.items())
    assert model.weights_hash() == before, "undone, bit for bit"
    return found


def save_results(folders: Sequence[Path], refused: Sequence[Path]) -> None:
    """Save, in each folder, what this process finds for the split model there; and why others are refused."""
    for folder in folders:
        save_result(folder, folder)
    for folder in refused:
        try:
            me.load_model(folder, tp=True)
        except InputError as error:
            (folder / "refused.txt").write_text(str(error))


def save_result(source: Path, folder: Path, **arguments: Any) -> None:
    """Save what this process finds for one split model; the arguments are those of `results`."""
    model = me.load_model(source, tp=True)
    with torch.no_grad():
        own = sum(getattr(weight, "_local_tensor", weight).numel() for _, weight in model.named_parameters())
    found = {"hash": model.weights_hash(), "numbers here": own, **results(model, **arguments)}
    torch.save(found, folder / f"rank_{torch.distributed.get_rank()}.pt")


def check_equal(model: Any, expected: dict[str, Tensor], ranks: Sequence[dict[str, Any]]) -> None:
    """Hold what the processes of a split model found against what one process has found for the whole one."""
    size, count = sum(parameter.numel() for _, parameter in model.named_parameters()), len(ranks)
    assert expected.pop("largest float64") >= model.d_mlp**2, "one process has whole moments and systems"
    for found in ranks:
        assert found.pop("hash") == model.weights_hash()
        # Norms and, in Qwen2, nothing else are whole in every process.
        assert size / count <= found.pop("numbers here") < 1.1 * size / count
        # Rows of moments and systems; and a layer's weights, which an edit adds to in float64.
        rows, weights = model.d_mlp**2 / count, model.d_mlp * model.d_model
        assert rows <= found.pop("largest float64") <= max(rows, weights) < model.d_mlp**2
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            difference = (found[key] - value).abs().max()
            assert difference <= 1e-5 * value.abs().max().clamp_min(1), (key, difference)
        assert all(torch.equal(found[key], ranks[0][key]) for key in expected), "the processes agree bit for bit"
    assert not torch.allclose(expected["edited logits"], expected["logits"], atol=1e-2)
    assert expected["effects"].std() > 1e-2
