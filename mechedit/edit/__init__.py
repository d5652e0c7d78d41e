"""An edit is a value: low-rank factors for each layer, and a manifest that says what made it and for which weights.

It is applied temporarily with `edited`, or until it is undone with `apply_` and `undo_`; weights come back bit for bit.
Edits for the same weights can be merged, subtracted and truncated, and written as a checkpoint or as a LoRA adapter.

One invariant holds throughout: weights = base + sum of the applied deltas, rounded once. That is, with W₀ a copy of a
layer's weights before its first edit, W = round(W₀ + ΔW₁ + … + ΔW_k), summed in float64 and rounded once to the
weights' dtype. So rounding errors do not add up over edits, an edit leaves the same bits wherever and whenever it is
applied, and undoing the last edit gives back the bits that were there before it.
"""

from mechedit.edit.applied_edits import restoring, transaction
from mechedit.edit.apply_undo import add_, apply_, check_model, edited, undo_
from mechedit.edit.combine import lost_fraction, merge, subtract, truncate
from mechedit.edit.edit import Edit, Factors
from mechedit.edit.export import export, export_lora
from mechedit.edit.summary import summarize
from mechedit.edit.weights import copy_weights, restore_

__all__ = [
    "Edit",
    "Factors",
    "add_",
    "apply_",
    "check_model",
    "copy_weights",
    "edited",
    "export",
    "export_lora",
    "lost_fraction",
    "merge",
    "restore_",
    "restoring",
    "subtract",
    "summarize",
    "transaction",
    "truncate",
    "undo_",
]
