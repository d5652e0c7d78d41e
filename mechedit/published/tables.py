"""The numbers of the papers' tables, as printed: a CSV each in `tables/`.

`memit_table_1`, `memit_table_2`, `memit_seconds` (Appendix B) and `memit_demonstrations` (Appendix E) are of MEMIT
(arXiv 2210.07229); `rome_tracing` (§2.2, Appendix B), `rome_table_1`, `rome_table_4`, `rome_table_5` and `rome_table_6`
of ROME (arXiv 2202.05262v5). Layers are counted from 0.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd

from mechedit.arguments import checked
from mechedit.errors import InputError, brief_list, check_choice

FOLDER = Path(__file__).with_name("tables")
SCORES = (
    *("memit_table_1", "memit_table_2"),
    *("rome_table_1", "rome_table_4", "rome_table_5", "rome_table_6"),
)
"""Tables of scores, one row per model and method: `model, method, edits`, each measure in the papers' units and, under
`MEASURE_half`, half its 95 % interval. `edits` is how many records are edited at once: 10,000 or, each from the
unedited model, 1."""
_KEYS = ("model", "method", "edits")


@checked
def published_table(name: str) -> pd.DataFrame:
    """A table as its CSV has it.

    Raises:
        InputError: there is none of this name.
    """
    names = sorted(path.stem for path in FOLDER.glob("*.csv"))
    check_choice("the published table", name, names)
    return _read(name).copy()


@checked
def published_scores(name: str, model: str) -> pd.DataFrame:
    """The scores of one model in a table, tidy: `method, measure, mean, low, high`, in the papers' units and order.

    Raises:
        InputError: no such table of scores, or none of this model in it.
    """
    check_choice("the published table of scores", name, SCORES)
    table = published_table(name)
    if model not in set(table["model"]):
        raise InputError(f"{name} has no {model!r}, expected one of {brief_list(dict.fromkeys(table['model']))}")
    rows = []
    for record in table.loc[table["model"] == model, :].to_dict("records"):
        for measure in [column for column in table if column not in _KEYS and not str(column).endswith("_half")]:
            half = record.get(f"{measure}_half", float("nan"))
            mean = record[measure]
            rows.append(
                {
                    "method": record["method"],
                    "measure": str(measure),
                    "mean": mean,
                    "low": mean - half,
                    "high": mean + half,
                }
            )
    return pd.DataFrame(rows).dropna(subset=["mean"]).reset_index(drop=True)


@cache
def _read(name: str) -> pd.DataFrame:
    return pd.read_csv(FOLDER / f"{name}.csv")
