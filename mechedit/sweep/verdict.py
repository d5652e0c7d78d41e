"""A sweep held against the trace, in words: does editing agree, and what must a reader be warned of?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mechedit.sweep.windows import Window

Outcome = Literal["agree", "disagree", "undecided"]


def outcome_of(
    selected: Window | None,
    *,
    near_best: bool,
    all_near_best: bool,
    correlation: Mapping[str, Any] | None,
) -> Outcome:
    """Whether edits agree with the trace; `Validation.outcome` says when they do.

    Args:
        selected: the window that the trace selects; None when it selects none.
        near_best: whether it was edited and is not significantly worse than the best window.
        all_near_best: whether that holds of every window of its width.
        correlation: of score and contribution over the windows of its width; None where it is not defined.
    """
    if selected is None:
        return "undecided"
    if not near_best:
        return "disagree"
    if all_near_best:
        return "undecided"
    return "disagree" if correlation is not None and correlation["mean"] <= 0 else "agree"


def verdict(
    outcome: Outcome,
    score: str,
    best: Mapping[str, Any],
    selected: Window | None,
    traced: Mapping[str, Any] | None,
    correlation: Mapping[str, Any] | None,
) -> str:
    """The outcome in a sentence, with the numbers.

    Args:
        outcome: as `outcome_of` decides.
        score: name of the score that windows are ranked by.
        best: record of the best-scoring window.
        selected: the window that the trace selects; None when it selects none.
        traced: its record, with rank; None when it could not be edited.
        correlation: rank correlation of score and contribution, with its interval.
    """
    best_window = f"{Window(best['layers'][0], best['layers'][-1])} with {_with_interval(best)}"
    if selected is None:
        return f"the trace selects no layers; {score} is highest for {best_window}"
    if traced is None:
        return (
            f"edits disagree with the trace: {selected}, which it selects, cannot be edited; the best is {best_window}"
        )
    reach = (
        f"{selected}, which the trace selects, reach {score} {_with_interval(traced)}, rank {traced['rank']} of "
        f"{traced['of']} windows"
    )
    trend = _trend(score, correlation)
    if outcome == "agree":
        return f"edits agree with the trace: {reach}, and no window is reliably better{trend}"
    if outcome == "undecided":
        return (
            f"edits cannot tell the selected range from others as wide: {reach}, and none of its width is reliably "
            f"worse than the best ({best_window}){trend}"
        )
    return f"edits disagree with the trace: {reach}; the best is {best_window}{trend}"


def failure_warnings(failed: Mapping[Window, str]) -> list[str]:
    """A warning that names the windows that could not be edited; none when all could."""
    if not failed:
        return []
    first, reason = next(iter(failed.items()))
    names = ", ".join(f"{window.first}-{window.last}" for window in failed)
    return [f"left out, since they could not be edited: {names} ({first}: {reason})"]


def _trend(score: str, correlation: Mapping[str, Any] | None) -> str:
    if correlation is None:
        return ""
    ends = f"[{correlation['low']:.2f}, {correlation['high']:.2f}]"
    return (
        f"; over the {correlation['n']} windows of width {correlation['width']}, the rank correlation of {score} with "
        f"the trace's contribution is {correlation['mean']:.2f} {ends}"
    )


def _with_interval(record: Mapping[str, Any]) -> str:
    return f"{record['score']:.1f} [{record['low']:.1f}, {record['high']:.1f}]"
