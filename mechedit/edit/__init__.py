"""An edit is a value: low-rank factors for each layer, and a manifest that says what made it and for whom.

It is applied for a moment with `edited`, or for good with `apply_` and `undo_`; weights come back bit for bit. Edits
for the same weights can be merged, subtracted and truncated, and written as a checkpoint or as a LoRA adapter.
"""

from mechedit.edit.algebra import merge, subtract, truncate
from mechedit.edit.apply import add_, apply_, check_model, edited, undo_
from mechedit.edit.export import export, export_lora
from mechedit.edit.ledger import preserved
from mechedit.edit.summary import summarize
from mechedit.edit.value import Edit, Factors, same
from mechedit.edit.weights import copies, restore_

__all__ = [
    "Edit",
    "Factors",
    "add_",
    "apply_",
    "check_model",
    "copies",
    "edited",
    "export",
    "export_lora",
    "merge",
    "preserved",
    "restore_",
    "same",
    "subtract",
    "summarize",
    "truncate",
    "undo_",
]
