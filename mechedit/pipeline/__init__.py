"""The steps of a run: trace, select, collect moments, edit, evaluate, each with its files in one run folder.

Every step states what goes into it, how its result is made, and how the result is kept in files; `RunFolder.step` makes
it once and reuses it when nothing that determines it has changed.
"""

from mechedit.pipeline.editing import EDIT, edit_step, moments_step
from mechedit.pipeline.scoring import BASELINE, SCORES, Protocol, evaluate_step, write_summary
from mechedit.pipeline.selecting import saved_selection, select_step, selecting, traced_model
from mechedit.pipeline.sweeping import (
    FINALS,
    SWEEP,
    check_traced,
    settle_step,
    sweep_step,
    validate_step,
)
from mechedit.pipeline.tracing import (
    merge_trace_step,
    round_in_words,
    trace_shard_step,
    trace_step,
    trace_until_settled_step,
)

__all__ = [
    "BASELINE",
    "EDIT",
    "FINALS",
    "SCORES",
    "SWEEP",
    "Protocol",
    "check_traced",
    "edit_step",
    "evaluate_step",
    "merge_trace_step",
    "moments_step",
    "round_in_words",
    "saved_selection",
    "select_step",
    "selecting",
    "settle_step",
    "sweep_step",
    "trace_shard_step",
    "trace_step",
    "trace_until_settled_step",
    "traced_model",
    "validate_step",
    "write_summary",
]
