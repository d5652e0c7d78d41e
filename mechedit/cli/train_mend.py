"""`mechedit train-mend`: the editor of MEND, trained on edits of a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mechedit.cli.app import say
from mechedit.cli.command import POSITIONAL, command
from mechedit.cli.options import RequestsOption, TextsOption
from mechedit.cli.parsing import parse_layers, require_layers
from mechedit.methods import MEND_FILE, MendTrainingConfig, train_mend, tuned_folder_of
from mechedit.models import Model

PUBLISHED_BLOCKS = 3
"""Blocks at the end that MEND's paper edits."""


@dataclass(frozen=True, kw_only=True)
class TrainMendOptions(RequestsOption, TextsOption):
    """Model, requests, texts, layers and file."""

    model: Annotated[str | None, POSITIONAL] = "tiny"
    """tiny, a hub name or a folder."""
    layers: str | None = None
    """Layers that the editor edits, such as 3-8; by default the last three, as in the paper. Several are separated by
    commas."""
    out: Path | None = None
    """File for the editor; by default mend.safetensors in the model's folder where that can be written to, else in the
    folder of tuned settings."""


@command()
def train_mend_command(options: TrainMendOptions, training: MendTrainingConfig) -> int:
    """Train the network with which --method mend edits: mend.safetensors.

    It is trained on edits of this model, and edits no other. Facts that scores are reported of should not be among its
    requests. An interrupted training goes on where it stopped, when the same command is given again.
    """
    requests = options.read_named_requests("first")
    model = options.load_model()
    first = max(model.n_layers - PUBLISHED_BLOCKS, 0)
    layers = list(range(first, model.n_layers)) if options.layers is None else parse_layers(options.layers)
    require_layers(layers, model.n_layers)
    file = editor_file(options, model)
    editor = train_mend(
        model, options.in_turns(model, requests), options.suited_texts, layers, training, file,
        overwrite=options.overwrite, notify=say,
    )  # fmt: skip
    say(f"wrote {file}: the editor after step {editor.record['steps']}, for layers {list(editor.layers)}")
    curve = [dict(row) for row in editor.record["curve"]]
    options.print_summary(
        {"editor": str(file), "layers": list(editor.layers), "steps": editor.record["steps"], "curve": curve}
    )
    return 0


def editor_file(options: TrainMendOptions, model: Model) -> Path:
    """Where the editor is written: --out, the folder of the model, or that of tuned settings."""
    if options.out is not None:
        return options.out
    folder = Path(options.model or "tiny")
    if options.model != "tiny" and folder.is_dir() and os.access(folder, os.W_OK):
        return folder / MEND_FILE
    return tuned_folder_of(model) / MEND_FILE
