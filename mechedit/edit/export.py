"""Export an edit for other libraries: the edited model as a plain checkpoint, or the edit as a LoRA adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mechedit.edit.apply_undo import check_model, edited
from mechedit.edit.combine import truncate
from mechedit.edit.edit import Edit, Factors
from mechedit.edit.weights import projection_parameter
from mechedit.errors import InputError, check_finite
from mechedit.files import atomic_folder, write_json
from mechedit.models import Model

MANIFEST = "mechedit.json"
"""File name of the edit's manifest in an export's folder."""


def export(model: Model, edit: Edit, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write the edited model and its tokenizer as a plain checkpoint, and the manifest beside them.

    `AutoModelForCausalLM.from_pretrained(folder)` loads it. The folder appears complete or not at all, and the
    model in memory is left as it was.

    Args:
        model: that the edit was made for.
        edit: to write.
        folder: absent or empty.
        overwrite: replace an earlier export in `folder`, but nothing else.

    Raises:
        InputError: the edit was made for other weights; the folder is not empty, or cannot be created.
    """
    with atomic_folder(folder, replaces=MANIFEST if overwrite else None) as temporary, edited(model, edit):
        model.save_pretrained(temporary)
        write_json(temporary / MANIFEST, dict(edit.manifest))


def export_lora(model: Model, edit: Edit, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write `edit` as a LoRA adapter in float32: adapter_model.safetensors, adapter_config.json and the manifest.

    `PeftModel.from_pretrained(base, folder)` puts it on the unedited model, which the config names as
    `base_model_name_or_path`. Only the edited layers are targeted, each with its own rank. A rank above the full rank
    of the matrix is first truncated to it, which is exact. The folder appears complete or not at all, and the model in
    memory is not changed. PEFT itself is not needed.

    Args:
        model: that the edit was made for.
        edit: to write.
        folder: absent or empty.
        overwrite: replace an earlier export in `folder`, but nothing else.

    Raises:
        InputError: the edit was made for other weights, or a layer has rank 0; the folder is not empty, or cannot be
            created.
    """
    with atomic_folder(folder, replaces=MANIFEST if overwrite else None) as temporary:
        check_model(model, edit)
        full_rank = min(model.d_key, model.d_model)
        if max(factors.rank for factors in edit.factors.values()) > full_rank:
            edit = truncate(edit, full_rank)
        modules = {layer: _projection_module(model, layer) for layer in edit.layers}
        tensors = {}
        for layer, (name, _) in modules.items():
            a, b = _lora_matrices(edit.factors[layer], layer)
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "adapter_config.json", _lora_config(model, edit, modules))
        write_json(temporary / MANIFEST, dict(edit.manifest))


def _projection_module(model: Model, layer: int) -> tuple[str, bool]:
    """The down-projection's module name, and whether its weight lies [in, out] as a Conv1D's does."""
    name, _, is_conv1d = projection_parameter(model, layer)
    return name.removesuffix(".weight"), is_conv1d


def _lora_matrices(factors: Factors, layer: int) -> tuple[Tensor, Tensor]:
    """LoRA's A [r, d_mlp] and B [d_model, r], with ΔWᵀ = B A.

    Raises:
        InputError: the rank is 0, or a value is not finite in float32.
    """
    if factors.rank == 0:
        raise InputError(f"the edit's layer {layer} has rank 0, expected at least 1; leave that layer out of the edit")
    a, b = factors.left.T.float(), factors.right.T.float()
    for matrix in (a, b):
        check_finite(f"the edit's layer {layer}: the values of its factors in float32", matrix)
    return a.cpu().contiguous(), b.cpu().contiguous()


def _lora_config(model: Model, edit: Edit, modules: Mapping[int, tuple[str, bool]]) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig."""
    names = {layer: name for layer, (name, _) in modules.items()}
    ranks = {name: edit.factors[layer].rank for layer, name in names.items()}
    largest_rank = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.checkpoint or model.name,
        "inference_mode": True,
        "r": largest_rank,
        "lora_alpha": largest_rank,
        # A scale α / r of 1 in every layer.
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": list(names.values()),
        "fan_in_fan_out": any(is_conv1d for _, is_conv1d in modules.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
