"""summary.json: the selected layers and each state's scores, with the protocol that gave them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from mechedit.edit import Edit
from mechedit.evaluation.scores import Scores
from mechedit.files import plain_copy, read_checked_object, write_checked_json
from mechedit.provenance import value_hash
from mechedit.records import Number, Whole, check_record


class EntryRecord(TypedDict):
    """A measure in summary.json."""

    mean: Number | None
    low: Number | None
    high: Number | None
    n: Whole


class SummaryRecord(TypedDict, total=False):
    """The scores of each state in summary.json."""

    before: dict[str, EntryRecord] | None
    after: dict[str, EntryRecord] | None
    now: dict[str, EntryRecord] | None


def read_summary_file(path: Path) -> dict[str, Any]:
    """The content of summary.json, also of an earlier release.

    Raises:
        InputError: it cannot be read, is not as it was written, or is no summary.
    """
    summary = read_checked_object(path, "before", "after", "now", remedy="evaluate again")
    check_record(summary, SummaryRecord, repr(str(path)), "evaluate again")
    return summary


def write_summary_file(
    path: Path, scores: Scores | None, selection: Mapping[str, Any] | None, edit: Edit | None = None
) -> dict[str, Any]:
    """Write the summary with its checksum, and return it without.

    It holds what was selected, each state's measures with intervals, protocol and counts.

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
    write_checked_json(path, summary)
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
