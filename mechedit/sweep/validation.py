"""Does the range that the trace selects also edit well? Scores by window against the trace's contributions.

In: a `Sweep`, the gap by fact and layer that selection rests on, and the selected range. Out: a `Validation`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Float
from typing_extensions import TypedDict

from mechedit.errors import InputError, check_choice
from mechedit.files import read_checked_object
from mechedit.records import check_record, partial_record, read_record
from mechedit.selection import Selection
from mechedit.selection.curves import contribution
from mechedit.statistics import bootstrap_means, near_best, rank_interval, spearman
from mechedit.sweep.sweep import Sweep
from mechedit.sweep.verdict import Outcome, failure_warnings, outcome_of, verdict
from mechedit.sweep.windows import By, Window
from mechedit.tables import where

Prediction = Callable[[Float[np.ndarray, "row layer"], Sequence[Window]], Float[np.ndarray, "row window"]]
"""From gaps by layer to the trace's prediction for each window."""
CLOSE = 3.0
"""Points of the score within which windows count as equally good."""
FEWEST = 4
"""Windows that a rank correlation needs: of fewer, any order comes up by chance."""


class WindowRecord(TypedDict):
    """A window in the comparison."""

    layers: list[int]
    score: float
    low: float
    high: float
    contribution: float
    gap: float


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Whether edits agree with the trace's range. Scores are in percent, contributions and gaps in probability."""

    outcome: Outcome
    """`disagree`: some window is significantly better than the selected one; or the selected one cannot be edited; or
    over the windows of its width scores fall where contributions rise. `undecided`: no window of its width is
    significantly worse than the best, or the trace selects none."""
    verdict: str
    """The same in a sentence, with the numbers."""
    warnings: tuple[str, ...]
    """Cautions for the reader; a disagreement is among them."""
    method: str
    """Name of the editing method."""
    score: str
    """Name of the score that windows are ranked by: S, or the harmonic mean of those of its measures with data."""
    n_requests: int
    """Number of requests edited."""
    held_out: int
    """Number of them whose subject was not traced."""
    best: dict[str, Any]
    """The best-scoring window: layers, score, low, high. Ties go to the larger probability differences."""
    traced: dict[str, Any] | None
    """The selected range: layers, score, low, high, `rank` (1 is best) of `of` windows; None without one, or when it
    cannot be edited."""
    near_best: tuple[list[int], ...]
    """Layers of every window that is not significantly worse than the best (`windows_near_best`)."""
    correlation: dict[str, Any] | None
    """Spearman's rank correlation of score and contribution over the `n` windows of one `width`, that of the
    selected range where there are `FEWEST` such, else the commonest: mean, low, high; None where it is not defined
    (fewer windows, or all the same)."""
    gap_correlation: dict[str, Any] | None
    """The same with the mean gap in place of the contribution."""
    windows: tuple[WindowRecord, ...]
    """Each window: layers, score, low, high, contribution, gap."""
    layers: tuple[int, ...] = ()
    """The layers chosen in the end."""
    by: str = "trace"
    """How they were chosen: by the trace, the sweep, or both."""
    stability: float | None = None
    """Fraction of resamples (of requests for `sweep`, of facts for `both`) that choose the same window."""
    agreement: float | None = None
    """Fraction of resamples of the requests in which no window scores more than `CLOSE` points above the chosen one."""
    finals: dict[str, Any] | None = None
    """The best windows edited with more requests, from which `layers` were chosen: `n_requests`, and `windows` as above
    (layers, score, low, high); None without such a round."""


def validate_selection(
    sweep: Sweep,
    gap: Float[np.ndarray, "fact layer"],
    traced: Sequence[int],
    *,
    held_out: int | None = None,
    notes: Sequence[str] = (),
) -> Validation:
    """Compare the scores of edits with the range that the trace selects.

    A window's prediction is Σ c(l) over its layers, with c(l) = gap(l−1) − gap(l). The intervals of correlations
    come from resampling facts and requests, independently of each other; the windows are fixed, and neighbors
    share layers, so nothing is claimed about other windows.

    Args:
        sweep: scores by window.
        gap: state minus MLP-severed effect at the subject's last token, of each traced fact.
        traced: layers that the trace selects; empty when it selects none.
        held_out: number of requests about subjects that were not traced; all by default.
        notes: warnings about how the sweep was made, added to those of the result.

    Raises:
        InputError: layers in the sweep that were not traced, or selected layers that were not swept.
    """
    windows, n_requests = sweep.windows, len(set(sweep.cases["case"]))
    selected_index = _selected_index(sweep, gap.shape[1], traced)
    records = _records(sweep, gap)
    near = windows_near_best(sweep)
    best = records[_best_first(sweep)[0]]
    as_wide = [index for index, window in enumerate(windows) if window.width == len(traced)]
    compared = as_wide if len(as_wide) >= FEWEST else _commonest_width(windows)
    correlations = [_correlation(sweep, gap, compared, predict) for predict in (_contribution, _mean_gap)]
    selected = Window(traced[0], traced[-1]) if len(traced) else None
    outcome = outcome_of(
        selected,
        near_best=selected_index is not None and bool(near[selected_index]),
        all_near_best=bool(near[as_wide].all()),
        correlation=correlations[0] if compared == as_wide else None,
    )
    record = None
    if selected_index is not None:
        rank = 1 + int((sweep.scores > sweep.scores[selected_index]).sum())
        record = {**records[selected_index], "rank": rank, "of": len(windows)}
    sentence = verdict(outcome, sweep.score, best, selected, record, correlations[0])
    return Validation(
        outcome=outcome,
        verdict=sentence,
        warnings=(*notes, *failure_warnings(sweep.failed), *([sentence] if outcome == "disagree" else [])),
        method=str(sweep.provenance.get("method")),
        score=sweep.score,
        n_requests=n_requests,
        held_out=n_requests if held_out is None else held_out,
        best=best,
        traced=record,
        near_best=tuple(windows[index].layers for index in np.flatnonzero(near)),
        correlation=correlations[0],
        gap_correlation=correlations[1],
        windows=tuple(WindowRecord(**record) for record in records),
        layers=tuple(traced),
    )


def choose_window(
    sweep: Sweep, gap: Float[np.ndarray, "fact layer"], traced: Sequence[int], by: str
) -> tuple[Window, float]:
    """Choose a window by its edit scores (`sweep`) or by scores and trace (`both`).

    `sweep`: the best score; ties go to the larger probability differences, then to the narrower window. The
    resamples are of requests. `both`: of the windows that are within `CLOSE` points of the best and not significantly
    worse (`windows_near_best`), the one with the largest contribution per layer, mean of c(l); ties go to the narrower.
    The resamples are of facts.

    Args:
        sweep: scores by window.
        gap: state minus MLP-severed effect at the subject's last token, of each traced fact.
        traced: layers that the trace selects; empty when it selects none.
        by: `sweep` or `both`.

    Returns:
        The window, and the fraction of resamples that choose it.

    Raises:
        InputError: `both` when the trace selects nothing, or an unknown `by`.
    """
    check_choice("by", by, get_args(By)[1:])
    if by == "sweep":
        # Scores are rates of few requests and often tie; the margin is at most 100, so it decides ties alone.
        tie_broken = sweep.draws + 1e-6 * sweep.margins
        best = _best_first(sweep)[0]
        return sweep.windows[best], float((tie_broken.argmax(1) == best).mean())
    if not len(traced):
        raise InputError("the trace selects no layers, so it prefers no window; choose by sweep alone, or trace more")
    close = windows_near_best(sweep) & (sweep.scores >= sweep.scores.max() - CLOSE)
    candidates = [sweep.windows[index] for index in np.flatnonzero(close)]
    widths = np.array([window.width for window in candidates])
    contributions = _contribution(gap.mean(0, keepdims=True), candidates)[0] / widths
    draws = _contribution(_resampled(gap, sweep), candidates) / widths
    preferred = int(contributions.argmax())  # windows come narrow ones first, and argmax takes the first of equals
    return candidates[preferred], float((draws.argmax(1) == preferred).mean())


def window_agreement(sweep: Sweep, window: Window) -> float:
    """Fraction of resamples of the requests in which no window scores more than `CLOSE` points above this one."""
    behind = sweep.draws.max(1) - sweep.draws[:, sweep.windows.index(window)]
    return float((behind <= CLOSE).mean())


def finalists(sweep: Sweep, chosen: Window, count: int = 3) -> list[Window]:
    """The chosen window, and the best-scoring that are not significantly worse than the best, `count` at most."""
    near = windows_near_best(sweep)
    best = [sweep.windows[index] for index in _best_first(sweep) if near[index]]
    return [chosen, *(window for window in best if window != chosen)][:count]


def windows_near_best(sweep: Sweep) -> Bool[np.ndarray, " window"]:
    """True for windows whose score is not significantly below the best (`mechedit.statistics.near_best`)."""
    return near_best(sweep.scores, sweep.draws, sweep.config.confidence)


def _selected_index(sweep: Sweep, n_layers: int, traced: Sequence[int]) -> int | None:
    """Index of the selected range among the windows; None when there is none, or it cannot be edited."""
    reached = max(window.last for window in sweep.windows)
    if reached >= n_layers:
        raise InputError(
            f"the sweep reaches layer {reached}, but {n_layers} layers were traced; expected both to be of one "
            f"model: sweep again"
        )
    if not len(traced):
        return None
    selected = Window(traced[0], traced[-1])
    if selected not in sweep.windows and selected not in sweep.failed:
        raise InputError(f"{selected}, which the trace selects, is not among the windows swept; sweep it too")
    return sweep.windows.index(selected) if selected in sweep.windows else None


def _contribution(gap: Float[np.ndarray, "row layer"], windows: Sequence[Window]) -> Float[np.ndarray, "row window"]:
    """Σ c(l) over each window's layers."""
    by_layer = contribution(gap)
    return np.stack([by_layer[:, window.layers].sum(1) for window in windows], axis=1)


def _mean_gap(gap: Float[np.ndarray, "row layer"], windows: Sequence[Window]) -> Float[np.ndarray, "row window"]:
    """Mean gap over each window's layers."""
    return np.stack([gap[:, window.layers].mean(1) for window in windows], axis=1)


def _resampled(gap: Float[np.ndarray, "fact layer"], sweep: Sweep) -> Float[np.ndarray, "resample layer"]:
    """Mean gap on resamples of the facts, from other random numbers than those that resample the requests."""
    return bootstrap_means(gap, seed=sweep.config.seed + 1, resamples=sweep.config.resamples)


def _best_first(sweep: Sweep) -> list[int]:
    """Indices of the windows, the best score first; ties go to the larger margin, then to the narrower window."""
    keys = zip(-sweep.scores, -sweep.margins, [window.width for window in sweep.windows], strict=True)
    return [index for *_, index in sorted((*key, index) for index, key in enumerate(keys))]


def window_records(sweep: Sweep) -> list[dict[str, Any]]:
    """Each window's layers, and its score with interval."""
    ends = where(sweep.table, measure=sweep.score)
    low, high = (ends[end].to_numpy(dtype=float) for end in ("low", "high"))
    return [
        {"layers": window.layers, "score": float(sweep.scores[i]), "low": float(low[i]), "high": float(high[i])}
        for i, window in enumerate(sweep.windows)
    ]


def _records(sweep: Sweep, gap: Float[np.ndarray, "fact layer"]) -> list[dict[str, Any]]:
    """`window_records`, with each window's contribution and mean gap."""
    mean = gap.mean(0, keepdims=True)
    summed, mean_gaps = _contribution(mean, sweep.windows)[0], _mean_gap(mean, sweep.windows)[0]
    return [
        {**record, "contribution": float(summed[i]), "gap": float(mean_gaps[i])}
        for i, record in enumerate(window_records(sweep))
    ]


def _commonest_width(windows: Sequence[Window]) -> list[int]:
    """Indices of the windows of the commonest width, the widest of equally common ones.

    A wider window holds more contribution wherever it lies, so only windows of one width are compared.
    """
    counts = Counter(window.width for window in windows)
    width = max(counts, key=lambda width: (counts[width], width))
    return [index for index, window in enumerate(windows) if window.width == width]


def _correlation(
    sweep: Sweep, gap: Float[np.ndarray, "fact layer"], indices: Sequence[int], predict: Prediction
) -> dict[str, Any] | None:
    """Spearman's correlation of prediction and score over the windows of these indices, with its interval."""
    if len(indices) < FEWEST:
        return None
    windows = [sweep.windows[index] for index in indices]
    measured = spearman(predict(gap.mean(0, keepdims=True), windows), sweep.scores[None, indices])
    if np.isnan(measured[0]):
        return None
    draws = spearman(predict(_resampled(gap, sweep), windows), sweep.draws[:, indices])
    low, high = rank_interval(float(measured[0]), draws, len(indices), sweep.config.confidence)
    return {"mean": float(measured[0]), "low": low, "high": high, "n": len(indices), "width": windows[0].width}


def read_selection_fields(path: Path) -> dict[str, Any]:
    """The fields of selection.json that are there, also of an earlier release, and its validation.

    Raises:
        InputError: it cannot be read, is not as it was written, or is no selection.
    """
    what, remedy = repr(str(path)), "select again"
    selection = read_checked_object(path, "alternatives", "validation", "provenance", remedy=remedy)
    if not isinstance(selection.get("layers"), list):
        raise InputError(f"{what} is not a selection, expected what `mechedit select` wrote: {remedy}")
    present = {name: value for name, value in selection.items() if value is not None}
    check_record(present, partial_record(Selection), what, remedy)
    if selection.get("validation"):
        read_record(selection["validation"], Validation, f"the validation in {what}", remedy)
    return selection
