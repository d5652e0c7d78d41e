"""`mechedit edit`: make an edit, or show what one changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechedit.cli import options
from mechedit.cli.app import print_json, say
from mechedit.cli.describe import described, page, say_unconverged
from mechedit.cli.parsing import (
    check_layers,
    load,
    method_config,
    parse_layers,
)
from mechedit.data import load_requests
from mechedit.edit import Edit
from mechedit.errors import InputError
from mechedit.files import writable_folder
from mechedit.methods import METHODS
from mechedit.moments import (
    load_moments,
)
from mechedit.selection import Selection


def edit_command(
    requests: options.RequestsFile = "tiny",
    out: Annotated[Path, typer.Option(help="file for the edit")] = Path("edit.safetensors"),
    show: Annotated[Path | None, typer.Option(help="an edit file: print what it changes, and make none")] = None,
    model: Annotated[str | None, typer.Option(help="tiny (by default), a hub name or a folder")] = None,
    layers: options.Layers = None,
    selection: Annotated[Path | None, typer.Option(help="a selection.json, in place of --layers")] = None,
    moments: Annotated[Path, typer.Option(help="folder that `mechedit moments` wrote")] = Path("run"),
    method: options.Method = "memit",
    settings: options.Setting = None,
    conflicts: options.ConflictsKept = "refuse",
    backend: options.Backend = "transformer_lens",
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json_: options.Json = False,
    config: options.Config = None,
) -> int:
    """Make an edit file from requests; the model is not changed. With --show, print what an edit file changes."""
    if show is not None:
        change = Edit.load(show)
        description = described(change, load(model, backend, device, dtype) if model else None)
        print_json(json_, description)
        if not json_:
            typer.echo(page(show, description))
        return 0
    if (layers is None) == (selection is None):
        raise InputError("give the layers either by --layers or by --selection, and not by both")
    if out.exists() and not overwrite:
        raise InputError(f"the file {str(out)!r} exists; choose another --out, or pass --overwrite")
    writable_folder(out.parent)
    edits = load_requests(requests, conflicts=conflicts)
    chosen = list(Selection.load(selection).layers) if selection else parse_layers(layers or "")
    if not chosen:
        raise InputError(f"{str(selection)!r} selects no layers; give them by --layers")
    loaded = load(model or "tiny", backend, device, dtype)
    check_layers(chosen, loaded.n_layers)
    how = method_config(method, loaded, seed, settings)
    found = load_moments(moments, chosen, loaded) if how.preserves_keys else {}
    edit = METHODS[method](loaded, edits, chosen, found, config=how, cache=moments / "targets")
    edit.save(out)
    say(f"wrote {out}: {len(edits)} requests in layers {chosen}")
    say_unconverged(edit)
    print_json(json_, {"edit": str(out), "layers": chosen, "requests": len(edits)})
    return 0
