"""`mechedit evaluate`: scores of requests before and after an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechedit import pipeline
from mechedit.cli import options
from mechedit.cli.app import print_json
from mechedit.cli.parsing import (
    first_texts,
    load,
)
from mechedit.data import load_requests, load_texts
from mechedit.edit import Edit, check_model
from mechedit.evaluation import EvaluationConfig, load_references
from mechedit.figures import run_figures


def evaluate_command(
    requests: options.RequestsFile = "tiny",
    out: options.Out = Path("run"),
    model: options.ModelName = "tiny",
    edit: Annotated[Path | None, typer.Option(help="an edit file")] = None,
    texts: options.HeldOut = None,
    max_texts: options.MaxTexts = 100,
    generation_prompts: options.GenerationPrompts = None,
    protocol: Annotated[
        pipeline.Protocol, typer.Option(help="whose measures: CounterFact's or zsRE's")
    ] = "counterfact",
    references: Annotated[
        str | None, typer.Option(help="texts for RS: counterfact, a folder with its files, or snippets of your own")
    ] = None,
    conflicts: options.ConflictsKept = "refuse",
    backend: options.Backend = "transformer_lens",
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json_: options.Json = False,
    config: options.Config = None,
) -> int:
    """Score requests before and after an edit: scores.parquet and summary.json.

    The unedited model's answers are kept in baseline/; another edit is held against them (with --overwrite in the
    same folder).
    """
    folder = pipeline.RunFolder.at(out, overwrite=overwrite)
    edits = load_requests(requests, conflicts=conflicts)
    compared = None if references is None else load_references(references, edits)
    held_out = [] if texts is None else first_texts(load_texts(texts), max_texts)
    change = None if edit is None else Edit.load(edit)
    loaded = load(model, backend, device, dtype)
    if change is not None:
        check_model(loaded, change)
    measure = EvaluationConfig(seed=seed, generation_prompts=generation_prompts)
    scores = pipeline.evaluate_step(folder, loaded, edits, change, measure, held_out, protocol, compared)
    summary = pipeline.write_summary(folder, scores, pipeline.found_selection(folder), change)
    run_figures(folder.path)
    print_json(json_, summary)
    return 0
