"""Commands that edit: moments, edit, evaluate, apply."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from mechedit import pipeline
from mechedit.artifacts import writable_folder
from mechedit.cli import options
from mechedit.cli.app import print_json, say
from mechedit.cli.inputs import (
    check_layers,
    existing_folder,
    first_texts,
    load,
    method_config,
    parse_layers,
    parse_shard,
)
from mechedit.cli.showing import described, page, say_unconverged
from mechedit.edit import Edit, check_model, export, export_lora
from mechedit.errors import InputError
from mechedit.evaluation import EvaluationConfig, load_references
from mechedit.facts import load_requests
from mechedit.figures import run_figures
from mechedit.moments import (
    Convergence,
    MomentsConfig,
    SecondMoment,
    collect_shard,
    load_moments,
    load_texts,
    merge_moments,
    plan_moments,
)
from mechedit.selection import Selection


def moments_command(
    layers: Annotated[str | None, typer.Option(help="such as 3-8")] = None,
    texts: options.Texts = "tiny",
    out: options.Out = Path("run"),
    model: options.ModelName = "tiny",
    tokens: options.MomentTokens = None,
    max_length: options.MaxLength = 1024,
    memory: options.Memory = None,
    checkpoint_seconds: options.CheckpointSeconds = 60,
    shard: options.Shard = None,
    merge: options.Merge = False,
    convergence: options.ConvergenceCurve = False,
    weight: options.Weight = 15_000,
    backend: options.Backend = "transformer_lens",
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json_: options.Json = False,
    config: options.Config = None,
) -> int:
    """Collect the second moments of MLP keys over text: moments/layer_L.safetensors.

    A killed run goes on from its last checkpoint. With --shard, or under `accelerate launch`, each process reads its
    part of the text; when all have ended, --merge makes the files from what they left.
    """
    if merge and (shard or convergence):
        raise InputError("--merge only adds up what lies in --out; give it without --shard and --convergence")
    wanted = None if layers is None else parse_layers(layers)
    if merge:
        return _say_moments(merge_moments(existing_folder(out), wanted, overwrite=overwrite), json_)
    if wanted is None:
        raise InputError("give the layers whose moments are wanted by --layers, such as --layers 3-8")
    settings = MomentsConfig(tokens=tokens, max_length=max_length, memory=memory, checkpoint_seconds=checkpoint_seconds)
    part = parse_shard(shard, os.environ)
    curve = Convergence(weight=weight, seed=seed) if convergence else None
    if part and curve:
        raise InputError("--convergence needs the text in order; collect without --shard")
    folder = pipeline.RunFolder.at(out, overwrite=overwrite)
    loaded = load(model, backend, device, dtype)
    check_layers(wanted, loaded.n_layers)
    say(str(plan_moments(loaded, wanted, settings, convergence=convergence)))
    if part is None:
        return _say_moments(pipeline.moments_step(folder, loaded, texts, wanted, settings, curve), json_)
    files = collect_shard(loaded, texts, wanted, part, out, settings, overwrite=overwrite)
    say(f"part {part[0]}/{part[1]} is finished; when all are: mechedit moments --merge --out {out}")
    print_json(json_, {"parts": {layer: str(file) for layer, file in files.items()}})
    return 0


def _say_moments(found: Mapping[int, SecondMoment], json_: bool) -> int:
    print_json(json_, {"moments": {layer: moment.count for layer, moment in found.items()}})
    return 0


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
    edit = pipeline.make_edit(loaded, edits, chosen, found, method, how, moments / "targets")
    edit.save(out)
    say(f"wrote {out}: {len(edits)} requests in layers {chosen}")
    say_unconverged(edit)
    print_json(json_, {"edit": str(out), "layers": chosen, "requests": len(edits)})
    return 0


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
