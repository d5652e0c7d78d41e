"""The edited model as a plain checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mechedit.edit.algebra import truncate
from mechedit.edit.apply import check_model, edited
from mechedit.edit.value import Edit, Factors
from mechedit.edit.weights import parameter_of
from mechedit.errors import InputError, check_finite
from mechedit.files import atomic_folder, write_json
from mechedit.models import Model

MANIFEST = "mechedit.json"
"""The edit's manifest, in the folder of an export."""


def export(model: Model, edit: Edit, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write the edited model and its tokenizer as a plain checkpoint, and the manifest beside them.

    `AutoModelForCausalLM.from_pretrained(folder)` loads it. The folder appears whole or not at all, and the
    model in memory is left as it was. `overwrite` replaces an earlier export, and nothing else.

    Raises:
        InputError: the edit was made for other weights; the folder holds something, or cannot be made.
    """
    with atomic_folder(folder, replaces=MANIFEST if overwrite else None) as temporary, edited(model, edit):
        model.save_pretrained(temporary)
        write_json(temporary / MANIFEST, dict(edit.manifest))


def export_lora(model: Model, edit: Edit, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write `edit` as a LoRA adapter in float32: adapter_model.safetensors, adapter_config.json and the manifest.

    `PeftModel.from_pretrained(base, folder)` puts it on the unedited model, which the config names as
    `base_model_name_or_path`. Only the edited layers are targeted, each with its own rank. A rank above the matrix's
    own is first brought down to that, which loses nothing. The folder appears whole or not at all, and the model in
    memory is not changed. `overwrite` replaces an earlier export, and nothing else. PEFT itself is not needed.

    Raises:
        InputError: the edit was made for other weights, or a layer has no terms; the folder holds something, or
            cannot be made.
    """
    with atomic_folder(folder, replaces=MANIFEST if overwrite else None) as temporary:
        check_model(model, edit)
        full = min(model.d_key, model.d_model)
        if max(factors.rank for factors in edit.factors.values()) > full:
            edit = truncate(edit, full)
        modules = {layer: _module(model, layer) for layer in edit.layers}
        tensors = {}
        for layer, (name, _) in modules.items():
            down, up = _adapter(edit.factors[layer], layer)
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "adapter_config.json", _config(model, edit, modules))
        write_json(temporary / MANIFEST, dict(edit.manifest))


def _module(model: Model, layer: int) -> tuple[str, bool]:
    """The down-projection's module name, and whether its weight lies [in, out] as a Conv1D's does."""
    name, _, conv = parameter_of(model, layer)
    return name.removesuffix(".weight"), conv


def _adapter(factors: Factors, layer: int) -> tuple[Tensor, Tensor]:
    """A [r, d_mlp] and B [d_model, r]."""
    if factors.rank == 0:
        raise InputError(f"the edit's layer {layer} has rank 0, expected at least 1; leave that layer out of the edit")
    for side in (down := factors.left.T.float()), (up := factors.right.T.float()):
        check_finite(f"the edit's layer {layer}: the values of its factors in float32", side)
    return down.cpu().contiguous(), up.cpu().contiguous()


def _config(model: Model, edit: Edit, modules: Mapping[int, tuple[str, bool]]) -> dict[str, Any]:
    """What PEFT calls a LoraConfig."""
    names = {layer: name for layer, (name, _) in modules.items()}
    ranks = {name: edit.factors[layer].rank for layer, name in names.items()}
    highest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.checkpoint or model.name,
        "inference_mode": True,
        "r": highest,
        "lora_alpha": highest,
        # A scale α / r of 1 in every layer.
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": list(names.values()),
        "fan_in_fan_out": any(conv for _, conv in modules.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
