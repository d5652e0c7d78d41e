"""What the steps give on a model, to be compared between one whose weights are whole and one that is split."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

import mechedit as me
from helpers.edits import logits
from helpers.largest_tensor import LargestTensor
from helpers.matrices import random_matrix
from helpers.models import SENTENCES
from mechedit.edit.weights import copy_weights, rounded_sum
from mechedit.errors import InputError
from mechedit.methods.rules import Ridge
from mechedit.methods.settings import SpreadConfig
from mechedit.methods.spread import spread
from mechedit.solve.row_blocks import plus_identity
from mechedit.split_tensors import rows_of, whole
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
SHORT = sorted(set(WORDS), key=lambda word: (len(word), word))
MANY = [me.EditRequest(id=word, subject=word, prompt="{} is", target_new="plays") for word in SHORT[:24]]
MANY_PREFIXES = ["{}", *(f"{word} {{}}" for word in SHORT[:5])]
"""So many that their keys outnumber all else that spreading holds."""


def results(model: Any, layers: Sequence[int] = LAYERS, texts: Sequence[str] = TEXTS) -> dict[str, Tensor]:
    """Logits, effects, moments, keys, z, ΔW, and logits under the edit, applied and undone."""
    before = model.weights_hash()
    effects = trace_group(model, [tokenize_fact(model, FACT)], 1.0, TRACE)["effect"]
    found = {"logits": logits(model), "effects": torch.tensor(effects.to_numpy())}
    with LargestTensor([torch.float64]) as largest:
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
    keys = me.edit_keys(model, REQUESTS, edit)
    found |= {f"keys {layer}": whole(matrix) for layer, matrix in keys.items()}
    weights = copy_weights(model, layers)
    me.apply_(model, edit)
    found["edited logits"] = logits(model)
    second, found["largest of many"] = edit_with_many(
        model, targets, Ridge(moments=regular, weight=1.0, previous=keys), layers
    )
    found |= {f"second delta {layer}": second.delta(layer) for layer in layers}
    me.apply_(model, second)
    found["logits of both"] = logits(model)
    me.undo_(model, second)
    assert torch.equal(logits(model), found["edited logits"])
    me.undo_(model, edit)
    assert all(torch.equal(model.projection(layer), whole(weight)) for layer, weight in weights.items())
    assert model.weights_hash() == before, "undone, bit for bit"
    # Sums in half precision are rounded by random numbers that follow all rows, 1,024 at a time.
    half, delta = random_matrix(2400, 4).bfloat16(), 1e-2 * random_matrix(2400, 4, seed=1)
    found["half"] = whole(rounded_sum(rows_of(half, model.mesh), [delta], "the sum", mesh=model.mesh))
    return found


def edit_with_many(model: Any, targets: me.Targets, rule: Ridge, layers: Sequence[int]) -> tuple[me.Edit, Tensor]:
    """An edit of many facts on a model to which one is applied, and the numbers in the largest tensor meanwhile."""
    shape, ids = (len(MANY), model.d_model), tuple(request.id for request in MANY)
    z = targets.z.mean(0) + targets.z.std() * random_matrix(*shape).to(targets.z)
    provenance = {**targets.provenance, "model": model.provenance()}
    many = dataclasses.replace(targets, z=z, initial=z, ids=ids, provenance=provenance)
    with LargestTensor() as largest:
        result = spread(model, MANY, many, layers, rule, prefixes=MANY_PREFIXES, config=SpreadConfig(batch_size=8))
    return result.edit, torch.tensor(largest.numbers)


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
        assert found.pop("largest float64") == model.d_mlp**2 / count, "rows of moments and of systems"
        assert found.keys() == expected.keys()
        for key in expected.keys() - {"largest of many"}:
            difference = (found[key] - expected[key]).abs().max()
            assert difference <= 1e-5 * expected[key].abs().max().clamp_min(1), (key, difference)
        assert all(torch.equal(found[key], ranks[0][key]) for key in expected), "the processes agree bit for bit"
    for before, after in pairwise(("logits", "edited logits", "logits of both")):
        assert not torch.allclose(expected[before], expected[after], atol=1e-2)
    assert expected["effects"].std() > 1e-2


def check_held(model: Any, expected: dict[str, Tensor], ranks: Sequence[dict[str, Any]]) -> None:
    """Hold what each process had in memory of the keys of many facts against what one process has for the whole model.

    The model must be so narrow that these keys outnumber its weights and the states of a batch.
    """
    keys = len(MANY) * len(MANY_PREFIXES) * model.d_mlp
    assert expected["largest of many"] == keys, "all of them"
    for found in ranks:
        # Its part of the keys behind all prefixes, or the projection's outputs there, of at most 256 facts at a time.
        assert found["largest of many"] == max(keys / len(ranks), keys / model.d_mlp * model.d_model) < keys
