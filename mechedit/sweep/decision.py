"""The layers to edit in the end: those that the trace selects, or a window that the sweep prefers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from mechedit.files import plain_copy
from mechedit.selection import Selection
from mechedit.sweep.sweep import Sweep
from mechedit.sweep.validation import Validation, choose_window


def decide_layers(
    selection: Selection, validation: Validation, sweep: Sweep, gap: Float[np.ndarray, "fact layer"], by: str
) -> Selection:
    """The selection with its validation, and with the layers that `by` chooses (`mechedit.sweep.choose_window`).

    Without an early site, `both` follows the trace and selects nothing. Layers that edits chose are settled when edits
    of them are reliably better than no edit; how far resamples agree on the trace's range stays in `agreement`.

    Args:
        selection: from the trace.
        validation: the comparison of the selection with the sweep.
        sweep: scores by window.
        gap: state minus MLP-severed effect at the subject's last token, of each traced fact.
        by: `trace`, `sweep` or `both`.
    """
    if by == "trace" or (by == "both" and not selection.layers):
        return replace(selection, validation=plain_copy(replace(validation, by=by)))
    window, stability = choose_window(sweep, gap, selection.layers, by)
    layers = tuple(window.layers)
    reasons = {
        "sweep": f"{window}: the best-scoring of the windows edited ({validation.score})",
        "both": f"{window}: of the windows that cannot be told from the best-scoring ({validation.score}), the one "
        f"with the largest contribution in the trace",
    }
    decided = replace(validation, by=by, layers=layers, stability=stability)
    unedited = sweep.before[sweep.score]["mean"]
    edited = next(record for record in validation.windows if record["layers"] == window.layers)
    improves = edited["low"] > unedited
    score = f"{edited['score']:.1f} [{edited['low']:.1f}, {edited['high']:.1f}]"
    doubt = f"; but {score} is not reliably above the unedited model's {unedited:.1f}, so that it is unsettled"
    return replace(
        selection,
        layers=layers,
        state="settled" if improves else "unsettled",
        reason=reasons[by] + ("" if improves else doubt),
        stability=stability,
        validation=plain_copy(decided),
    )
