"""`mechedit apply`: the edited model as a checkpoint, or the edit as a LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mechedit.cli.app import say
from mechedit.cli.command import command
from mechedit.cli.options import ModelOptions
from mechedit.cli.parsing import quiet
from mechedit.edit import Edit, export, export_lora


@dataclass(frozen=True, kw_only=True)
class ApplyOptions(ModelOptions):
    """Edit, model and folder."""

    edit: Path
    """An edit file."""
    out: Path
    """Folder for the checkpoint or the adapter."""
    format: Literal["checkpoint", "lora"] = "checkpoint"
    """The whole model, or a LoRA adapter for PEFT."""


@command()
def apply_command(options: ApplyOptions) -> int:
    """Write the edited model as a checkpoint that AutoModelForCausalLM loads, or the edit as a LoRA adapter.

    A checkpoint has the dtype of the one that the model was loaded from, or that of --dtype. It is read back and
    compared with the edited model before it appears; that takes the memory of a second model.
    """
    edit = Edit.load(options.edit)
    model = options.load_model()
    if options.format == "lora":
        with quiet():
            export_lora(model, edit, options.out, overwrite=options.overwrite)
        say(f"wrote the edit as a LoRA adapter to {options.out}")
    else:
        with quiet():
            export(model, edit, options.out, overwrite=options.overwrite, dtype=options.dtype)
        say(f"wrote the edited model to {options.out}; read back, it is the edited model")
    options.print_summary({"model": str(options.out), "format": options.format, "layers": edit.layers})
    return 0
