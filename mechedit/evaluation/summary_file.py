"""summary.json: the selected layers and each state's scores, with the protocol that gave them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechedit.edit import Edit
from mechedit.evaluation.scores import Scores
from mechedit.files import plain_copy, write_json
from mechedit.provenance import value_hash


def write_summary_file(
    path: Path, scores: Scores | None, selection: Mapping[str, Any] | None, edit: Edit | None = None
) -> dict[str, Any]:
    """Write and return the summary: what was selected, each state's measures with intervals, protocol and counts.

    Args:
        path: path of the file.
        scores: scores of all states; None when nothing was evaluated.
        selection: the selected layers and whether they are settled; None when there was no selection.
        edit: the edit that was evaluated.
    """
    summary: dict[str, Any] = {}
    if selection is not None:
        summary["selection"] = dict(selection)
    if scores is not None:
        summary |= {state: scores.summary(state) for state in scores.states}
        summary |= {"protocol": {**scores.protocol, "edit": edit_record(edit)}, "counts": scores.counts}
    summary = plain_copy(summary)
    write_json(path, summary)
    return summary


def edit_record(edit: Edit | None) -> dict[str, Any] | None:
    """The method, layers and number of requests of an edit, a hash of its manifest, and its warnings if it has any."""
    if edit is None:
        return None
    warnings = {"warnings": list(edit.manifest["warnings"])} if "warnings" in edit.manifest else {}
    return {
        "method": edit.manifest.get("method"),
        "layers": edit.layers,
        "requests": len(edit.manifest.get("requests", ())),
        "manifest_hash": value_hash(dict(edit.manifest)),
        **warnings,
    }
