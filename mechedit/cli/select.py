"""`mechedit select`: the critical layers from a trace, checked by editing when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mechedit import pipeline
from mechedit.cli import options
from mechedit.cli.app import print_json, say
from mechedit.cli.parsing import existing_folder, load, method_config, parse_windows
from mechedit.data import load_requests
from mechedit.figures import run_figures
from mechedit.moments import MomentsConfig
from mechedit.selection import SelectConfig
from mechedit.sweep import SweepConfig


def select_command(
    directory: Annotated[Path, typer.Argument(help="folder that `mechedit trace` wrote")],
    rule: options.Rule = "contribution",
    share: options.Share = 0.9,
    min_width: options.MinWidth = None,
    max_width: options.MaxWidth = None,
    width: options.Width = None,
    validate: Annotated[bool, typer.Option("--validate", help="sweep windows with held-out edits")] = False,
    by: options.By = "trace",
    windows: options.Windows = None,
    validate_requests: options.ValidateRequests = 20,
    requests: options.RequestsFile = "tiny",
    texts: options.Texts = "tiny",
    tokens: options.MomentTokens = None,
    max_length: options.MaxLength = 1024,
    method: options.Method = "memit",
    settings: options.Setting = None,
    model: Annotated[str | None, typer.Option(help="to sweep; by default the one that was traced")] = None,
    backend: options.Backend = "transformer_lens",
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json_: options.Json = False,
    config: options.Config = None,
) -> int:
    """Choose the critical layers from a folder's effects: selection.json and its figure.

    With --validate, or --by sweep or both, windows of layers are edited with requests about other subjects and
    scored, beside what the trace says of them: sweep.parquet and its figure, and a verdict in selection.json.
    """
    folder = pipeline.RunFolder(existing_folder(directory), overwrite)
    choice = SelectConfig(rule=rule, share=share, min_width=min_width, max_width=max_width, width=width, seed=seed)
    named = None if windows is None else tuple(parse_windows(windows))
    sweep = SweepConfig(by=by, windows=named, width=width, requests=validate_requests, seed=seed)
    sweeping = validate or by != "trace"
    edits = load_requests(requests) if sweeping else []
    selection = pipeline.select_step(folder, choice)
    summary: dict[str, Any] = {}
    if sweeping:
        own = pipeline.traced_model(folder)
        loaded = load(model or own["model"], backend, device, dtype or own["dtype"])
        how = method_config(method, loaded, seed, settings)
        reading = MomentsConfig(tokens=tokens, max_length=max_length)
        selection = pipeline.validate_step(folder, loaded, selection, edits, texts, sweep, method, how, reading)
        summary["validation"] = selection.validation
        for line in dict.fromkeys([*selection.validation["warnings"], selection.validation["verdict"]]):
            say(line)
    run_figures(folder.path)
    say(selection.reason)
    print_json(json_, {"selection": {"layers": list(selection.layers), **summary}})
    return 0 if selection.layers else 3
