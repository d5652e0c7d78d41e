"""The scores of MEND's edits, each made alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analyses.common.frames import means_by
from mechedit.data import EditRequest
from mechedit.edit import edited
from mechedit.evaluation import QUICK, evaluate
from mechedit.methods import MendConfig, mend
from mechedit.models import Model
from mechedit.tables import where

MEASURES = ("ES", "PS", "NS", "exact_match")


def mend_scores(
    model: Model, requests: Sequence[EditRequest], layers: Sequence[int], editor: Path, relations: Sequence[str]
) -> pd.DataFrame:
    """ES, PS, NS and exact match in percent: of all requests, and of the relations of each name.

    Args:
        model: unedited.
        requests: each edited alone.
        layers: that the editor edits.
        editor: its file.
        relations: what each request's relation is to the editor, such as `seen` or `unseen`.
    """
    config, tables = MendConfig(editor=str(editor)), []
    for request, name in zip(requests, relations, strict=True):
        edit = mend(model, [request], layers, config=config)
        with edited(model, edit):
            table = evaluate(model, [request], QUICK).table
        tables.append(table.assign(relations=name))
    rows = pd.concat(tables, ignore_index=True)
    groups = {"all": rows, **{name: where(rows, relations=name) for name in dict.fromkeys(relations)}}
    return pd.DataFrame([
        {
            "relations": name,
            "requests": len(set(group["case"])),
            **{measure: 100 * means_by(where(group, measure=measure), "case", "value").mean() for measure in MEASURES},
        }
        for name, group in groups.items()
    ])  # fmt: skip
