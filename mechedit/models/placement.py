"""On which device and in which dtype weights are, or are to be."""

from __future__ import annotations

from typing import Any

import torch

from mechedit.errors import InputError, brief, check_choice, first_line
from mechedit.models.weights_hash import DTYPES


def find_device(device: str | torch.device | None) -> torch.device:
    """The device of this name; by default the accelerator when there is one, else the CPU.

    Raises:
        InputError: it does not exist or work, or holds no numbers.
    """
    if str(device).partition(":")[0] == "meta":
        raise InputError(
            "the device is 'meta', which holds no numbers; expected cpu or an accelerator of this machine: choose "
            "another with --device"
        )
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        # An empty tensor there shows that the device exists and works.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"the device {brief(str(device))} cannot be used ({first_line(error)}); expected cpu or an "
            f"accelerator of this machine: choose another with --device"
        ) from error


def device_map_of(device: torch.device, spread: bool) -> Any:
    """Where transformers puts weights while it reads them; None for the CPU, where it puts them by itself."""
    if device.type == "cpu":
        return None
    return "auto" if spread else {"": device}


def find_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of this name, if one is given.

    Raises:
        InputError: it is not one that weights are loaded in.
    """
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    check_choice("the dtype", name, DTYPES)
    return DTYPES[name]


def check_in_memory(hf: Any) -> None:
    """Refuse weights that are elsewhere: an edit in place would not reach them.

    Raises:
        InputError: some are on the device meta.
    """
    if any(parameter.is_meta for parameter in hf.parameters()):
        raise InputError(
            "the loaded model has weights without data (on the device 'meta'), as when offloaded to disk; "
            "expected all of them in memory: load it without offloading, in a smaller dtype or on more devices"
        )


def check_loaded(hf: Any, device: Any, dtype: torch.dtype | None) -> None:
    """A loaded model belongs to the caller: refuse to move or convert it.

    Raises:
        InputError: it is elsewhere, or in another dtype, than was asked for; or it cannot be written to.
    """
    check_in_memory(hf)
    if any(parameter.is_inference() for parameter in hf.parameters()):
        raise InputError(
            "the loaded model was made under torch.inference_mode(), so its weights cannot be written to outside of "
            "it and give no gradients; expected ordinary weights: load it before, or pass its name or folder"
        )
    weight = hf.get_input_embeddings().weight
    if (device and device != weight.device) or (dtype and dtype != weight.dtype):
        raise InputError(
            f"the loaded model is {weight.dtype} on {weight.device}, but dtype {dtype} on device {device} "
            f"was asked for; a loaded model is used where it is: call .to(...) on it first"
        )
