"""The layers to edit in the end: those that the trace selects, or a window that the sweep prefers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from mechedit.files import plain_copy
from mechedit.selection import Selection
from mechedit.sweep.sweep import Sweep
from mechedit.sweep.validation import CLOSE, Validation, choose_window, window_agreement, window_records


def decide_layers(
    selection: Selection,
    validation: Validation,
    sweep: Sweep,
    gap: Float[np.ndarray, "fact layer"],
    by: str,
    finals: Sweep | None = None,
) -> Selection:
    """The selection with its validation, and with the layers that `by` chooses (`mechedit.sweep.choose_window`).

    Without an early site, `both` follows the trace and selects nothing. Layers that edits chose are settled when edits
    of them are reliably better than no edit; how far resamples agree on the trace's range stays in `agreement`, and
    how sure the edits are in that of the validation.

    Args:
        selection: from the trace.
        validation: the comparison of the selection with the sweep.
        sweep: scores by window.
        gap: state minus MLP-severed effect at the subject's last token, of each traced fact.
        by: `trace`, `sweep` or `both`.
        finals: scores of the best windows with more requests, from which to choose in place of all.
    """
    if by == "trace" or (by == "both" and not selection.layers):
        return replace(selection, validation=plain_copy(replace(validation, by=by)))
    decisive = finals or sweep
    window, stability = choose_window(decisive, gap, selection.layers, by)
    agreement = window_agreement(decisive, window)
    records = window_records(decisive)
    decided = replace(
        validation,
        by=by,
        layers=tuple(window.layers),
        stability=stability,
        agreement=agreement,
        finals=finals and {"n_requests": len(set(finals.cases["case"])), "windows": records},
    )
    chosen = next(record for record in records if record["layers"] == window.layers)
    reasons = {
        "sweep": f"{window}: the best-scoring of the windows edited ({validation.score})",
        "both": f"{window}: of the windows that score as well as the best ({validation.score}), the one with the "
        f"largest contribution per layer in the trace",
    }
    state, support = _support(decisive, chosen, agreement)
    return replace(
        selection,
        layers=tuple(window.layers),
        state=state,
        reason=reasons[by] + support,
        stability=stability,
        validation=plain_copy(decided),
    )


def _support(sweep: Sweep, chosen: dict[str, Any], agreement: float) -> tuple[Any, str]:
    """Whether edits of a window are reliably better than no edit, and how sure they are of the window, in words."""
    unedited = sweep.before[sweep.score]["mean"]
    score = f"{chosen['score']:.1f} [{chosen['low']:.1f}, {chosen['high']:.1f}]"
    if chosen["low"] <= unedited:
        doubt = f"; but {score} is not reliably above the unedited model's {unedited:.1f}, so that it is unsettled"
        return "unsettled", doubt
    text = (
        f", {score} against the unedited model's {unedited:.1f}; on {agreement:.0%} of resamples of the requests no "
        f"other window is more than {CLOSE:g} points better"
    )
    return "settled", text
