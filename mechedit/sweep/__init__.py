"""Edit many windows of layers and see which works best: tracing need not predict it (Hase et al., 2023).

In: a model, held-out requests, second moments. Out: a `Sweep` (scores by window), and a `Validation` that compares
it with the trace's range.
"""

from mechedit.sweep.decision import decide_layers
from mechedit.sweep.sweep import Sweep, sweep_windows
from mechedit.sweep.validation import (
    CLOSE,
    Validation,
    choose_window,
    finalists,
    validate_selection,
    window_agreement,
    windows_near_best,
)
from mechedit.sweep.windows import By, HeldOut, SweepConfig, Window, held_out, short_sweep, windows_of

__all__ = [
    "CLOSE",
    "By",
    "HeldOut",
    "Sweep",
    "SweepConfig",
    "Validation",
    "Window",
    "choose_window",
    "decide_layers",
    "finalists",
    "held_out",
    "short_sweep",
    "sweep_windows",
    "validate_selection",
    "window_agreement",
    "windows_near_best",
    "windows_of",
]
