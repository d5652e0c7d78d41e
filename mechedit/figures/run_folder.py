"""Every figure for which a run folder has data, in one call."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from typing_extensions import TypedDict

from mechedit.errors import InputError
from mechedit.evaluation.summary_file import read_summary_file
from mechedit.figures.score_bars import BARS, plot_scores
from mechedit.figures.selection import plot_selection
from mechedit.figures.style import draw, save_figure
from mechedit.figures.sweep import sweep_figure
from mechedit.figures.trace_figures import trace_figures
from mechedit.files import read_object, write_json
from mechedit.locks import locked
from mechedit.provenance import VERSION, file_hash
from mechedit.records import check_record
from mechedit.run_folder import as_written, check_step
from mechedit.sweep.sweep import TABLE_COLUMNS
from mechedit.sweep.validation import read_selection_fields
from mechedit.tables import read_table

RESULTS = ("effects.parquet", "selection.json", "sweep.parquet", "summary.json")
"""Files that figures are drawn from."""
DRAWN = "drawn.json"
"""File in the folder of figures that says which results they show, by hash; written last."""


class DrawnRecord(TypedDict):
    """The content of that file."""

    mechedit: str
    results: dict[str, str]
    files: list[str]


def run_figures(folder: str | Path) -> list[Path]:
    """Draw every figure for which a run folder has data into `folder`/figures, each as PDF and PNG.

    From effects.parquet: severed, roles, fact, lines, and the last three for each kind alone (roles_state, …);
    for metrics besides probability also severed_kl, …. From selection.json: selection. From sweep.parquet: sweep.
    From summary.json: scores.

    Returns:
        The files written.

    Raises:
        InputError: there is no such folder, it cannot be written to, or a result is not as it was written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}, expected one that mechedit wrote: check the path")
    with locked(folder / "figures", f"the figures in {str(folder)!r}", wait=True), as_written(folder):
        return _run_figures(folder)


def _run_figures(folder: Path) -> list[Path]:
    check_step(folder, "trace", "sweep")
    figures: dict[str, Figure] = {}
    selection, summary = (
        read(folder / name) if (folder / name).is_file() else {}
        for name, read in (("selection.json", read_selection_fields), ("summary.json", read_summary_file))
    )
    if (folder / "effects.parquet").is_file():
        figures |= trace_figures(folder / "effects.parquet", selection.get("layers"))
    if selection.get("evidence"):
        figures["selection"] = draw(partial(plot_selection, selection), height=2.7)
    if (folder / "sweep.parquet").is_file():
        figures["sweep"] = sweep_figure(read_table(folder / "sweep.parquet", TABLE_COLUMNS), selection)
    before, after = summary.get("before") or {}, summary.get("after") or summary.get("now") or {}
    if any(name in before or name in after for name in BARS):
        figures["scores"] = draw(partial(plot_scores, before, after))
    paths = [path for name, figure in figures.items() for path in save_figure(figure, folder / "figures", name)]
    if paths:
        write_json(folder / "figures" / DRAWN, {**_drawn_from(folder), "files": [path.name for path in paths]})
    return paths


def refresh_figures(folder: str | Path) -> list[Path]:
    """As `run_figures`, but where all figures of the same results are there already, nothing is drawn.

    Returns:
        The files written: all or none.
    """
    try:
        drawn = read_object(Path(folder) / "figures" / DRAWN)
        check_record(drawn, DrawnRecord, DRAWN, "draw again")
    except InputError:
        return run_figures(folder)
    files = drawn.pop("files")
    if drawn == _drawn_from(Path(folder)) and all((Path(folder) / "figures" / name).is_file() for name in files):
        return []
    return run_figures(folder)


def _drawn_from(folder: Path) -> dict[str, Any]:
    """What decides how the figures look: the results, and the release that draws them."""
    paths = [folder / name for name in RESULTS if (folder / name).is_file()]
    return {"mechedit": VERSION, "results": {path.name: file_hash(path) for path in paths}}
