"""What the steps give on a model, to be compared between one whose weights are whole and one that is split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

import mechedit as me
from helpers.edits import logits
from helpers.models import SENTENCES
from mechedit.edit.weights import copy_weights
from mechedit.errors import InputError
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


def results(model: Any) -> dict[str, Tensor]:
    """Logits, effects, moments, keys, z, ΔW, and logits under the edit, applied and undone."""
    import time

    print("loaded", time.process_time(), flush=True)
    before = model.weights_hash()
    effects = trace_group(model, [tokenize_fact(model, FACT)], 1.0, TRACE)["effect"]
    found = {"logits": logits(model), "effects": torch.tensor(effects.to_numpy())}
    config = me.MomentsConfig(max_length=16)
    moments = {
        layer: moment.matrix for layer, moment in me.collect_moments(model, SENTENCES, LAYERS, config=config).items()
    }
    found |= {f"moment {layer}": matrix for layer, matrix in moments.items()}
    targets = me.find_targets(model, REQUESTS, LAYERS[-1], PREFIXES, me.TargetConfig(**SETTINGS))
    found["z"] = targets.z
    # A few sentences have a singular second moment, which would enlarge the rounding.
    regular = {layer: matrix + torch.eye(len(matrix), dtype=matrix.dtype) for layer, matrix in moments.items()}
    edit = me.memit(
        model, REQUESTS, LAYERS, regular, config=me.MemitConfig(covariance_weight=1.0, **SETTINGS), prefixes=PREFIXES
    )
    found |= {f"delta {layer}": edit.delta(layer) for layer in LAYERS}
    weights = copy_weights(model, LAYERS)
    me.apply_(model, edit)
    found["edited logits"] = logits(model)
    me.undo_(model, edit)
    assert all(torch.equal(model.projection(layer), weight) for layer, weight in weights.items())
    assert model.weights_hash() == before, "undone, bit for bit"
    return found


def save_results(folders: Sequence[Path], refused: Sequence[Path]) -> None:
    """Save, in each folder, what this process finds for the split model there; and why others are refused."""
    import time

    for folder in folders:
        print(time.process_time(), flush=True)
        model = me.load_model(folder, tp=True)
        with torch.no_grad():
            own = sum(getattr(weight, "_local_tensor", weight).numel() for _, weight in model.named_parameters())
        found = {"hash": model.weights_hash(), "numbers here": own, **results(model)}
        torch.save(found, folder / f"rank_{torch.distributed.get_rank()}.pt")
    for folder in refused:
        try:
            me.load_model(folder, tp=True)
        except InputError as error:
            (folder / "refused.txt").write_text(str(error))
