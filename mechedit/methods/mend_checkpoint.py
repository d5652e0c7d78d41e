"""The checkpoint of MEND's training, which lies beside the editor's file until the training has ended.

It holds the network as it is now and as it was best in validation, Adam's moments, and in its header the step, the
curve of validations, and what the training was made with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Required

import torch
from torch import Tensor

from mechedit.errors import InputError, check_finite
from mechedit.files import read_tensors, write_tensors
from mechedit.methods.mend_editor import METADATA_KEY, EditorNetwork, MendRecord, network_of
from mechedit.provenance import check_provenance
from mechedit.records import Whole, check_record

_STATE = ".training"
"""Between the name of an editor's file and its suffix, in the name of its training's checkpoint."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments, as torch calls them."""


class StateRecord(MendRecord, total=False):
    """The header of a training's checkpoint."""

    made_with: Required[str]
    step: Required[Whole]


def state_path(path: Path) -> Path:
    """The checkpoint of an editor's training."""
    return path.with_name(f"{path.stem}{_STATE}{path.suffix or '.safetensors'}")


def copied(network: EditorNetwork) -> dict[str, Tensor]:
    """A network's state on the CPU, which later steps leave as it is."""
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def write_checkpoint(
    path: Path,
    header: Mapping[str, Any],
    network: EditorNetwork,
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a network, the best one, and Adam's moments.

    Args:
        path: of the file.
        header: as `StateRecord`.
        network: as it is now.
        best: the state of the one that was best in validation.
        optimizer: Adam, of the network's parameters.
    """
    tensors = {f"now.{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for name, parameter in network.named_parameters():
        for moment in _MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    write_tensors(path, tensors, METADATA_KEY, dict(header))


def read_checkpoint(
    path: Path,
    expected: Mapping[str, Any],
    remedy: str,
    network: EditorNetwork,
    optimizer: torch.optim.Optimizer,
) -> tuple[StateRecord, dict[str, Tensor]]:
    """Put a network and its optimizer back to where they were.

    Args:
        path: of the file.
        expected: what its header must hold.
        remedy: what to do where it holds something else.
        network: becomes as it was.
        optimizer: Adam, gets its moments of the network's parameters.

    Returns:
        The header, and the state of the network that was best in validation.

    Raises:
        InputError: it is of another model or of other settings, or damaged.
    """
    tensors, header = read_tensors(path, METADATA_KEY)
    check_record(header, StateRecord, f"the record of {str(path)!r}", "remove the file")
    check_provenance(header, expected, f"the training {str(path)!r}", remedy)
    parts = {part: _part(tensors, f"{part}.") for part in ("now", "best", *_MOMENTS)}
    network.load_state_dict(network_of(parts["now"], header, path).state_dict())
    best = copied(network_of(parts["best"], header, path))
    for name, value in tensors.items():
        check_finite(f"the values of {name!r:.80} in {str(path)!r}", value)
    for name, parameter in network.named_parameters():
        moments = {moment: parts[moment].get(name) for moment in _MOMENTS}
        if any(value is None or value.shape != parameter.shape for value in moments.values()):
            raise InputError(f"{str(path)!r} lacks Adam's moments of {name!r}, expected them; remove the file")
        optimizer.state[parameter] = {
            "step": torch.tensor(float(header["step"])),
            **{moment: value.to(parameter.device) for moment, value in moments.items() if value is not None},
        }
    return header, best


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
