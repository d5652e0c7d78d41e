"""`mechedit apply`: the edited model as a checkpoint, or the edit as a LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mechedit.cli import options
from mechedit.cli.app import print_json, say
from mechedit.cli.parsing import (
    load,
)
from mechedit.edit import Edit, export, export_lora


def apply_command(
    edit: Annotated[Path, typer.Option(help="an edit file")],
    out: Annotated[Path, typer.Option(help="folder for the checkpoint or the adapter")],
    model: options.ModelName = "tiny",
    format_: Annotated[
        Literal["checkpoint", "lora"], typer.Option("--format", help="the whole model, or a LoRA adapter for PEFT")
    ] = "checkpoint",
    backend: options.Backend = "transformer_lens",
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json_: options.Json = False,
    config: options.Config = None,
) -> int:
    """Write the edited model as a checkpoint that AutoModelForCausalLM loads, or the edit as a LoRA adapter."""
    change = Edit.load(edit)
    loaded = load(model, backend, device, dtype)
    if format_ == "lora":
        export_lora(loaded, change, out, overwrite=overwrite)
        say(f"wrote the edit as a LoRA adapter to {out}")
    else:
        export(loaded, change, out, overwrite=overwrite)
        say(f"wrote the edited model to {out}")
    print_json(json_, {"model": str(out), "format": format_, "layers": change.layers})
    return 0
