"""Adapters of PEFT (LoRA and its kin): found on a loaded model or in a folder, and merged into a copy on request.

A model that carries an adapter is not the plain one that mechedit edits: transformers saves the adapter alone, so an
export would lack the edit, and TransformerLens and nnsight may pass the adapter by. Merging adds the adapter's product
to the matrices that it adapts, W + s · B A, after which the model is a plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechedit.errors import InputError, first_line
from mechedit.files import read_object
from mechedit.models.shared_copy import share_parameters

_WIDTH = 8
"""Tokens of the run that compares a merged model with the model that carries the adapter."""


def adapter_modules(hf: Any) -> list[str]:
    """Names of the modules that an adapter wraps or replaces, without those inside of them."""
    names = [name for name, module in hf.named_modules() if _is_of_peft(module)]
    return [name for name in names if not any(name.startswith(f"{outer}.") for outer in names)]


def refuse_adapter(hf: Any, name: str) -> None:
    """Refuse a loaded model that carries an adapter.

    Raises:
        InputError: says where the adapter is, and how to merge it.
    """
    if _is_of_peft(hf):
        what = f"is a {type(hf).__name__}"
    elif modules := adapter_modules(hf):
        what = f"carries an adapter (in {len(modules)} modules, such as {modules[0]!r})"
    elif getattr(hf, "_hf_peft_config_loaded", False):
        what = "carries an adapter"
    else:
        return
    raise InputError(
        f"the model {name!r} {what}, so that an edit would be saved without its weights; expected a plain model: "
        f"pass merge_adapter=True to edit a copy with the adapter merged, or merge it first (merge_and_unload)"
    )


def carries_adapter(hf: Any) -> bool:
    """Whether a loaded model is a PEFT model, or has modules that an adapter replaced."""
    return _is_of_peft(hf) or bool(adapter_modules(hf)) or bool(getattr(hf, "_hf_peft_config_loaded", False))


@torch.no_grad()
def merged(hf: Any, name: str) -> Any:
    """A copy of a model with its adapter merged: the adapted matrices are new, all other weights are shared.

    The model that was passed stays as it is. Merging is checked: the copy gives the same logits.

    Raises:
        InputError: the adapter cannot be merged (such as prompt tuning), or the merged model gives other logits (such
            as an adapter that is switched off).
    """
    plain = hf.get_base_model() if _is_of_peft(hf) else hf
    modules = adapter_modules(plain)
    if not modules:
        raise InputError(
            f"the adapter of {name!r} changes no module of the model ({_kind(hf)}), so it cannot be merged; expected "
            f"an adapter of weights, such as LoRA: edit the base model instead"
        )
    expected = _logits(share_parameters(hf))
    merged_copy = share_parameters(plain)
    for module in modules:
        merged_copy.set_submodule(module, _merged_module(merged_copy.get_submodule(module), module, name))
    # The last of them, which `load_adapter` sets, would rename weights on saving as if they were the adapter's.
    for attribute in ("peft_config", "_hf_peft_config_loaded", "_weight_conversions"):
        merged_copy.__dict__.pop(attribute, None)
    _untie_if_apart(merged_copy)
    # No checkpoint holds these weights.
    merged_copy.name_or_path = merged_copy.config.name_or_path = ""
    actual = _logits(merged_copy)
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    if not (actual - expected).float().norm() <= tolerance * expected.float().norm():
        raise InputError(
            f"with its adapter merged, {name!r} gives other logits than with the adapter beside it; expected the "
            f"same: switch the adapter on (set_adapter, enable_adapters), or merge it yourself (merge_and_unload)"
        )
    return merged_copy.train(plain.training)


@torch.no_grad()
def logits_with_adapter(hf: Any, folder: Path, ids: Int[Tensor, "1 pos"]) -> Float[Tensor, "1 pos vocab"] | None:
    """Logits of a model with an adapter from a folder on it, in float32; None if PEFT is not installed.

    PEFT puts it on a copy that shares the weights.
    """
    try:
        from peft import PeftModel
    except ImportError:
        return None
    adapted = PeftModel.from_pretrained(share_parameters(hf), folder).eval()
    ids = ids.to(hf.get_input_embeddings().weight.device)
    return adapted(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float().cpu()


def load_adapter(location: str, load_base: Callable[[str], Any]) -> Any:
    """The base model of an adapter's folder or hub name, with the adapter on it.

    Args:
        location: holds adapter_config.json.
        load_base: loads a base model by its folder or hub name.

    Raises:
        InputError: PEFT is not installed, or the adapter does not name its base model.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(
            f"{location!r} is an adapter, and merging it needs PEFT, which is not installed: pip install peft"
        ) from error
    return PeftModel.from_pretrained(load_base(base_of(location)), location)


def base_of(location: str) -> str:
    """The folder or hub name of an adapter's base model.

    Raises:
        InputError: the adapter does not name it.
    """
    path = adapter_config(location)
    assert path is not None, location
    base = read_object(path).get("base_model_name_or_path")
    if not base:
        raise InputError(
            f"the adapter {location!r} does not name its base model (base_model_name_or_path in "
            f"adapter_config.json); expected a folder or hub name: write it there"
        )
    return str(base)


def adapter_config(location: str) -> str | None:
    """Path of the adapter_config.json in a folder or of a hub name; None where there is none."""
    from transformers.utils.peft_utils import find_adapter_config_file

    return find_adapter_config_file(location)


def _is_of_peft(module: nn.Module) -> bool:
    return any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__)


def _kind(hf: Any) -> str:
    """The adapter's type, as PEFT calls it."""
    configs = getattr(hf, "peft_config", None) or {}
    kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()}
    return ", ".join(sorted(kinds)) or "of an unknown type"


def _merged_module(module: Any, path: str, name: str) -> nn.Module:
    """The plain module in place of an adapted one, with weights of its own."""
    try:
        if hasattr(module, "unload_and_optionally_merge_module"):
            # A module that the adapter holds a full copy of.
            return module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        base = module.get_base_layer()
        for key, parameter in list(base.named_parameters(recurse=False)):
            setattr(base, key, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        module.merge(safe_merge=True)
        return module.get_base_layer()
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise InputError(
            f"the adapter of {name!r} cannot be merged into {path!r} ({first_line(error)}); expected an adapter "
            f"of weights, such as LoRA: edit the base model instead"
        ) from error


def _untie_if_apart(hf: Any) -> None:
    """Say in the config that the unembedding is no longer the embedding, where only one of them was adapted."""
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        hf.config.tie_word_embeddings = False


def _logits(hf: Any) -> Tensor:
    """Logits of a row of random ids."""
    embedding = hf.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(embedding), (1, _WIDTH), generator=generator, device="cpu").to(embedding.device)
    return hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
