"""MEND (Mitchell et al., 2022): edits that a network, trained on edits of the model at hand, makes of gradients.

The network is `mechedit.methods.mend_editor`, its training `mechedit.methods.mend_training`. Three things differ from
the paper and its code. As by every method here, the down-projections of the layers alone are edited, where the paper
edits both matrices of the last three blocks' MLPs. Means and deviations of what goes in are those of each layer over
the training's requests, measured before it, where the code has running ones of all layers. And α Σ_t ũ_t δ̃_tᵀ is taken
from W as in the paper; the code adds it, and leaves the sign to be learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from mechedit.bounds import check_numbers
from mechedit.edit import Edit, Factors
from mechedit.errors import InputError, check_positive
from mechedit.methods.gradient_factors import gradient_factors
from mechedit.methods.manifest import edit_manifest
from mechedit.methods.mend_editor import REMEDY, EditorNetwork, MendEditor, find_editor, read_editor_record
from mechedit.methods.method import EditTask, edit_method
from mechedit.methods.settings import MethodConfig
from mechedit.methods.training import TrainingRow, dense_factors, evaluate_loss, training_rows, unwritten
from mechedit.models import Model
from mechedit.prefixes import BARE, check_prefixes
from mechedit.provenance import value_hash


@dataclass(frozen=True, kw_only=True)
class MendConfig(MethodConfig):
    """Settings of MEND; all else is in the editor."""

    editor: str | None = None
    """File of the editor; by default that beside the model's checkpoint, or in the folder of tuned settings."""
    editor_hash: str | None = None
    """Hash of what the file says of the editor, which is filled in."""
    scale: float | int = 1.0
    """Factor of every ΔW, 1 in the papers."""

    milder: ClassVar[str] = "choose a smaller scale"
    preserves_keys: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("batch_size", "scale"):
            check_positive(name, getattr(self, name))
        content = None if self.editor is None else value_hash(read_editor_record(self.editor))
        object.__setattr__(self, "editor_hash", content)

    def default_prefixes(self, model: Model) -> tuple[str, ...]:
        """The bare prompt, as published."""
        return (BARE,)

    def suited(self, model: Model) -> tuple[MendConfig, tuple[int, ...] | None]:
        """The settings with the editor that is there for the model, and the layers that it edits."""
        path = self.editor or find_editor(model)
        if path is None:
            return self, None
        return replace(self, editor=str(path)), tuple(read_editor_record(path)["layers"])

    @property
    def record(self) -> dict[str, Any]:
        """The settings without the editor's path, which decides nothing."""
        return {name: value for name, value in super().record.items() if name != "editor"}

    def require_files(self, model: Model) -> None:
        """Refuse a model without an editor."""
        self._file(model)

    def _file(self, model: Model) -> str | Path:
        path = self.editor or find_editor(model)
        if path is None:
            raise InputError(f"there is no editor of MEND for {model.name!r}, expected one that was trained; {REMEDY}")
        return path

    def load_editor(self, model: Model, layers: Sequence[int]) -> MendEditor:
        """The editor.

        Raises:
            InputError: there is none, or it is of another model or of other layers.
        """
        path = self._file(model)
        editor = MendEditor.load(path)
        editor.require(model, path)
        if list(editor.layers) != list(layers):
            raise InputError(
                f"the editor {str(path)!r} was trained for the layers {list(editor.layers)}, expected {list(layers)}, "
                f"which are to be edited; edit its layers, or train one for these (mechedit train-mend --layers)"
            )
        return editor


@edit_method(MendConfig)
def mend(task: EditTask[MendConfig]) -> Edit:
    """Let a trained network make the edit of a gradient's factors (MEND; Mitchell et al., 2022): ΔW = −α Σ_t ũ_t δ̃_tᵀ.

    u and δ are those of −1/T Σ_t log P(o_t | prompt, o_1 … o_{t−1}) at every token of each prompt, on the model as it
    is; requests do not see one another, and the edit of several is the sum of theirs, behind several prefixes the mean.
    `mechedit train-mend` (`train_mend`) trains the network, for the layers given. The manifest's `editor` holds its
    hash, `unconverged` the requests whose new object is not the greedy answer to every prompt afterwards.
    """
    model, config = task.model, task.config
    editor = config.load_editor(model, task.layers)
    prefixes, provenance = check_prefixes(task.prefixes or config.default_prefixes(model)), model.provenance()
    rows = training_rows(model, task.requests, prefixes)
    network = editor.network.to(model.device)
    factors = edit_factors(model, network, rows, task.layers, config.batch_size, config.scale / len(prefixes))
    greedy = evaluate_loss(model, rows, Edit(factors=factors, manifest={}), config.batch_size)[1]
    manifest = {
        **edit_manifest(provenance, task.layers, task.requests, None, prefixes),
        "editor": {"hash": value_hash(editor.record), "steps": editor.record["steps"]},
        "unconverged": unwritten(task.requests, rows, greedy),
    }
    return Edit(factors=factors, manifest=manifest)


@torch.no_grad()
def edit_factors(
    model: Model,
    network: EditorNetwork,
    rows: Sequence[TrainingRow],
    layers: Sequence[int],
    batch_size: int,
    scale: float | int = 1.0,
) -> dict[int, Factors]:
    """ΔW of some rows: the sum of theirs, times a factor.

    Args:
        model: as it is before the edit.
        network: of the editor, on the model's device.
        rows: prompts with their objects.
        layers: of the editor.
        batch_size: rows per pass.
        scale: the factor.
    """
    sums: dict[int, Factors] = {}
    for start in range(0, len(rows), batch_size):
        of_batch = gradient_factors(model, rows[start : start + batch_size], layers, batch_size)
        for index, layer in enumerate(layers):
            parts = [network.factors(index, row[layer].keys, row[layer].gradients) for row in of_batch]
            parts = [Factors(left=part.left, right=scale * part.right) for part in parts]
            sums[layer] = _sum([sums[layer], *parts] if layer in sums else parts)
    return sums


def _sum(parts: Sequence[Factors]) -> Factors:
    """Factors of the sum: side by side, and dense where they would be larger than ΔW."""
    left, right = torch.cat([part.left for part in parts], 1), torch.cat([part.right for part in parts])
    if left.shape[1] <= min(len(left), right.shape[1]):
        return Factors(left=left, right=right)
    return dense_factors(left.double() @ right.double())
