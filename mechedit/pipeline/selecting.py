"""The step that selects layers from a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mechedit import ranks
from mechedit.errors import InputError
from mechedit.locks import locked
from mechedit.provenance import value_hash
from mechedit.run_folder import RunFolder, check_step, sweep_run_folder
from mechedit.selection import SelectConfig, Selection, select_layers
from mechedit.tables import read_table


def select_step(folder: RunFolder, config: SelectConfig, *, save: bool = True) -> Selection:
    """Select layers from the folder's effects and write selection.json.

    Args:
        folder: in which facts were traced.
        config: the rule and its settings.
        save: whether to write at once; not where `validate_step` follows, which may refuse, and then writes.

    Raises:
        InputError: the folder holds no effects, not those that selection needs, or damaged ones; another process
            selects layers there, by other settings.
    """

    def select() -> Selection:
        if not save:
            return _select(folder, config)
        with selecting(folder, {"settings": asdict(config)}):
            selection = _select(folder, config)
            selection.save(folder.path / "selection.json")
        return selection

    return ranks.current().from_first(select, "the selection of layers")


def selecting(folder: RunFolder, made_with: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Be the only process that selects layers in a folder; one that does so by the same input waits."""
    if not ranks.current().is_first:
        return contextlib.nullcontext()
    what = f"the selection in {str(folder.path)!r}"
    return locked(folder.path / "selection.json", what, made_with=value_hash(made_with))


def _select(folder: RunFolder, config: SelectConfig) -> Selection:
    """Select layers from the folder's effects."""
    sweep_run_folder(folder.path)
    file = folder.path / "effects.parquet"
    if not file.is_file():
        raise InputError(
            f"{str(folder.path)!r} holds no effects.parquet, expected a folder that `mechedit trace` wrote; trace first"
        )
    check_step(folder.path, "trace")
    return select_layers(read_table(file, role="subject_last"), config=config)


def saved_selection(folder: RunFolder) -> Selection | None:
    """The folder's selection, when it has one."""
    file = folder.path / "selection.json"
    return Selection.load(file) if file.is_file() else None


def traced_model(folder: RunFolder) -> dict[str, Any]:
    """Provenance of the model that the folder's effects were traced on.

    Raises:
        InputError: nothing was traced here.
    """
    provenance = folder.stamps().get("trace", {}).get("model")
    if not provenance:
        raise InputError(
            f"{str(folder.path)!r} has no config.json that says which model was traced, expected a folder that "
            f"`mechedit trace` wrote; trace first"
        )
    return provenance
