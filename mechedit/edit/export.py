"""Export an edit for other libraries: the edited model as a plain checkpoint, or the edit as a LoRA adapter.

Both are read back and held against the model in memory before they appear at their destination.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechedit.atomic import atomic_folder
from mechedit.batching import pad
from mechedit.edit.applied_edits import applied_edits, exact_weights, restoring
from mechedit.edit.apply_undo import check_model, edited
from mechedit.edit.combine import truncate
from mechedit.edit.edit import Edit, Factors
from mechedit.edit.weights import HALF, projection_parameter, rounded_sum
from mechedit.errors import InputError, brief, check_choice, check_finite
from mechedit.files import write_json
from mechedit.locks import locked
from mechedit.models import DTYPES, MODULES, Model, exclusive
from mechedit.models.saving import is_checkpoint_file
from mechedit.notices import warn
from mechedit.paths import checked_path

MANIFEST = "mechedit.json"
"""File name of the edit's manifest in an export's folder."""
_ADAPTER_FILES = (MANIFEST, "adapter_model.safetensors", "adapter_config.json")
MOST_ROUNDING = 0.1
"""Largest change of an edit's effect by rounding, relative to the effect, that goes without a warning."""


@exclusive
def export(
    model: Model,
    edit: Edit,
    folder: str | Path,
    *,
    overwrite: bool = False,
    dtype: str | torch.dtype | None = None,
) -> None:
    """Write the edited model and its tokenizer as a plain checkpoint, and the manifest beside them.

    `AutoModelForCausalLM.from_pretrained(folder)` loads it. The folder appears complete or not at all, and the
    model in memory is left as it was. What was written is read back and compared with the edited model, weights and
    logits, before it appears; that takes the memory of a second model, in the checkpoint's dtype.

    Weights keep the dtype of the checkpoint that the model was loaded from. Where that is a half precision and the
    model in memory is not, edited weights are summed exactly and rounded once, stochastically
    (`mechedit.edit.weights`), so that the edit is not rounded away: the bits are those of the edit on the model in that
    dtype.

    Args:
        model: that the edit was made for.
        edit: to write.
        folder: absent or empty.
        overwrite: replace an earlier export in `folder`; with anything else beside it, that is refused.
        dtype: of the written weights, such as float32; by default the checkpoint's.

    Warns:
        UserWarning: rounding changes the logits of one of the edit's prompts by more than a tenth of what the edit
            does there.

    Raises:
        InputError: the edit was made for other weights; the folder is not empty, or cannot be created; an unknown
            dtype, or one that does not hold the weights; what was read back is not the edited model.
    """
    target, text = _dtype(dtype, model), _edited_prompt(edit)
    if overwrite:
        _check_replaceable(folder, model)
    with _only_export(folder, overwrite) as temporary, contextlib.ExitStack() as stack:
        check_model(model, edit)
        rounded = _rounded(model, edit, target)
        unedited = _last_logits(model, text) if rounded else None
        stack.enter_context(edited(model, edit))
        if rounded:
            exact = _last_logits(model, text)
            stack.enter_context(_written(model, rounded))
            _warn_of_rounding(unedited, exact, _last_logits(model, text), target)
        model.save_pretrained(temporary, dtype=target, text=text)
        write_json(temporary / MANIFEST, dict(edit.manifest))


@contextlib.contextmanager
def _only_export(folder: str | Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder`, which no other process writes meanwhile."""
    folder = checked_path(folder).resolve()
    with (
        locked(folder, f"the export {str(folder)!r}"),
        atomic_folder(folder, replaces=MANIFEST if overwrite else None) as temporary,
    ):
        yield temporary


def _check_replaceable(folder: str | Path, model: Model) -> None:
    """Refuse an earlier export's folder that also holds what no export writes: it would go with the export.

    Raises:
        InputError: names what would be lost.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return
    present = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    others = [
        str(path)
        for path in present
        if str(path) not in _ADAPTER_FILES and not is_checkpoint_file(path, model.tokenizer)
    ]
    if others:
        raise InputError(
            f"{str(folder)!r} holds {', '.join(map(repr, others[:3]))}{' and more' if len(others) > 3 else ''} beside "
            f"an earlier export, expected nothing else in a folder that is replaced: move it away, or choose another "
            f"folder"
        )


def _dtype(dtype: str | torch.dtype | None, model: Model) -> torch.dtype:
    """The dtype to write.

    Raises:
        InputError: it is not known.
    """
    if dtype is None:
        return model.checkpoint_dtype
    name = str(dtype).removeprefix("torch.")
    check_choice("the dtype", name, DTYPES)
    return DTYPES[name]


def _edited_prompt(edit: Edit) -> str | None:
    """A prompt of the edit's facts, without the object; None if its manifest tells none."""
    facts = edit.manifest.get("facts") or ()
    return str(facts[0]).rpartition(" → ")[0] or None if facts else None


def _rounded(model: Model, edit: Edit, dtype: torch.dtype) -> dict[str, dict[int, Tensor]]:
    """All edited matrices, this edit included, in a half precision that the model in memory does not have.

    Empty where the model's own dtype is written, or a half precision is in memory.
    """
    if dtype not in HALF or model.dtype in (dtype, *HALF):
        return {}
    matrices: dict[str, dict[int, Tensor]] = {}
    for module in MODULES:
        deltas = edit.factors if module == edit.module else {}
        applied = {
            layer for entry in applied_edits(model) if entry.edit.module == module for layer in entry.edit.layers
        }
        if not deltas and not applied:
            continue
        view = model.writing(module)
        matrices[module] = {}
        for layer in sorted(applied | set(deltas)):
            base, edits = exact_weights(view, layer)
            added = [*edits, edit] if layer in deltas else edits
            sums = (item.delta(layer) for item in added)
            matrices[module][layer] = rounded_sum(base, sums, f"layer {layer}", dtype)
    return matrices


@contextlib.contextmanager
def _written(model: Model, matrices: Mapping[str, Mapping[int, Tensor]]) -> Iterator[None]:
    """Hold rounded matrices in the model until the block ends."""
    with contextlib.ExitStack() as stack, torch.no_grad():
        for module, layers in matrices.items():
            view = model.writing(module)
            stack.enter_context(restoring(view, list(layers)))
            for layer, matrix in layers.items():
                view.write_projection_(layer, matrix)
        yield


def _last_logits(model: Model, text: str | None) -> Tensor | None:
    """Next-token logits after a prompt; None without one."""
    if text is None:
        return None
    tokens = pad([model.tokenizer(text)["input_ids"]], model.tokenizer, model.device)
    with torch.no_grad():
        return model.run(tokens).logits[0, -1].double().cpu()


def _warn_of_rounding(
    unedited: Tensor | None, exact: Tensor | None, rounded: Tensor | None, dtype: torch.dtype
) -> None:
    """Say which share of the edit's effect on its prompt rounding takes or adds, if it is more than a tenth."""
    if unedited is None or exact is None or rounded is None or not (effect := float((exact - unedited).norm())):
        return
    error = float((rounded - exact).norm()) / effect
    if error > MOST_ROUNDING:
        warn(
            f"in {dtype} rounding changes what the edit does to the logits of its first prompt by {error:.0%}; "
            f"evaluate the exported model, or export it in float32 (dtype, --dtype)"
        )


@exclusive
def export_lora(
    model: Model, edit: Edit, folder: str | Path, *, overwrite: bool = False, rank: int | None = None
) -> Edit:
    """Write `edit` as a LoRA adapter in float32: adapter_model.safetensors, adapter_config.json and the manifest.

    `PeftModel.from_pretrained(base, folder)` puts it on the unedited model, which the config names as
    `base_model_name_or_path`. Only the edited layers are targeted, each with its own rank. A rank above the full rank
    of the matrix is first truncated to it, which is exact. The folder appears complete or not at all, and the model in
    memory is not changed. PEFT itself is not needed; where it is installed, it reads the adapter back before that
    appears, and must give the edited model's logits.

    Args:
        model: that the edit was made for.
        edit: to write.
        folder: absent or empty.
        overwrite: replace an earlier export in `folder`; with anything else beside it, that is refused.
        rank: of all layers alike, as engines that serve adapters want it (vLLM reads no rank by layer, and takes 8, 16,
            32, 64, 128, 256, 320 and 512): an update of higher rank is truncated to the nearest of this rank
            (`truncate`), one of lower rank is filled up with zeros.

    Returns:
        The edit that was written; `truncated` in its manifest says what each layer lost.

    Raises:
        InputError: the edit was made for other weights, or a layer has rank 0; a rank below 1, or above that of the
            matrix; the folder is not empty, or cannot be
            created; what was read back is not the edit.
    """
    if overwrite:
        _check_replaceable(folder, model)
    with _only_export(folder, overwrite) as temporary:
        check_model(model, edit)
        full_rank = min(model.d_key, model.d_model)
        if rank is not None:
            if not 1 <= rank <= full_rank:
                raise InputError(
                    f"the rank is {rank}, expected 1 to {full_rank}, that of the matrices of {model.name!r}; choose "
                    f"another"
                )
            edit = truncate(edit, rank)
        if max(factors.rank for factors in edit.factors.values()) > full_rank:
            edit = truncate(edit, full_rank)
        modules = {layer: _projection_module(model, layer) for layer in edit.layers}
        tensors = {}
        for layer, (name, _) in modules.items():
            a, b = _lora_matrices(edit.factors[layer], layer)
            if rank is not None:
                a, b = _filled(a, rank, dim=0), _filled(b, rank, dim=1)
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "adapter_config.json", _lora_config(model, edit, modules, rank))
        _check_lora(model, edit, temporary, modules)
        write_json(temporary / MANIFEST, dict(edit.manifest))
    return edit


def _filled(matrix: Tensor, rank: int, *, dim: int) -> Tensor:
    """A factor with zeros up to a rank."""
    missing = list(matrix.shape)
    missing[dim] = rank - missing[dim]
    return torch.cat([matrix, matrix.new_zeros(missing)], dim).contiguous()


def _check_lora(model: Model, edit: Edit, folder: Path, modules: Mapping[int, tuple[str, bool]]) -> None:
    """Read an adapter back: its products are the edit's ΔW, and PEFT, where it is installed, gives the edited logits.

    Raises:
        InputError: names what differs.
    """
    tensors = load_file(folder / "adapter_model.safetensors")
    for layer, (name, _) in modules.items():
        a, b = (tensors.get(f"base_model.model.{name}.lora_{side}.weight") for side in "AB")
        delta = edit.delta(layer).cpu()
        product = torch.zeros_like(delta) if a is None or b is None else (b.double() @ a.double()).T
        if not (product - delta).norm() <= 1e-3 * delta.norm():
            raise _lossy(f"its product for layer {layer} is not the edit's")
    text = _edited_prompt(edit) or "The Eiffel Tower is in the city of"
    tokens = pad([model.tokenizer(text)["input_ids"]], model.tokenizer, model.device)
    adapted = model.logits_with_adapter(folder, tokens.ids)
    if adapted is None:
        return
    with edited(model, edit), torch.no_grad():
        expected = model.run(tokens).logits.float().cpu()
    error = float((adapted - expected).norm() / expected.norm())
    if not error <= (5e-2 if model.dtype in HALF else 2e-3):
        raise _lossy(f"PEFT's logits on {brief(text)} differ by {error:.2g} of their norm")


def _lossy(what: str) -> InputError:
    return InputError(
        f"the adapter that was written is not the edit: {what}; nothing was left at the destination. Export a "
        f"checkpoint instead, or report it with the model's name and PEFT's version"
    )


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


def _lora_config(model: Model, edit: Edit, modules: Mapping[int, tuple[str, bool]], rank: int | None) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig; with a rank, that of all layers, they name none by layer."""
    names = {layer: name for layer, (name, _) in modules.items()}
    ranks = {} if rank is not None else {name: edit.factors[layer].rank for layer, name in names.items()}
    largest_rank = rank or max(ranks.values())
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
