"""Does the range that the trace selects also edit well? Scores by window beside the trace's contributions.

In: a `Sweep`, the gap by fact and layer that selection rests on, and the selected range. Out: a `Validation`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from mechedit.errors import InputError, check_choice
from mechedit.selection.curves import contribution
from mechedit.statistics import bootstrap_means, percentile_interval, rank_interval, spearman
from mechedit.sweep.sweep import Sweep
from mechedit.sweep.windows import By, Window

Outcome = Literal["agree", "disagree", "undecided"]
FEWEST = 4
"""Windows that a rank correlation needs: of fewer, any order comes up by chance."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What editing says about the trace's range. Scores are in percent, contributions and gaps in probability."""

    outcome: Outcome
    """`disagree`: some window edits reliably better than the selected one; or this cannot be edited; or over the
    windows of its width scores fall where contributions rise. `undecided`: no window of its width can be told from
    the best, or the trace selects none."""
    verdict: str
    """The same in a sentence, with the numbers."""
    warnings: tuple[str, ...]
    """What a reader must know; a disagreement is among them."""
    method: str
    score: str
    """What windows are ranked by: S, or what there is of it."""
    n_requests: int
    held_out: int
    """Requests whose subject was not traced."""
    best: dict[str, Any]
    """The best-scoring window: layers, score, low, high. Ties go to the larger probability differences."""
    traced: dict[str, Any] | None
    """The selected range: layers, score, low, high, `rank` (1 is best) of `of` windows; None without one, or when it
    cannot be edited."""
    near_best: tuple[list[int], ...]
    """Layers of every window that cannot be told from the best (`near_best`)."""
    correlation: dict[str, Any] | None
    """Spearman's rank correlation of score and contribution over the `n` windows of one `width`, that of the
    selected range where there are `FEWEST` such, else the commonest: mean, low, high; None where it is not defined
    (fewer windows, or all the same)."""
    gap_correlation: dict[str, Any] | None
    """The same with the mean gap in place of the contribution."""
    windows: tuple[dict[str, Any], ...]
    """Each window: layers, score, low, high, contribution, gap."""
    layers: tuple[int, ...] = ()
    """The layers chosen in the end."""
    by: str = "trace"
    """What chose them."""
    stability: float | None = None
    """Share of resamples (of requests for `sweep`, of facts for `both`) that choose the same window."""


def compare(
    sweep: Sweep,
    gap: Float[np.ndarray, "fact layer"],
    traced: Sequence[int],
    *,
    held_out: int | None = None,
    notes: Sequence[str] = (),
) -> Validation:
    """Hold a sweep against the trace.

    A window's prediction is Σ c(l) over its layers, with c(l) = gap(l−1) − gap(l). The intervals of correlations
    come from resampling facts and requests, independently of each other; the windows are fixed, and neighbors
    share layers, so nothing is claimed about other windows.

    Args:
        sweep: scores by window.
        gap: state minus MLP-severed effect at the subject's last token, of each traced fact.
        traced: layers that the trace selects; empty when it selects none.
        held_out: how many of the requests are about subjects that were not traced; all by default.
        notes: warnings about how the sweep was made, kept with the result.

    Raises:
        InputError: layers in the sweep that were not traced, or selected layers that were not swept.
    """
    windows, n_requests = sweep.windows, len(set(sweep.cases["case"]))
    place = _place(sweep, gap.shape[1], traced)
    records = _records(sweep, gap)
    near = near_best(sweep)
    best = _order(sweep)[0]
    alike = [i for i, window in enumerate(windows) if window.width == len(traced)]
    compared = alike if len(alike) >= FEWEST else _commonest(windows)
    correlations = [_correlation(sweep, gap, compared, summed) for summed in (_contribution, _mean_gap)]
    own = Window(traced[0], traced[-1]) if len(traced) else None
    outcome = _outcome(own, place, near, alike, correlations[0] if compared == alike else None)
    rank = None if place is None else 1 + int((sweep.scores > sweep.scores[place]).sum())
    selected = None if place is None else {**records[place], "rank": rank, "of": len(windows)}
    verdict = _verdict(outcome, sweep.score, records[best], own, selected, correlations[0])
    return Validation(
        outcome=outcome,
        verdict=verdict,
        warnings=(*notes, *_refusals(sweep), *([verdict] if outcome == "disagree" else [])),
        method=str(sweep.provenance.get("method")),
        score=sweep.score,
        n_requests=n_requests,
        held_out=n_requests if held_out is None else held_out,
        best=records[best],
        traced=selected,
        near_best=tuple(windows[i].layers for i in np.flatnonzero(near)),
        correlation=correlations[0],
        gap_correlation=correlations[1],
        windows=tuple(records),
        layers=tuple(traced),
    )


def choose(sweep: Sweep, gap: Float[np.ndarray, "fact layer"], traced: Sequence[int], by: str) -> tuple[Window, float]:
    """The window that is chosen, and the share of resamples that choose it.

    `sweep`: the best score; ties go to the larger probability differences, then to the narrower window. The
    resamples are of requests. `both`: of the windows that cannot be told from the best (`near_best`), the one with
    the largest contribution Σ c(l); ties go to the narrower. The resamples are of facts.

    Raises:
        InputError: `both` when the trace selects nothing, or an unknown `by`.
    """
    check_choice("by", by, get_args(By)[1:])
    if by == "sweep":
        # Scores are shares of few requests and often tie; the margin is at most 100, so it decides ties alone.
        tied = sweep.draws + 1e-6 * sweep.margins
        found = _order(sweep)[0]
        return sweep.windows[found], float((tied.argmax(1) == found).mean())
    if not len(traced):
        raise InputError("the trace selects no layers, so it prefers no window; choose by sweep alone, or trace more")
    candidates = np.flatnonzero(near_best(sweep))
    windows = [sweep.windows[i] for i in candidates]
    preferred = _contribution(gap.mean(0, keepdims=True), windows)[0]
    draws = _contribution(_resampled(gap, sweep), windows)
    found = int(preferred.argmax())  # windows come narrow ones first, and argmax takes the first of equals
    return windows[found], float((draws.argmax(1) == found).mean())


def near_best(sweep: Sweep) -> Bool[np.ndarray, " window"]:
    """Which windows cannot be told from the best: multiple comparisons with the best, calibrated by bootstrap.

    Window w stays when max_v (S_v − S_w) does not exceed the quantile, at the sweep's confidence, of the same
    maximum over resamples centered on what was measured, max_v [(S*_v − S_v) − (S*_w − S_w)] (after Hsu, 1981).
    Taking the maximum allows for the best having been found on the same requests.
    """
    noise = sweep.draws - sweep.scores
    behind = sweep.scores.max() - sweep.scores
    allowed = np.nanquantile(noise.max(1, keepdims=True) - noise, sweep.config.confidence, axis=0)
    return behind <= allowed


def _place(sweep: Sweep, n_layers: int, traced: Sequence[int]) -> int | None:
    """Where the selected range is among the windows; None when there is none, or it cannot be edited."""
    reached = max(window.last for window in sweep.windows)
    if reached >= n_layers:
        raise InputError(
            f"the sweep reaches layer {reached}, but {n_layers} layers were traced; expected both to be of one "
            f"model: sweep again"
        )
    if not len(traced):
        return None
    own = Window(traced[0], traced[-1])
    if own not in sweep.windows and own not in sweep.refused:
        raise InputError(f"{own}, which the trace selects, is not among the windows swept; sweep it too")
    return sweep.windows.index(own) if own in sweep.windows else None


def _contribution(gap: Float[np.ndarray, "row layer"], windows: Sequence[Window]) -> Float[np.ndarray, "row window"]:
    lost = contribution(gap)
    return np.stack([lost[:, window.layers].sum(1) for window in windows], axis=1)


def _mean_gap(gap: Float[np.ndarray, "row layer"], windows: Sequence[Window]) -> Float[np.ndarray, "row window"]:
    return np.stack([gap[:, window.layers].mean(1) for window in windows], axis=1)


def _resampled(gap: Float[np.ndarray, "fact layer"], sweep: Sweep) -> Float[np.ndarray, "resample layer"]:
    """Mean gap on resamples of the facts, from other random numbers than those that resample the requests."""
    return bootstrap_means(gap, seed=sweep.config.seed + 1, resamples=sweep.config.resamples)


def _order(sweep: Sweep) -> list[int]:
    """Places of the windows, best first."""
    keys = zip(-sweep.scores, -sweep.margins, [window.width for window in sweep.windows], strict=True)
    return [place for *_, place in sorted((*key, place) for place, key in enumerate(keys))]


def _records(sweep: Sweep, gap: Float[np.ndarray, "fact layer"]) -> list[dict[str, Any]]:
    low, high = percentile_interval(sweep.draws, sweep.config.confidence)
    mean = gap.mean(0, keepdims=True)
    summed, meaned = _contribution(mean, sweep.windows)[0], _mean_gap(mean, sweep.windows)[0]
    return [
        {
            "layers": window.layers,
            "score": float(sweep.scores[i]),
            "low": float(low[i]),
            "high": float(high[i]),
            "contribution": float(summed[i]),
            "gap": float(meaned[i]),
        }
        for i, window in enumerate(sweep.windows)
    ]


def _commonest(windows: Sequence[Window]) -> list[int]:
    """Places of the windows of the commonest width, the widest of equally common ones.

    A wider window holds more contribution whatever its place, so only windows of one width are compared.
    """
    counts = Counter(window.width for window in windows)
    width = max(counts, key=lambda width: (counts[width], width))
    return [place for place, window in enumerate(windows) if window.width == width]


def _correlation(
    sweep: Sweep, gap: Float[np.ndarray, "fact layer"], places: Sequence[int], predict: Any
) -> dict[str, Any] | None:
    """Spearman's correlation of prediction and score over the windows at `places`, with its interval."""
    if len(places) < FEWEST:
        return None
    windows = [sweep.windows[i] for i in places]
    measured = spearman(predict(gap.mean(0, keepdims=True), windows), sweep.scores[None, places])
    if np.isnan(measured[0]):
        return None
    draws = spearman(predict(_resampled(gap, sweep), windows), sweep.draws[:, places])
    low, high = rank_interval(float(measured[0]), draws, len(places), sweep.config.confidence)
    return {"mean": float(measured[0]), "low": low, "high": high, "n": len(places), "width": windows[0].width}


def _refusals(sweep: Sweep) -> list[str]:
    """A warning that names the windows that could not be edited."""
    if not sweep.refused:
        return []
    first, reason = next(iter(sweep.refused.items()))
    names = ", ".join(f"{window.first}-{window.last}" for window in sweep.refused)
    return [f"left out, since they could not be edited: {names} ({first}: {reason})"]


def _outcome(
    own: Window | None,
    place: int | None,
    near: Bool[np.ndarray, " window"],
    alike: Sequence[int],
    correlation: dict[str, Any] | None,
) -> Outcome:
    if own is None:
        return "undecided"
    if place is None or not near[place]:
        return "disagree"
    if near[list(alike)].all():
        return "undecided"
    return "disagree" if correlation is not None and correlation["mean"] <= 0 else "agree"


def _verdict(
    outcome: Outcome,
    score: str,
    best: dict[str, Any],
    own: Window | None,
    traced: dict[str, Any] | None,
    correlation: dict[str, Any] | None,
) -> str:
    best_said = f"{Window(best['layers'][0], best['layers'][-1])} with {_with_interval(best)}"
    if own is None:
        return f"the trace selects no layers; {score} is highest for {best_said}"
    if traced is None:
        return f"edits disagree with the trace: {own}, which it selects, cannot be edited; the best is {best_said}"
    named = f"{own}, which the trace selects,"
    place = f"{score} {_with_interval(traced)}, rank {traced['rank']} of {traced['of']} windows"
    follows = ""
    if correlation is not None:
        ends = f"[{correlation['low']:.2f}, {correlation['high']:.2f}]"
        follows = (
            f"; over the {correlation['n']} windows of width {correlation['width']}, the rank correlation of "
            f"{score} with the trace's contribution is {correlation['mean']:.2f} {ends}"
        )
    if outcome == "agree":
        return f"edits agree with the trace: {named} reach {place}, and no window is reliably better{follows}"
    if outcome == "undecided":
        return (
            f"edits cannot tell the selected range from others as wide: {named} reach {place}, and none of its width "
            f"is reliably worse than the best ({best_said}){follows}"
        )
    return f"edits disagree with the trace: {named} reach {place}; the best is {best_said}{follows}"


def _with_interval(record: dict[str, Any]) -> str:
    return f"{record['score']:.1f} [{record['low']:.1f}, {record['high']:.1f}]"
