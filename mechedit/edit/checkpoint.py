"""The edited model as a plain checkpoint."""

from __future__ import annotations

from pathlib import Path

from mechedit.artifacts import atomic_folder, write_json
from mechedit.edit.applied import edited
from mechedit.edit.value import Edit
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
        model.hf.save_pretrained(temporary)
        model.tokenizer.save_pretrained(temporary)
        write_json(temporary / MANIFEST, dict(edit.manifest))
